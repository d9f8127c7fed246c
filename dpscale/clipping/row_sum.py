"""sum_b factor_b e_b over the rows of one array: where written-out gradients become a leaf's clipped sum."""

import functools
import math

import jax
import jax.numpy as jnp

from dpscale.clipping.example import sum_dtype

SHORT_ROW = 4096
"""Rows of fewer floats are summed by one reduction on a CPU; longer ones one after the other (see `row_sum`)."""


@functools.partial(jax.jit, static_argnames="axis")
def row_sum(each: jax.Array, axis: int, factor: jax.Array, good: jax.Array) -> jax.Array:
    """f[...] without `axis`, in at least float32: rows along `axis`, `factor` f[B]; rows that are not `good` are zero.

    A product of a vector and a matrix on a GPU. XLA's CPU backend takes 10 to 20 times as long for that product as for
    reading the matrix (it writes out the selected rows first, then goes through them in columns), and compiles each
    such product by itself. There long rows are added up in a loop, which reads each of them once and writes nothing
    but the sum; short ones by a reduction, since a round of a loop has its price.
    """
    wide = each.astype(sum_dtype(each.dtype))
    factor = jnp.where(good, factor, 0).astype(wide.dtype)
    long = math.prod(each.shape) >= SHORT_ROW * each.shape[axis]
    cpu = functools.partial(_one_by_one if long else _reduced, axis=axis)
    return jax.lax.platform_dependent(wide, factor, good, cpu=cpu, default=functools.partial(_product, axis=axis))


def _product(each: jax.Array, factor: jax.Array, good: jax.Array, axis: int) -> jax.Array:
    kept = jnp.where(_along(good, each, axis), each, 0)
    return jnp.tensordot(factor, kept, ((0,), (axis,)), precision="highest")  # no route's norm allows for TF32 here


def _reduced(each: jax.Array, factor: jax.Array, good: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.where(_along(good, each, axis), each * _along(factor, each, axis), 0), axis)


def _one_by_one(each: jax.Array, factor: jax.Array, good: jax.Array, axis: int) -> jax.Array:
    def scaled(b):
        row = jax.lax.dynamic_index_in_dim(each, b, axis, keepdims=False)
        return jnp.where(good[b], row * factor[b], 0)

    return jax.lax.fori_loop(1, each.shape[axis], lambda b, total: total + scaled(b), scaled(0))


def _along(x: jax.Array, each: jax.Array, axis: int) -> jax.Array:
    return x.reshape([-1 if i == axis else 1 for i in range(each.ndim)])
