"""Sums whose rows may reach each other by a NaN: taken again without the rows that are not finite.

Under vmap the compiler may turn a convolution's weight gradient into one dense convolution over the whole batch, and
through that one row's NaN reaches the others. The engine takes such convolutions otherwise (`batched_convolution`)
where it sees them; in a branch of a cond, or in the obvious way of `materialize`, it does not.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from dpscale.clipping.example import ClippedSum, Problem, replace_rows


def repaired(problem: Problem, clipped_sum: Callable[[Problem], ClippedSum]) -> ClippedSum:
    """What `clipped_sum` gives where no row that is not finite takes part.

    Rows that must not count are replaced by a good row before anything is computed. Where something is not finite all
    the same, the rows are halved until those that are not finite are found, and the sum is taken without them: for k
    such rows of B, about 2 k log2(B) sums. Each of them is one round of the same loop, so the same compiled program:
    another one, for fewer rows say, would round otherwise, and where gradients are nothing but rounding, or at the edge
    of overflow, one row would then decide what the others give.
    """
    places = jnp.arange(problem.mask.shape[0])

    def attempt(state):
        first, size, keep, _, _ = state
        ended = first >= places.size
        part = keep & ((places >= first) & (places < first + size) | ended)
        result = clipped_sum(replace(problem, rows=replace_rows(part, problem.rows), mask=part))
        finite = jnp.all(result.finite)
        done = ended | (finite & (size >= places.size))
        keep = keep & (finite | ended | (size > 1) | ~part)
        settled = finite | (size == 1)
        first = jnp.where(settled, first + size, first)
        size = jnp.where(settled, first & -first, size // 2)  # the largest half, quarter, .. that begins there
        return first, size, keep, done, result

    zero = (problem.mask[0] & False).astype(jnp.int32)  # inside shard_map it varies as the rows do
    whole = jax.lax.while_loop(lambda size: size < places.size, lambda size: 2 * size, zero + 1)  # export leaves B open
    shapes = jax.eval_shape(lambda: clipped_sum(problem))
    nothing = jax.tree.map(lambda x: jnp.where(zero == 0, *[jnp.zeros(x.shape, x.dtype)] * 2), shapes)
    start = zero, whole, problem.mask, zero != 0, nothing
    _, _, keep, _, result = jax.lax.while_loop(lambda state: ~state[3], attempt, start)
    return replace(result, finite=(keep & result.finite) | ~problem.mask)
