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
    the same, each row is taken in a batch of its own, and the sum again without the rows that are not finite there. If
    that still is not finite (at the edge of overflow the batch may round otherwise than one row), the sum is that of
    the rows taken one by one. So whether a row counts never depends on another one.
    """

    def together(keep: jax.Array) -> ClippedSum:
        return clipped_sum(replace(problem, rows=replace_rows(keep, problem.rows), mask=keep))

    def one_by_one(keep: jax.Array) -> ClippedSum:
        def add(sums, row):
            values, kept = jax.tree.map(lambda x: x[None], row)
            found = clipped_sum(replace(problem, rows=values, mask=kept))
            return jax.tree.map(jnp.add, sums, found.grad_sum), replace(found, grad_sum=None)

        sums, each = jax.lax.scan(add, nothing.grad_sum, (problem.rows, keep))
        by_group = None if each.group_norms is None else each.group_norms[..., 0].T
        found = jax.tree.map(lambda x: x[:, 0], replace(each, group_norms=None))
        return replace(found, grad_sum=sums, group_norms=by_group)

    def attempt(state):
        keep, count, _, _ = state
        alone = count % 2 == 1
        result = jax.lax.cond(alone, one_by_one, together, keep)
        keep = keep & (result.finite | ~alone)
        done = (count == 3) | (~alone & jnp.all(result.finite))
        return keep, count + 1, done, result

    falsum = problem.mask[0] & False  # inside shard_map it varies as the rows do
    shapes = jax.eval_shape(lambda: together(problem.mask))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + falsum.astype(x.dtype), shapes)
    start = problem.mask, falsum.astype(jnp.int32), falsum, nothing
    keep, _, _, result = jax.lax.while_loop(lambda state: ~state[2], attempt, start)
    return replace(result, finite=keep | ~problem.mask)
