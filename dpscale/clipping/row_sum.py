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
    good: jax.Array,
) -> list[jax.Array]:
    """Of each array f[...] the sum over its axis, in at least float32: rows along the axis, each times its factor.

    `factors`: f[B] of each group; `groups`: each array's; rows that are not `good`, bool[B], are zero.

    A product of a vector and a matrix on a GPU. XLA's CPU backend takes 10 to 20 times as long for that product as for
    reading the matrix (it writes out the selected rows first, then goes through them in columns), and compiles each
    such product by itself. There long rows are added up in one loop for all arrays, which reads each of them once and
    writes nothing but the sums; short ones by a reduction, since a round of a loop has its price.
    """
    if not arrays:
        return []
    factors = [jnp.where(good, factor, 0) for factor in factors]
    wide = [x.astype(sum_dtype(x.dtype)) for x in arrays]
    cpu, default = (functools.partial(fun, axes=axes, groups=groups) for fun in (_on_cpu, _products))
    return jax.lax.platform_dependent(wide, factors, good, cpu=cpu, default=default)


def _products(
    arrays: list[jax.Array], factors: list[jax.Array], good: jax.Array, axes: Sequence[int], groups: Sequence[int]
) -> list[jax.Array]:
    return [_product(x, factors[group], good, axis) for x, axis, group in zip(arrays, axes, groups, strict=True)]


def _on_cpu(
    arrays: list[jax.Array], factors: list[jax.Array], good: jax.Array, axes: Sequence[int], groups: Sequence[int]
) -> list[jax.Array]:
    rows, rest = good.shape[0], range(len(arrays))
    long = [j for j in rest if math.prod(arrays[j].shape) >= SHORT_ROW * rows]
    sums = {j: _reduced(arrays[j], factors[groups[j]], good, axes[j]) for j in rest if j not in long}

    def scaled(b):
        weights, counts = [factor[b] for factor in factors], good[b]
        return [_scaled_row(arrays[j], b, weights[groups[j]], counts, axes[j]) for j in long]

    if long:  # zeros to begin with would be one array for all, copied for each
        found = jax.lax.fori_loop(1, rows, lambda b, totals: list(map(jnp.add, totals, scaled(b))), scaled(0))
        sums |= zip(long, found, strict=True)
    return [sums[j] for j in rest]


@functools.partial(jax.jit, static_argnames="axis")  # traced once for arrays of one shape
def _product(each: jax.Array, factor: jax.Array, good: jax.Array, axis: int) -> jax.Array:
    kept = jnp.where(_along(good, each, axis), each, 0)
    factor = factor.astype(each.dtype)
    return jnp.tensordot(factor, kept, ((0,), (axis,)), precision="highest")  # no route's norm allows for TF32 here


@functools.partial(jax.jit, static_argnames="axis")
def _reduced(each: jax.Array, factor: jax.Array, good: jax.Array, axis: int) -> jax.Array:
    scaled = each * _along(factor.astype(each.dtype), each, axis)
    return jnp.sum(jnp.where(_along(good, each, axis), scaled, 0), axis)


@functools.partial(jax.jit, static_argnames="axis")
def _scaled_row(each: jax.Array, b: jax.Array, weight: jax.Array, counts: jax.Array, axis: int) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(each, b, axis, keepdims=False)
    return jnp.where(counts, row * weight.astype(each.dtype), 0)


def _along(x: jax.Array, each: jax.Array, axis: int) -> jax.Array:
    return x.reshape([-1 if i == axis else 1 for i in range(each.ndim)])
