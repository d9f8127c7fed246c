"""Rows that are not finite, where the compiler lets them reach the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import ROUNDING_SLACK, clipped_grad

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


def test_materialize_ends_where_rows_are_finite_alone_and_not_in_the_batch():
    """Squared norms at the edge of float32: how a sum is rounded decides. Such a row was examined for ever."""

    def loss(p, x):
        return sum(jnp.sum(leaf * x[i]) for i, leaf in enumerate(p))

    params = [jnp.zeros(7), jnp.zeros((3, 5)), jnp.zeros(1), jnp.zeros(9)]
    spread = 1 + np.random.default_rng(0).uniform(-2e-7, 2e-7, (256, 4))
    x = np.asarray(np.sqrt(float(np.finfo(np.float32).max) / 32) * spread, np.float32)
    clipped = jax.jit(clipped_grad(loss, 1.0, "materialize"))
    out = clipped(params, x, jnp.ones(256, bool))
    assert 0 < int(jnp.sum(out.finite)) < 256
    total = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in out.grad_sum))
    assert 0.5 * int(jnp.sum(out.finite)) < total <= int(jnp.sum(out.finite)) * (1 + ROUNDING_SLACK)
