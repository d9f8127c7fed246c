"""Rows that are not finite, where the compiler lets them reach the others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import ROUNDING_SLACK, clipped_grad
from dpscale.clipping.bounds import Flat
from dpscale.clipping.example import ClippedSum, Problem
from dpscale.clipping.repair import repaired

ROWS = 4


def conv(w, x):
    numbers = ("NHC", "HIO", "NHC")
    return jax.lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=2)


def in_a_solve(w, x):
    """The gradient of a solution is another one: of a convolution, inside of an operation that is not looked into."""

    def solve(_, b):
        return jax.vjp(lambda v: conv(v, x), b)[1](conv(b, x))[0]

    return jnp.sum(jnp.sin(jax.lax.custom_linear_solve(lambda u: u, w, solve=solve, symmetric=True)))


def in_a_loop(w, x):
    """Steps on the weights inside of the loss; how many depends on the example."""

    def step(carry):
        count, v = carry
        return count + 1, v - 0.1 * jax.vjp(lambda v: jnp.sin(conv(v, x)), v)[1](conv(v, x))[0]

    _, v = jax.lax.while_loop(lambda carry: carry[0] < 1 + (x[0, 0] > 0), step, (0, jax.lax.stop_gradient(w)))
    return jnp.sum(jnp.sin(conv(w, x)) * jnp.cos(conv(v, x)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
@pytest.mark.parametrize("loss", [in_a_solve, in_a_loop])
def test_no_row_reaches_the_others_by_a_convolution_that_is_not_looked_into(loss, method, bad):
    w, x = jax.random.normal(jax.random.key(1), (3, 1, 4)), jax.random.normal(jax.random.key(2), (ROWS, 4, 2))
    clipped = jax.jit(clipped_grad(loss, 0.5, method))
    with_it, without = jnp.ones(ROWS, bool), jnp.arange(ROWS) != 2
    expected, spoilt = clipped(w, x, without), x.at[2].set(bad)
    assert float(jnp.max(jnp.abs(expected.grad_sum))) > 0
    for mask, finite in ((without, [True] * ROWS), (with_it, without)):
        out = clipped(w, spoilt, mask)
        np.testing.assert_array_equal(out.grad_sum, expected.grad_sum)
        np.testing.assert_array_equal(out.norms, expected.norms)
        np.testing.assert_array_equal(out.finite, finite)


def mixing(problem):
    """Sums rows as a compiler may: in a batch of several, the row that holds EDGE overflows and reaches all others."""
    x = problem.rows
    x = jnp.where((len(x) > 1) & jnp.any(x == EDGE), jnp.nan, x)
    finite = jnp.all(jnp.isfinite(x), axis=1)
    good = finite & problem.mask
    rows = jnp.where(good[:, None], x, 0)
    norms, by_group = jnp.linalg.norm(rows, axis=1), jnp.where(good, x.T, 0)
    return ClippedSum([jnp.sum(rows, 0)], norms, rows[:, 0], finite | ~problem.mask, {"x": rows}, by_group)


EDGE = 3.0


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
@pytest.mark.parametrize("bad", [[], [0], [0, 3], [1, 2, 3, 4]])
@pytest.mark.parametrize("padding", [[], [4], [1, 4]])
def test_whether_a_row_counts_does_not_depend_on_the_others(bad, padding, jit):
    """Left out with one row, or counted without it, the others could move the sum by their number times the bound."""
    x, mask = np.array(jax.random.normal(jax.random.key(3), (5, 2))), np.ones(5, bool)
    x[1, 0], mask[padding] = EDGE, False
    x[bad] = np.nan
    finite = np.isfinite(x).all(1)
    problem = Problem(lambda *_: None, [], [], jnp.asarray(x), jnp.asarray(mask), Flat(1.0), [])
    out = jit(lambda rows, mask: repaired(replace(problem, rows=rows, mask=mask), mixing))(x, mask)
    rows = np.where((finite & mask)[:, None], x, 0)
    np.testing.assert_array_equal(out.finite, finite | ~mask)
    np.testing.assert_allclose(out.grad_sum[0], rows.sum(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(out.aux["x"], rows)
    np.testing.assert_array_equal(out.group_norms, rows.T)
    np.testing.assert_array_equal(out.losses, rows[:, 0])
    np.testing.assert_allclose(out.norms, np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_rows_at_the_edge_of_overflow_are_taken_one_by_one():
    """Squared norms at the edge of float32, where how a sum is rounded decides: differently in a batch than alone."""

    def loss(p, x):
        return sum(jnp.sum(leaf * x[i]) for i, leaf in enumerate(p))

    params = [jnp.zeros(7), jnp.zeros((3, 5)), jnp.zeros(1), jnp.zeros(9)]
    spread = 1 + np.random.default_rng(0).uniform(-2e-7, 2e-7, (256, 4))
    x = np.asarray(np.sqrt(float(np.finfo(np.float32).max) / 32) * spread, np.float32)
    clipped = jax.jit(clipped_grad(loss, 1.0, "materialize"))
    out = clipped(params, x, jnp.ones(256, bool))
    counted = int(jnp.sum(out.finite))
    assert 0 < counted < 256
    total = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in out.grad_sum))
    assert 0.99 * counted < total <= counted * (1 + ROUNDING_SLACK)
    fewer = clipped(params, x, jnp.arange(256) > 0)
    np.testing.assert_array_equal(fewer.finite[1:], out.finite[1:])
