"""The non-private baseline is plain training: nothing clipped, nothing noised, in the same two step functions."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_fixtures import Step, capture, curved_loss, curved_params, flat, make_plan

from dpscale.baseline import summed_grad

PLAN = make_plan(expected=8.0, enabled=False)


@lru_cache
def curved(devices: int) -> Step:
    return Step(
        devices=devices,
        physical_batch_size=3,
        plan=PLAN,
        params=curved_params(),
        loss=curved_loss,
        feature_shape=(6,),
        optimizer=capture(),
    )


def batch(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, 6)).astype(np.float32), 30 * rng.standard_normal(count).astype(np.float32)


@pytest.mark.parametrize(("devices", "count"), [pytest.param(1, 2, marks=pytest.mark.slow), (8, 29)])
def test_the_gradient_is_that_of_the_mean_loss_times_n_over_the_expected_batch(devices, count):
    step = curved(devices)
    features, labels = batch(count)

    def mean_loss(params):
        rows = {"features": jnp.asarray(features), "label": jnp.asarray(labels)}
        return jnp.mean(jax.vmap(curved_loss, (None, 0))(params, rows))

    expected = flat(jax.grad(mean_loss)(step.params)) * count / PLAN.expected_batch_size
    assert np.linalg.norm(expected) > 2 * count / PLAN.expected_batch_size  # far above what clipping at 1 would leave
    got = step.gradient(step.rows(features, labels))
    # Two float32 sums of n rows in different order: n eps of the terms' absolute sum, here below 100 times the norm.
    np.testing.assert_allclose(got, expected, rtol=0, atol=count * 2.0**-24 * 100 * np.linalg.norm(expected))


def test_there_is_no_noise_and_the_key_changes_nothing():
    step = curved(8)
    np.testing.assert_array_equal(step.gradient(), 0)
    batches = step.rows(*batch(5))
    np.testing.assert_array_equal(step.gradient(batches), step.gradient(batches, key=bytes(32)))


def test_no_norm_is_computed_and_statistics_are_those_of_the_loss():
    step = curved(8)
    features, labels = batch(7)
    _, statistics = step(step.rows(features, labels))
    rows = {"features": jnp.asarray(features), "label": jnp.asarray(labels)}
    losses = np.asarray(jax.vmap(curved_loss, (None, 0))(step.params, rows))
    assert (statistics.examples, statistics.clipped, statistics.nonfinite, statistics.norm) == (7, 0, 0, 0)
    assert statistics.loss == pytest.approx(losses.sum(), rel=1e-5)


def direction_loss(params, example):
    """A row of zeros has no direction: x / |x| and its gradient are NaN there, and 0 * NaN is NaN."""
    x = example["features"]
    return jnp.dot(jnp.tanh(x / jnp.linalg.norm(x) * params["scale"]), params["w"])


direction_sum = jax.jit(summed_grad(direction_loss))


@pytest.mark.parametrize("filler", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("count", [0, 3])
def test_padding_never_reaches_the_gradient_also_where_its_own_would_be_nan(filler, count):
    params = {"w": jnp.arange(1.0, 7.0), "scale": jnp.ones(())}
    features = batch(8)[0][:count]
    full = np.full((4, 6), filler, np.float32)
    full[:count] = features
    got = direction_sum(params, {"features": full}, np.arange(4) < count)
    rows = [flat(jax.grad(direction_loss)(params, {"features": row})) for row in features]
    # Three rows with terms of order 1.
    np.testing.assert_allclose(flat(got.grad_sum), np.sum([np.zeros(7), *rows], axis=0), rtol=0, atol=1e-5)
    assert np.all(np.isfinite(np.asarray(got.losses)))
