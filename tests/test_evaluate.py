"""Held-out metrics are the plain means, for any size, physical batch and number of devices."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_fixtures import curved_loss, curved_params, mesh_of

from dpscale.data.arrays import ArraySource
from dpscale.evaluate import Evaluator
from dpscale.mesh import place_replicated


def examples(count: int) -> ArraySource:
    rng = np.random.default_rng(count)
    # Row 0, which padding repeats, is the odd one out: counted again it would move every mean.
    features = rng.standard_normal((count, 6)).astype(np.float32)
    labels = rng.standard_normal(count).astype(np.float32)
    labels[0] = 50.0
    return ArraySource(features, labels)


def metrics(params, example):
    loss = curved_loss(params, example)
    return {"loss": loss, "correct": (loss < 0.5).astype(jnp.float32)}


def plain_means(count: int) -> dict[str, float]:
    rows = examples(count).rows(np.arange(count))
    values = jax.vmap(metrics, (None, 0))(curved_params(), rows)
    return {name: float(np.mean(np.asarray(value, np.float64))) for name, value in values.items()}


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_means_are_the_plain_means_and_padding_never_counts(count, devices):
    mesh = mesh_of(devices)
    params = place_replicated(mesh, curved_params())
    means = Evaluator(mesh, metrics, examples(count), physical_batch_size=3)(params)
    # float32 sums of up to 167 parts of three rows: 170 * 2**-24.
    assert means == pytest.approx(plain_means(count), rel=1.1e-5)


def test_padding_that_gives_nan_or_infinity_never_counts():
    """Row 0 is repeated as padding; metrics of masked rows are selected away, not multiplied by zero."""
    mesh = mesh_of(8)

    def poisoned(params, example):
        return {"loss": example["label"]}

    source = ArraySource(np.zeros((9, 6), np.float32), np.array([np.inf, *range(1, 9)], np.float32))
    means = Evaluator(mesh, poisoned, source, 4)(place_replicated(mesh, curved_params()))
    assert means == {"loss": np.inf}  # once from row 0 itself; inf * 0 would have been NaN


def test_evaluating_again_gives_the_same_and_compiles_nothing(caplog):
    mesh = mesh_of(2)
    evaluator = Evaluator(mesh, metrics, examples(7), 3)
    params = place_replicated(mesh, curved_params())
    first = evaluator(params)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        again = evaluator(params)
    assert again == first
    assert [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()] == []
