"""One example's loss in one fixed form, whatever the user's signature, and the result that every method returns."""

from collections.abc import Callable, Mapping, Sequence
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
    """float32 for every smaller float and for integers, else the type: norms and sums are never taken in less."""
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    small = real and jax.dtypes.itemsize_bits(dtype) < 32  # those of 8 bits and less have no promotion
    return jnp.dtype(jnp.float32) if small else jnp.promote_types(dtype, jnp.float32)


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
    problem: Problem, squares: Mapping[int, jax.Array], upper: Mapping[int, jax.Array] | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """(total norm f[B], factors f[B] of each clip group) from squared norms f[B].

    `squares[j]`: of leaf j, or of leaf j and others of its groups together. `upper` are upper bounds of the squares,
    which the factors are taken from; by default the squares themselves. A square below the smallest normal float32 may
    have been flushed to zero; `size * tiny` bounds what that hides, so that the factor is right for any clip norm.
    Overflow gives an infinite norm: the row counts as not finite.
    """
    upper, tiny = squares if upper is None else upper, float(jnp.finfo(jnp.float32).tiny)
    joint = []
    for group in range(max(problem.groups) + 1):
        members = [j for j, g in enumerate(problem.groups) if g == group]
        found = _total(problem, [upper[j] for j in members if j in upper])
        joint.append(found + jnp.asarray(sum(problem.leaves[j].size for j in members) * tiny, found.dtype))
    factors = problem.bound.factors(jnp.sqrt(jnp.stack(joint)))
    return jnp.sqrt(_total(problem, list(squares.values()))), list(factors)


def group_norms(problem: Problem, squares: Mapping[int, jax.Array]) -> jax.Array | None:
    """f32[G, B] from squared norms f[B] as `clip_factors` takes them; None where they are not asked for."""
    asked = problem.norm_groups
    if asked is None:
        return None
    found = [[x for j, x in squares.items() if asked[j] == group] for group in range(problem.num_norm_groups)]
    return jnp.sqrt(jnp.stack([_total(problem, x).astype(jnp.float32) for x in found]))


def _total(problem: Problem, arrays: Sequence[jax.Array]) -> jax.Array:
    """f[B], zeros of no arrays. One reduction: hundreds of additions in a row are hundreds of operations to compile."""
    if not arrays:
        return jnp.zeros_like(problem.mask, jnp.float32)
    dtype = jnp.result_type(jnp.float32, *arrays)
    return jnp.sum(jnp.stack([x.astype(dtype) for x in arrays]), axis=0)


def check_scalar(loss: jax.Array) -> None:
    """Raises InputError where the per-example loss is not a float scalar."""
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise InputError(
            f"loss_fn returned {loss.dtype}{list(loss.shape)} for one example: it must return one float scalar "
            "(loss_fn sees a single example, without the batch axis)"
        )
