"""sum_b factor_b e_b over the rows of arrays: where written-out gradients become the leaves' clipped sums."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpscale.clipping.example import sum_dtype

SHORT_ROW = 4096
"""Rows of fewer floats are summed by one reduction on a CPU; longer ones one after the other (see `row_sums`)."""


def row_sums(
    arrays: Sequence[jax.Array],
    axes: Sequence[int],
    factors: Sequence[jax.Array],
    groups: Sequence[int],
    onto: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Of each array f[...] the sum over its axis, in at least float32: rows along the axis, each times its factor.

    `factors`: f[B] of each group, finite; a row whose factor is 0 counts as zeros, whatever it holds. `groups`: each
    array's. `onto`: what the sums are added to.

    A product of a vector and a matrix on a GPU. XLA's CPU backend takes 10 to 20 times as long for that product as for
    reading the matrix (it writes out the selected rows first, then goes through them in columns), and compiles each
    such product by itself. There long rows are added up in one loop for all arrays, which reads each of them once and
    writes nothing but the sums; short ones by a reduction, since a round of a loop has its price.
    """
    if not arrays:
        return []
    wide = [x.astype(sum_dtype(x.dtype)) for x in arrays]
    cpu, default = (functools.partial(fun, axes=axes, groups=groups) for fun in (_on_cpu, _products))
    return jax.lax.platform_dependent(wide, list(factors), onto, cpu=cpu, default=default)


def _products(
    arrays: list[jax.Array],
    factors: list[jax.Array],
    onto: list[jax.Array] | None,
    axes: Sequence[int],
    groups: Sequence[int],
) -> list[jax.Array]:
    sums = [_product(x, factors[group], axis) for x, axis, group in zip(arrays, axes, groups, strict=True)]
    return sums if onto is None else list(map(jnp.add, onto, sums))


def _on_cpu(
    arrays: list[jax.Array],
    factors: list[jax.Array],
    onto: list[jax.Array] | None,
    axes: Sequence[int],
    groups: Sequence[int],
) -> list[jax.Array]:
    rows, rest = factors[0].shape[0], range(len(arrays))
    long = [j for j in rest if math.prod(arrays[j].shape) >= SHORT_ROW * rows]
    sums = {j: _reduced(arrays[j], factors[groups[j]], axes[j]) for j in rest if j not in long}
    if onto is not None:
        sums = {j: onto[j] + x for j, x in sums.items()}

    def scaled(b):
        weights = [factor[b] for factor in factors]
        return [_scaled_row(arrays[j], b, weights[groups[j]], axes[j]) for j in long]

    if long:  # zeros to begin with would be one array for all, copied for each
        first = scaled(0) if onto is None else [onto[j] for j in long]
        begin = 1 if onto is None else 0
        found = jax.lax.fori_loop(begin, rows, lambda b, totals: list(map(jnp.add, totals, scaled(b))), first)
        sums |= zip(long, found, strict=True)
    return [sums[j] for j in rest]


@functools.partial(jax.jit, static_argnames="axis")  # traced once for arrays of one shape
def _product(each: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    kept = jnp.where(_along(factor != 0, each, axis), each, 0)
    factor = factor.astype(each.dtype)
    return jnp.tensordot(factor, kept, ((0,), (axis,)), precision="highest")  # no route's norm allows for TF32 here


@functools.partial(jax.jit, static_argnames="axis")
def _reduced(each: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    scaled = each * _along(factor.astype(each.dtype), each, axis)
    return jnp.sum(jnp.where(_along(factor != 0, each, axis), scaled, 0), axis)


@functools.partial(jax.jit, static_argnames="axis")
def _scaled_row(each: jax.Array, b: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(each, b, axis, keepdims=False)
    return jnp.where(weight != 0, row * weight.astype(each.dtype), 0)


def _along(x: jax.Array, each: jax.Array, axis: int) -> jax.Array:
    return x.reshape([-1 if i == axis else 1 for i in range(each.ndim)])
