"""vmap(grad): every example's whole gradient in memory. Slow, obviously right; what the tests compare against."""

import jax
import jax.numpy as jnp

from dpscale.clipping.example import (
    ClippedSum,
    Problem,
    clip_factors,
    group_norms,
    select_rows,
    sum_dtype,
)
from dpscale.clipping.hold import held
from dpscale.clipping.norms import square_sum
from dpscale.clipping.repair import repaired


def materialize(problem: Problem) -> ClippedSum:
    """The clipped sum by way of B x parameters values (Abadi et al. 2016, algorithm 1)."""
    return repaired(problem, _clip_and_sum)


def _clip_and_sum(problem: Problem) -> ClippedSum:
    def one(row):
        (loss, aux), grads = jax.value_and_grad(problem.loss, has_aux=True)(problem.leaves, row)
        return loss, aux, [grad.astype(sum_dtype(grad.dtype)) for grad in grads]

    losses, aux, grads = jax.vmap(one)(problem.rows)
    grads = [held(grad, problem.mask) for grad in grads]
    squares = {j: square_sum(grad, grad.ndim - 1) for j, grad in enumerate(grads)}
    norms, factors = clip_factors(problem, squares)
    by_group = group_norms(problem, squares)
    finite = jnp.isfinite(losses) & jnp.isfinite(norms)
    good = problem.mask & finite
    grads = [select_rows(good, grad) for grad in grads]
    factors = [select_rows(good, factor) for factor in factors]
    weights = [factors[group].astype(x.dtype) for group, x in zip(problem.groups, grads, strict=True)]
    sums = [jnp.tensordot(w, x, 1, precision="highest") for w, x in zip(weights, grads, strict=True)]  # as the norms
    aux = jax.tree.map(lambda x: select_rows(good, x), aux)
    losses, norms = select_rows(good, losses), select_rows(good, norms)
    by_group = None if by_group is None else jnp.where(good, by_group, 0)
    return ClippedSum(sums, norms, losses.astype(jnp.float32), finite | ~problem.mask, aux, by_group)
