"""Sums whose rows may reach each other by a NaN: taken again without the rows that are not finite.

Under vmap the compiler may turn a convolution's weight gradient into one dense convolution over the whole batch, and
through that one row's NaN reaches the others. The engine takes such convolutions otherwise (`batched_convolution`)
where it sees them; in a branch of a cond, or in the obvious way of `materialize`, it does not.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from dpscale.clipping.example import ClippedSum, Problem, replace_rows, sum_dtype


def repaired(problem: Problem, clipped_sum: Callable[[Problem], ClippedSum]) -> ClippedSum:
    """What `clipped_sum` gives where no row that is not finite takes part.

    Rows that must not count are replaced by a good row before anything is computed. Where a NaN appears all the same,
    the rows are examined one by one, and all is done again without those that have one. If each is finite alone (at
    the edge of overflow roundings decide), those that are not in the batch are left out, so that there is an end.
    """

    def once(keep: jax.Array) -> ClippedSum:
        return clipped_sum(replace(problem, rows=replace_rows(keep, problem.rows), mask=keep))

    def attempt(state):
        keep, _, _ = state
        result = once(keep)
        all_good = jnp.all(result.finite)
        fewer = jax.lax.cond(all_good, lambda: keep, lambda: keep & _finite_one_by_one(problem))
        fewer = jnp.where(jnp.all(fewer == keep), keep & result.finite, fewer)
        return fewer, all_good, result

    falsum = problem.mask[0] & False
    shapes = jax.eval_shape(lambda: once(problem.mask))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + falsum.astype(x.dtype), shapes)
    keep, _, result = jax.lax.while_loop(lambda state: ~state[1], attempt, (problem.mask, falsum, nothing))
    return replace(result, finite=keep | ~problem.mask)


def _finite_one_by_one(problem: Problem) -> jax.Array:
    """bool[B], decided for each row where no other row takes part."""

    def one(row):
        (loss, _), grads = jax.value_and_grad(problem.loss, has_aux=True)(problem.leaves, row)
        squares = [jnp.sum(jnp.square(x.astype(sum_dtype(x.dtype)))) for x in grads]
        return jnp.isfinite(loss) & jnp.isfinite(sum(squares))

    return jax.lax.map(one, problem.rows)
