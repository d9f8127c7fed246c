"""One example's loss in one fixed form, whatever the user's signature, and the result that every method returns."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.bounds import Bound
from dpscale.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped per-example gradients of one physical batch of B rows; a pytree.

    `grad_sum`: like the parameters, float32 (float64 for float64 parameters); None in place of frozen and
    non-float leaves. `norms`: f32[B], `losses`: f32[B], both 0 where a row contributes nothing.
    `finite`: bool[B], False only where an unmasked row's loss or gradient norm is not finite; such a row
    contributes exactly zero. `aux`: the loss's auxiliary output with a leading axis B, or None; zeros where
    a row contributes nothing. `group_norms`: f32[G, B], norms of the asked groups of leaves, or None.

    All but `grad_sum` are sensitive: they concern single records and are not protected by noise.
    """

    grad_sum: Any
    norms: jax.Array
    losses: jax.Array
    finite: jax.Array
    aux: Any = None
    group_norms: jax.Array | None = None


@dataclass(frozen=True)
class Problem:
    """What a clipping method is asked: per-example gradients of `loss` at `leaves`, clipped by `bound`, summed.

    `loss(leaves, row) -> (scalar, aux)` is the user's loss of one example as a function of the trainable leaves
    (a list) and of one row of `rows`. `rows` is a pytree with a leading axis B (the batch, and the keys if any).
    `groups[j]` is the bound's group of leaf j; `norm_groups[j]` the group whose norm is asked for, if any is.
    """

    loss: Callable[[list[jax.Array], Any], tuple[jax.Array, Any]]
    leaves: list[jax.Array]
    names: list[str]
    rows: Any
    mask: jax.Array
    bound: Bound
    groups: list[int]
    norm_groups: list[int] | None = None
    num_norm_groups: int = 0


def sum_dtype(dtype) -> Any:
    """float32 for every smaller float, float64 for float64: norms and sums are never taken in less."""
    return jnp.promote_types(dtype, jnp.float32)


def select_rows(keep: jax.Array, x: jax.Array) -> jax.Array:
    """Rows of x where `keep`, else zero. A selection, since NaN * 0 is NaN."""
    return jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def replace_rows(keep: jax.Array, rows: Any) -> Any:
    """Puts the first kept row in the place of every other one, so that no row holds anything unforeseen.

    With no kept row, row 0 is used as it is; nothing of it is summed.
    """
    source = jnp.where(keep, jnp.arange(keep.shape[0]), jnp.argmax(keep))
    return jax.tree.map(lambda x: jnp.take(x, source, axis=0), rows)


def clip_factors(
    problem: Problem, squares: list[jax.Array], upper: list[jax.Array] | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """(total norm f[B], factors f[B] of each clip group) from the leaves' squared norms, each f[B].

    `upper` are upper bounds of the squares, which the factors are taken from; by default the squares themselves.
    A square below the smallest normal float32 may have been flushed to zero; `size * tiny` bounds what that hides,
    so that the factor is right for any clip norm. Overflow gives an infinite norm: the row counts as not finite.
    """
    dtype = jnp.result_type(jnp.float32, *squares)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    bounds = [
        x.astype(dtype) + jnp.asarray(leaf.size * tiny, dtype)
        for x, leaf in zip(upper or squares, problem.leaves, strict=True)
    ]
    groups = range(max(problem.groups) + 1)
    joint = [
        sum((x for x, g in zip(bounds, problem.groups, strict=True) if g == group), jnp.zeros_like(bounds[0]))
        for group in groups
    ]
    factors = problem.bound.factors(jnp.sqrt(jnp.stack(joint)))
    total = functools.reduce(jnp.add, [x.astype(dtype) for x in squares])
    return jnp.sqrt(total), list(factors)


def group_norms(problem: Problem, squares: list[jax.Array]) -> jax.Array | None:
    """f32[G, B] from the leaves' squared norms, each f[B]; None where they are not asked for."""
    if problem.norm_groups is None:
        return None
    sums = [jnp.zeros_like(problem.mask, jnp.float32)] * problem.num_norm_groups
    for square, group in zip(squares, problem.norm_groups, strict=True):
        sums[group] = sums[group] + square.astype(jnp.float32)
    return jnp.sqrt(jnp.stack(sums))


def check_scalar(loss: jax.Array) -> None:
    """Raises InputError where the per-example loss is not a float scalar."""
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise InputError(
            f"loss_fn returned {loss.dtype}{list(loss.shape)} for one example: it must return one float scalar "
            "(loss_fn sees a single example, without the batch axis)"
        )
