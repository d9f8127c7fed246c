"""Laws of the cheap simulation: the same noise-to-batch ratio, steps and rate; and the command printed is that run."""

from __future__ import annotations

import shlex

import pytest

from dpscale.config import load_config
from dpscale.errors import InputError
from dpscale.privacy.plan import PrivacyPlan
from dpscale.simulate import simulated, simulation_lines, simulation_overrides

TOML = """
[data]
train = "digits/train"
[optimizer]
learning_rate = 0.25
[training]
epochs = 5.0
[privacy]
noise_multiplier = 3.0
delta = 1e-4
sampling_rate = 0.5
"""
# As a calibrated run may be written; another way to say the batch, the length and the noise.
CALIBRATED = ["privacy.noise_multiplier=unset", "privacy.epsilon=4", "privacy.max_batch_size=900"]
CALIBRATED += ["privacy.replay_reserve=3"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def test_noise_over_batch_and_steps_are_kept_and_the_overrides_make_that_plan(path):
    config = load_config(path, CALIBRATED)
    plan = PrivacyPlan.from_config(config, num_examples=1500)
    small = simulated(plan, 60)
    assert small.noise_stddev / small.expected_batch_size == pytest.approx(
        plan.noise_stddev / plan.expected_batch_size, rel=1e-12
    )
    assert (small.steps, small.clip_norm, small.sampling_rate) == (plan.steps, plan.clip_norm, 60 / 1500)
    assert small.max_batch_size is not None
    assert 60 < small.max_batch_size < 120
    again = load_config(path, [*CALIBRATED, *simulation_overrides(config, small)])
    assert PrivacyPlan.from_config(again, num_examples=1500) == small
    assert again.optimizer == config.optimizer


def test_the_printed_command_is_complete_and_the_worse_epsilon_is_said(path):
    config = load_config(path)
    lines = list(simulation_lines(config, "batch=60", given=[str(path)]))
    (command,) = (shlex.split(line)[1:] for line in lines if line.startswith("command"))
    assert command[:3] == ["dpscale", "train", str(path)]
    assert command[-2] == "--run-dir"
    assert load_config(path, command[3:-2]).training.epochs is None
    (epsilon,) = (line.split() for line in lines if line.startswith("epsilon"))
    assert float(epsilon[1]) > 2 * PrivacyPlan.from_config(config, num_examples=1500).epsilon_after(10)
    assert any(line.startswith("warning") and "much worse epsilon" in line for line in lines)


@pytest.mark.parametrize(
    ("at", "overrides", "part"),
    [
        ("256", [], "write batch=N"),
        ("batch=many", [], "write batch=N"),
        ("batch=0", [], "write batch=N"),
        ("batch=1e6", [], "cheaper only below it"),
        ("batch=60", ["privacy.enabled=false"], "adds no noise"),
    ],
)
def test_what_cannot_be_simulated_is_refused(path, at, overrides, part):
    with pytest.raises(InputError, match=part):
        list(simulation_lines(load_config(path, overrides), at, given=[str(path)]))
