"""Values that a compiler must make once: what the norm is of is then, bit for bit, what is summed.

A compiler is free to make a cheap value again for each of its uses, in other loops, with other roundings (a fused
multiply-add here, none there). Where an example's cotangents are nothing but rounding noise, two such copies need not
even be near each other, and a factor taken from one does not bound the other: twice the bound was seen.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


@jax.jit  # traced once for values of one shape
def held(tree: Tree, mask: jax.Array) -> Tree:
    """The pytree itself, made before anything that uses it. `mask`: bool[B], any value that the compiler does not know.

    XLA's GPU compiler keeps an optimization barrier until all loops are fused. Its CPU compiler drops barriers before
    that (cpu_compiler.cc, "OptimizationBarrierExpander"), but it makes what a loop carries before the loop begins, and
    in place: a loop that never runs a round, which only the running program knows, costs neither time nor memory.
    """
    if not jax.tree.leaves(tree):
        return tree
    return jax.lax.platform_dependent(
        tree, mask, cpu=_carried, default=lambda tree, _: jax.lax.optimization_barrier(tree)
    )


def _carried(tree: Tree, mask: jax.Array) -> Tree:
    more = jnp.sum(mask, dtype=jnp.int32) < 0

    def changed(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys, which no compiler rounds
            return x
        return -x if jnp.issubdtype(x.dtype, jnp.inexact) else ~x

    def other(carry):
        return jnp.zeros_like(more), jax.tree.map(changed, carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], other, (more, tree))[1]


def finite_or_zero(x: jax.Array) -> jax.Array:
    """x with zeros in place of what is not finite: times a factor of 0 it is then 0."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


@functools.partial(jax.jit, static_argnames="axes")
def cleared(arrays: list[jax.Array], good: jax.Array, axes: tuple[int, ...]) -> list[jax.Array]:
    """The arrays with zeros in the rows that are not `good`, bool[B]; `axes`: where B is in each.

    A selection, since NaN * 0 is NaN. On a CPU it is made in place, and only if there is a row to clear: mostly there
    is none, and then reading and writing all operands would be for nothing.
    """

    def selected(arrays, good):
        along = [
            good.reshape([-1 if i == at else 1 for i in range(x.ndim)]) for x, at in zip(arrays, axes, strict=True)
        ]
        return [jnp.where(keep, x, jnp.zeros((), x.dtype)) for keep, x in zip(along, arrays, strict=True)]

    def in_place(arrays, good):
        def other(carry):
            _, arrays = carry
            return jnp.zeros_like(some), selected(arrays, good)

        some = ~jnp.all(good)
        return jax.lax.while_loop(lambda carry: carry[0], other, (some, arrays))[1]

    return jax.lax.platform_dependent(arrays, good, cpu=in_place, default=selected)
