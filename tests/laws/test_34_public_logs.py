"""Laws 34 and 44 on whole runs: what is public does not follow the data, and what is sampled is what is accounted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale
from dpscale.config import RunConfig
from dpscale.sampling import PoissonSampler

FEATURES = np.random.default_rng(2).normal(size=(60, 3)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)
CONFIG = RunConfig.model_validate(
    {
        "training": {"steps": 4, "evaluate_every_steps": 1},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 30,
            "insecure_seed": 3,
            "verify": False,  # its line says seconds and draws of its own, which differ between any two runs
            "accountant": "rdp",
        },
        "performance": {"physical_batch_size": 1},
        "checkpoint": {"every_steps": 2},
        "metrics": {"sensitive": True},
    }
)


def loss(params: Any, example: Any) -> jax.Array:
    return jnp.square(jnp.vdot(params["w"], example["features"]) - example["label"])


def run(run_dir: Path, features: np.ndarray) -> tuple[dict[str, Any], Any]:
    """(all that the run shows or marks as public, the result)."""
    said: list[str] = []
    params = {"w": np.zeros(3, np.float32)}
    result = dpscale.train(
        CONFIG, run_dir, model=params, loss=loss, train_data=(features, LABELS), report=said.append, progress=False
    )
    status = json.loads((run_dir / "status.json").read_text())
    del status["updated_at"]
    public = {
        "metrics": (run_dir / "metrics" / "public.jsonl").read_bytes(),
        "plan": (run_dir / "plan.json").read_bytes(),
        "status": status,
        "said": [line.replace(str(run_dir), "RUN") for line in said],
        "epsilon": (result.epsilon, result.epsilon_planned),
    }
    return public, result


@pytest.fixture(scope="module")
def run_and_samplers(tmp_path_factory):
    train, made = importlib.import_module("dpscale.train"), []

    def sampler(*args: Any) -> PoissonSampler:
        made.append(PoissonSampler(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PoissonSampler", sampler)
        public, result = run(tmp_path_factory.mktemp("run") / "run", FEATURES)
    return public, result, made


@pytest.mark.parametrize("record", [np.nan, 1e4, 0.0], ids=["unusable", "extreme", "zero"])
def test_what_runs_on_neighbouring_data_sets_make_public_is_equal(run_and_samplers, record, tmp_path):
    public, result, (sampler,) = run_and_samplers
    index = int(sampler.indices(0)[0])  # one that the first step draws
    neighbour = FEATURES.copy()
    neighbour[index] = record
    theirs, other = run(tmp_path / "run", neighbour)
    assert (other.params["w"] != result.params["w"]).any(), "the record made no difference: nothing was tested"
    sensitive = [(path / "metrics" / "sensitive.jsonl").read_bytes() for path in (result.run_dir, other.run_dir)]
    assert sensitive[0] != sensitive[1]
    assert theirs == public


def test_the_run_samples_with_the_very_numbers_that_it_accounts(run_and_samplers):
    _, result, (sampler,) = run_and_samplers
    plan = json.loads((result.run_dir / "plan.json").read_text())
    assert sampler.sampling_rate == sampler.accounting_rate == plan["sampling_rate"]
    assert (sampler.num_examples, sampler.max_batch_size) == (plan["num_examples"], plan["max_batch_size"])
    assert sampler.expected_batch_size == plan["expected_batch_size"]
    accounted = dpscale.epsilon(
        noise_multiplier=plan["noise_multiplier"],
        sampling_rate=sampler.accounting_rate,
        steps=4,
        delta=1e-3,
        accountant="rdp",
    )
    assert result.epsilon == accounted
