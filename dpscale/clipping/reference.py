"""vmap(grad): every example's whole gradient in memory. Slow, obviously right; what the tests compare against."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from dpscale.clipping.example import (
    ClippedSum,
    Problem,
    clip_factors,
    group_norms,
    replace_rows,
    select_rows,
    sum_dtype,
)
from dpscale.clipping.hold import held


def materialize(problem: Problem) -> ClippedSum:
    """The clipped sum by way of B x parameters values (Abadi et al. 2016, algorithm 1).

    Under vmap the compiler may turn a convolution's weight gradient into one dense convolution over the whole batch,
    through which one row's NaN reaches the others. So rows that must not count are replaced by a good row before
    anything is computed; where a NaN appears all the same, the rows are examined one by one and all is done again.
    """

    def attempt(state):
        keep, _, _ = state
        result = _clip_and_sum(problem, keep)
        all_good = jnp.all(result.finite)
        keep = jax.lax.cond(all_good, lambda: keep, lambda: keep & _finite_one_by_one(problem))
        return keep, all_good, result

    falsum = problem.mask[0] & False
    shapes = jax.eval_shape(lambda: _clip_and_sum(problem, problem.mask))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + falsum.astype(x.dtype), shapes)
    keep, _, result = jax.lax.while_loop(lambda state: ~state[1], attempt, (problem.mask, falsum, nothing))
    return replace(result, finite=keep | ~problem.mask)


def _loss_and_grads(problem: Problem, row):
    (loss, aux), grads = jax.value_and_grad(problem.loss, has_aux=True)(problem.leaves, row)
    return loss, aux, [grad.astype(sum_dtype(grad.dtype)) for grad in grads]


def _squares(grads: list[jax.Array], first_axis: int) -> list[jax.Array]:
    return [jnp.sum(jnp.square(grad), axis=tuple(range(first_axis, grad.ndim))) for grad in grads]


def _clip_and_sum(problem: Problem, keep: jax.Array) -> ClippedSum:
    rows = replace_rows(keep, problem.rows)
    losses, aux, grads = jax.vmap(lambda row: _loss_and_grads(problem, row))(rows)
    grads = [held(grad, keep) for grad in grads]
    squares = dict(enumerate(_squares(grads, 1)))
    norms, factors = clip_factors(problem, squares)
    by_group = group_norms(problem, squares)
    finite = jnp.isfinite(losses) & jnp.isfinite(norms)
    good = keep & finite
    grads = [select_rows(good, grad) for grad in grads]
    factors = [select_rows(good, factor) for factor in factors]
    sums = [jnp.tensordot(factors[g].astype(x.dtype), x, 1) for g, x in zip(problem.groups, grads, strict=True)]
    aux = jax.tree.map(lambda x: select_rows(good, x), aux)
    losses, norms = select_rows(good, losses), select_rows(good, norms)
    by_group = None if by_group is None else jnp.where(good, by_group, 0)
    return ClippedSum(sums, norms, losses.astype(jnp.float32), finite | ~keep, aux, by_group)


def _finite_one_by_one(problem: Problem) -> jax.Array:
    """bool[B], decided for each row where no other row takes part."""

    def one(row):
        loss, _, grads = _loss_and_grads(problem, row)
        return jnp.isfinite(loss) & jnp.isfinite(sum(_squares(grads, 0)))

    return jax.lax.map(one, problem.rows)
