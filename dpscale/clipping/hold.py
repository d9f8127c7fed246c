"""Values that a compiler must make once: what the norm is of is then, bit for bit, what is summed.

A compiler is free to make a cheap value again for each of its uses, in other loops, with other roundings (a fused
multiply-add here, none there). Where an example's cotangents are nothing but rounding noise, two such copies need not
even be near each other, and a factor taken from one does not bound the other: twice the bound was seen.
"""

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
    return jax.lax.platform_dependent(
        tree, mask, cpu=_carried, default=lambda tree, _: jax.lax.optimization_barrier(tree)
    )


def _carried(tree: Tree, mask: jax.Array) -> Tree:
    more = jnp.sum(mask, dtype=jnp.int32) < 0

    def other(carry):
        _, tree = carry
        return jnp.zeros_like(more), jax.tree.map(lambda x: -x if jnp.issubdtype(x.dtype, jnp.inexact) else ~x, tree)

    return jax.lax.while_loop(lambda carry: carry[0], other, (more, tree))[1]
