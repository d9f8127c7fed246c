"""The variance of what reaches the optimizer, through the whole step, to a fraction of a percent."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from step_fixtures import KEY, OTHER_KEY, Step, flat, make_plan

COORDINATES = 2**21
DRAWS = 2 * COORDINATES
# Both tails together: a true sigma is refused once in a million seeds.
RARE = 1e-6


def constant_loss(params, example):
    """Its gradient is zero, but by arithmetic: the compiler cannot leave out the accumulation."""
    return jnp.sum(params) * example["features"][0]


def is_variance(values: np.ndarray, stddev: float) -> bool:
    """Chi-square test that `values` are draws of mean 0 and this standard deviation."""
    statistic = float(np.sum(np.square(values)) / stddev**2)
    tail = min(stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values)))
    return 2 * tail > RARE


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("accumulations", [1, 4])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_variance_is_that_of_the_plan_and_not_one_percent_off(devices, accumulations):
    sigma, clip_norm, expected = 0.8, 0.7, 16.0
    plan = make_plan(expected=expected, clip_norm=clip_norm, sigma=sigma)
    step = Step(
        devices=devices,
        physical_batch_size=1,
        plan=plan,
        params=jnp.zeros(COORDINATES),
        loss=constant_loss,
        feature_shape=(1,),
    )
    rows = step.rows([[0.0]] * (devices * accumulations))
    assert len(rows) == accumulations
    draws = [flat(step(rows, key=key)[0].opt_state).astype(np.float64) * expected for key in (KEY, OTHER_KEY)]
    values = np.concatenate(draws)
    assert len(values) == DRAWS >= 4e6
    stddev = sigma * clip_norm * (1 + 2.0**-16)
    assert is_variance(values, stddev)
    # What the usual mistakes would give: 1 % off, a noise per device, per accumulation, or divided among them.
    for factor in (0.99, 1.01):
        assert not is_variance(values, factor * stddev)
    for count in {devices, accumulations} - {1}:
        assert not is_variance(values, np.sqrt(count) * stddev)
        assert not is_variance(values, stddev / np.sqrt(count))
    # Two steps share nothing: a correlation of independent draws has standard deviation 1 / sqrt(n).
    assert abs(np.corrcoef(*draws)[0, 1]) < 5 / np.sqrt(COORDINATES)
    assert abs(values.mean()) < 5 * stddev / np.sqrt(DRAWS)
