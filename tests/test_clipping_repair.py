"""Rows that are not finite, where the compiler lets them reach the others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import clipped_grad
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
    """Sums rows as a compiler may: a row that holds EDGE overflows, and one that is not finite reaches all others."""
    x = jnp.where(jnp.any(problem.rows == EDGE, axis=1, keepdims=True), jnp.inf, problem.rows)
    x = jnp.where(jnp.all(jnp.isfinite(x)), x, jnp.nan)
    finite = jnp.all(jnp.isfinite(x), axis=1)
    good = finite & problem.mask
    rows = jnp.where(good[:, None], x, 0)
    norms, by_group = jnp.linalg.norm(rows, axis=1), jnp.where(good, x.T, 0)
    return ClippedSum([jnp.sum(rows, 0)], norms, rows[:, 0], finite | ~problem.mask, {"x": rows}, by_group)


EDGE = 3.0


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("bad", ["", "0", "03", "1234", "01234567", "e1", "e1 07"])
@pytest.mark.parametrize("padding", ["", "4", "14", "01234567"])
def test_rows_that_are_not_finite_are_found_whoever_they_reach(bad, count, padding):
    x, mask = np.array(jax.random.normal(jax.random.key(3), (8, 2))), np.ones(8, bool)
    x[[int(i) for i in bad.split("e1")[-1].strip()]] = np.nan
    x[1:2, :1] = EDGE if "e1" in bad else x[1:2, :1]
    mask[[int(i) for i in padding]] = False
    x, mask = x[:count], mask[:count]
    problem = Problem(lambda *_: None, [], [], jnp.asarray(x), jnp.asarray(mask), Flat(1.0), [])
    out = jax.jit(lambda rows, mask: repaired(replace(problem, rows=rows, mask=mask), mixing))(x, mask)
    finite = np.isfinite(x).all(1) & (x != EDGE).all(1)
    rows = np.where((finite & mask)[:, None], x, 0)
    np.testing.assert_array_equal(out.finite, finite | ~mask)
    np.testing.assert_allclose(out.grad_sum[0], rows.sum(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(out.aux["x"], rows)
    np.testing.assert_array_equal(out.group_norms, rows.T)
    np.testing.assert_array_equal(out.losses, rows[:, 0])
    np.testing.assert_allclose(out.norms, np.linalg.norm(rows, axis=1), rtol=1e-6)


def standardized(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def at_the_edge(p, row):
    """A gradient whose square is about the largest float32, or one that is nothing but rounding; and a convolution that
    is not looked into."""
    x, z, on = row
    edge = sum(jnp.sum(jnp.sin(leaf * x[i]) * x[i + 4]) for i, leaf in enumerate(p["edge"]))
    h = standardized(jnp.tanh(z @ p["w"])) * p["s"]
    rounding = 1e9 * jnp.sum(standardized(h * jax.nn.sigmoid(h)))
    numbers = ("NHC", "HIO", "NHC")

    def unseen():
        return jnp.sum(jax.lax.conv_general_dilated(z[None], z[:3, :, None], (1,), "SAME", dimension_numbers=numbers))

    return on * edge + (1 - on) * rounding + jax.lax.cond(on > 2, unseen, lambda: 0.0)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_a_row_at_the_edge_of_overflow_decides_about_no_other(method):
    """Where rows were examined, or summed, by a program for one row, this one moved the others' sum by 48 to 64 times
    the bound."""
    rows, width = 64, 13
    rng = np.random.default_rng(0)
    params = {
        "edge": [jnp.zeros(37), jnp.zeros((33, 5)), jnp.zeros(1), jnp.zeros(900)],
        "w": jnp.asarray(rng.standard_normal((width, width)), jnp.float32),
        "s": jnp.asarray(rng.standard_normal(width), jnp.float32),
    }
    largest = np.sqrt(float(np.finfo(np.float32).max) / 1103)
    edges = np.concatenate([np.ones((rows, 4)), largest * (1 + rng.uniform(-3e-7, 3e-7, (rows, 4)))], axis=1)
    z = np.broadcast_to(rng.standard_normal((7, width)), (rows, 7, width)).astype(np.float32)
    clipped = jax.jit(clipped_grad(at_the_edge, 1.0, method))
    everyone, others = np.ones(rows, bool), np.arange(rows) != 5
    quiet = np.where(others, 0.0, 1.0).astype(np.float32)
    without = clipped(params, (np.ones((rows, 8), np.float32), z, quiet), others)
    for edge in edges[:8].astype(np.float32):
        x = np.ones((rows, 8), np.float32)
        x[5] = edge
        moved = jax.tree.map(jnp.subtract, clipped(params, (x, z, quiet), everyone).grad_sum, without.grad_sum)
        size = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(moved)))
        assert size <= 1 + 1e-4  # of 63 other contributions, rounded
        x = np.broadcast_to(edge, (rows, 8)).copy()
        x[5] = np.nan
        outs = [clipped(params, (x, z, np.ones(rows, np.float32)), mask) for mask in (everyone, others)]
        jax.tree.map(np.testing.assert_array_equal, *[replace(out, finite=out.finite[others]) for out in outs])


@pytest.mark.parametrize("method", ["bookkeeping", "materialize"])
def test_auxiliary_keys_come_out(method):
    def loss(w, x, key):
        return in_a_loop(w, x), jax.random.split(key)

    w, x = jax.random.normal(jax.random.key(1), (3, 1, 4)), jax.random.normal(jax.random.key(2), (ROWS, 4, 2))
    keys = jax.random.split(jax.random.key(4), ROWS)
    out = jax.jit(clipped_grad(loss, 0.5, method, has_aux=True))(w, x, jnp.ones(ROWS, bool), keys)
    expected = jax.vmap(jax.random.split)(keys)
    np.testing.assert_array_equal(*[jax.random.key_data(x) for x in (out.aux, expected)])
