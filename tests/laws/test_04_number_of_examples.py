"""Law 4: the size of the data set is in the plan and nowhere else; a record that leaves changes no public number."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from step_fixtures import KEY, Step, make_plan

from dpscale import session
from dpscale.chacha import key_words
from dpscale.config import RunConfig
from dpscale.errors import InputError
from dpscale.run_directory import RunDirectory
from dpscale.step import requests_array

PUBLIC = ("sampling_rate", "expected_batch_size", "noise_multiplier", "noise_stddev", "steps", "clip_norm", "delta")


def finalize_text(step: Step) -> str:
    requests = requests_array(step.mesh, stop=False, save=False)
    sums = step.functions.zero_sums()
    return step.jitted_finalize.lower(step.new_state(), sums, requests, key_words(KEY)).as_text()


def test_with_one_record_less_a_fixed_plan_gives_the_same_numbers_and_programs():
    plan = make_plan(num_examples=64)
    fewer = dataclasses.replace(plan, num_examples=63)
    for name in PUBLIC:
        assert getattr(plan, name) == getattr(fewer, name), name
    assert plan.epsilon_after(plan.steps) == fewer.epsilon_after(plan.steps)
    assert finalize_text(Step(plan=plan)) == finalize_text(Step(plan=fewer))
    planned_again = make_plan(num_examples=63)
    assert planned_again.sampling_rate != plan.sampling_rate, "a plan made again would show the size"


class NoCheckpoints:
    def steps(self) -> list[int]:
        return []

    def newest_good(self, report, committed):
        return None


def test_a_run_never_plans_again_for_another_number_of_records(tmp_path):
    config = RunConfig.model_validate(
        {
            "training": {"epochs": 2},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 20, "insecure_seed": 1},
        }
    )
    directory = RunDirectory.at(tmp_path / "run")
    directory.prepare()

    def opened(num_examples: int, data: bytes) -> session.Briefing:
        return session.open_session(
            directory,
            config,
            num_examples,
            data,
            {},
            NoCheckpoints(),
            new_attempt=False,
            report=lambda line: None,
        )[0]

    opened(100, b"data")
    written = directory.plan.read_bytes()
    with pytest.raises(InputError, match="training data differ"):
        opened(99, b"data without one record")
    with pytest.raises(InputError, match="num_examples: 100 -> 99"):
        opened(99, b"data")
    assert directory.plan.read_bytes() == written
    assert np.isclose(opened(100, b"data").plan.sampling_rate, 0.2)
