"""The engine gives the sums and norms of the reference, for every kind of loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_cases import CASES, Case

from dpscale.clipping import PerGroup, clipped_grad

FAST = {
    "conv_2d_grouped_strided",
    "grouped_conv_whose_kernel_follows_the_example",
    "embedding_with_repeated_ids",
    "one_weight_used_three_times",
}
PARAMS = [pytest.param(c, id=c.name, marks=[] if c.name in FAST else [pytest.mark.slow]) for c in CASES]


def build(case: Case):
    kind = jnp.result_type(float)
    loss, params, batch = case.make(np.random.default_rng(7))
    params = jax.tree.map(lambda x: x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.key(5), rows) if case.keys else None
    return loss, params, batch, jnp.arange(rows) != 2, keys


def assert_same(out, expected, rtol):
    """float64: sums of at most some thousand terms, conditioned like the norm itself; 1e-11 is 5e4 roundings."""
    np.testing.assert_allclose(out.norms, expected.norms, rtol=rtol)
    np.testing.assert_allclose(out.losses, expected.losses, rtol=1e-5)
    np.testing.assert_array_equal(out.finite, expected.finite)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected.grad_sum))
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale), out, expected)


@pytest.mark.parametrize("case", PARAMS)
def test_engine_equals_reference_in_float64(case):
    with jax.enable_x64(True):
        loss, params, batch, mask, keys = build(case)
        make = functools.partial(clipped_grad, loss, 0.7, has_aux=case.has_aux)
        expected = jax.jit(make("materialize"))(params, batch, mask, keys)
        assert float(expected.norms.max()) > 0.7, "nothing is clipped"
        for method in ("bookkeeping", "ghost"):
            assert_same(jax.jit(make(method))(params, batch, mask, keys), expected, case.rtol)
        routes = {layer.name: layer.route for layer in make("auto").explain(params, batch, keys).layers}
        for part, route in case.routes.items():
            chosen = {name: r for name, r in routes.items() if part in name}
            assert chosen, (part, routes)
            assert route in chosen.values() if part == "" else set(chosen.values()) == {route}, (part, chosen)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("case", PARAMS)
def test_bad_rows_and_padding_leave_the_bits_of_the_others(case, method):
    loss, params, batch, mask, keys = build(case)
    clipped = jax.jit(clipped_grad(loss, 0.7, method, has_aux=case.has_aux))
    bad = jax.tree.map(
        lambda x: x.at[1].set(jnp.nan).at[2].set(jnp.inf) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch
    )
    if all(x is y for x, y in zip(jax.tree.leaves(bad), jax.tree.leaves(batch), strict=True)):
        bad, mask_bad = jax.tree.map(lambda x: x.at[2].set(1), batch), mask
        expected = clipped(params, batch, mask, keys)
    else:
        mask_bad = mask
        expected = clipped(params, batch, mask.at[1].set(False), keys)
    out = clipped(params, bad, mask_bad, keys)
    jax.tree.map(np.testing.assert_array_equal, out.grad_sum, expected.grad_sum)
    np.testing.assert_array_equal(out.norms, expected.norms)


@pytest.mark.slow
def test_groups_are_clipped_apart_by_every_method():
    with jax.enable_x64(True):
        loss, params, batch, mask, _ = build(next(c for c in CASES if c.name == "dense_with_positions"))
        bound = PerGroup({"Dense_0": 0.3, "Dense_1": {"bias": 0.01, "kernel": 5.0}})
        outs = [
            jax.jit(clipped_grad(loss, bound=bound, method=method))(params, batch, mask)
            for method in ("materialize", "bookkeeping", "ghost")
        ]
        assert_same(outs[1], outs[0], 1e-11)
        assert_same(outs[2], outs[0], 1e-11)
