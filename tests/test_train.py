"""Whole runs in this process, on eight virtual devices: what a user gets, and what may and may not depend on what."""

from __future__ import annotations

import dataclasses
import importlib
import json
import stat
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import dpscale
from dpscale.config import RunConfig
from dpscale.loop import training_steps
from dpscale.metrics.streams import PUBLIC_KEYS

GENERATOR = np.random.default_rng(5)
FEATURES = GENERATOR.normal(size=(120, 6)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)
HELD_OUT = (FEATURES[:30], LABELS[:30])


def config(**sections: dict[str, Any]) -> RunConfig:
    values = {
        "data": {"num_classes": 2, "validation_is": "public"},
        "model": {"name": "mlp", "widths": [4]},
        "optimizer": {"learning_rate": 0.5},
        "training": {"steps": 4, "evaluate_every_steps": 2},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 40,
            "insecure_seed": 7,
            "verify": False,  # test_verify.py
        },
        "performance": {"physical_batch_size": 4},
        "checkpoint": {"every_steps": 2},
    }
    for section, given in sections.items():
        values[section] = values.get(section, {}) | given
    return RunConfig.model_validate(values)


def run(run_dir: Path, *, features=FEATURES, labels=LABELS, report=lambda line: None, **sections):
    return dpscale.train(
        config(**sections),
        run_dir,
        train_data=(features, labels),
        validation_data=HELD_OUT,
        report=report,
        progress=False,
    )


def public(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics" / "public.jsonl").read_text().splitlines()]


def sensitive(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics" / "sensitive.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain") / "run"
    return run(directory)


def test_a_run_ends_with_what_its_user_needs(plain):
    assert (plain.state, plain.step, plain.steps) == ("finished", 4, 4)
    assert set(plain.validation) == {"loss", "accuracy"}
    assert plain.epsilon == plain.epsilon_planned > 0
    assert all(path.exists() for path in (plain.checkpoint, plain.metrics, plain.plot, plain.run_dir / "finished"))


def test_epsilon_is_that_of_the_steps_that_ran(plain):
    expected = dpscale.epsilon(noise_multiplier=1.0, sampling_rate=40 / 120, steps=4, delta=1e-3)
    assert plain.epsilon == pytest.approx(expected, rel=1e-12)
    assert [record["step"] for record in public(plain.run_dir)] == [2, 4]
    assert public(plain.run_dir)[-1]["epsilon"] == pytest.approx(expected, rel=1e-12)


def test_the_public_stream_holds_only_names_on_the_whitelist(plain):
    assert {key for record in public(plain.run_dir) for key in record} <= set(PUBLIC_KEYS)
    assert not (plain.run_dir / "metrics" / "sensitive.jsonl").exists()


def test_the_run_directory_is_its_owners_alone(plain):
    assert stat.S_IMODE(plain.run_dir.stat().st_mode) == 0o700


@pytest.mark.slow
@pytest.mark.parametrize(
    "performance",
    [
        {"physical_batch_size": 1},
        {"physical_batch_size": 64},
        {"physical_batch_size": 4, "clipping_method": "materialize"},
        {"physical_batch_size": 4, "clipping_method": "ghost"},
        {"physical_batch_size": 2, "update_sharding": "sharded"},
        {"physical_batch_size": 2, "reduce_every_accumulation": True},
    ],
    ids=str,
)
def test_nothing_under_performance_changes_the_result(performance, plain, tmp_path):
    other = run(tmp_path / "run", performance=performance)
    # Sums of 40 float32 terms in another order, over 4 steps: some 1e-6 relative to entries of order 1.
    for mine, theirs in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5)
    assert other.epsilon == plain.epsilon


@pytest.mark.slow
def test_the_normalized_bound_is_part_of_the_plan_and_scales_short_gradients_up(plain, tmp_path):
    result = run(tmp_path / "run", privacy={"bound": "normalized"})
    assert result.epsilon == plain.epsilon
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["bound"] == "normalized"
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(result.params), strict=True)
    )
    with pytest.raises(dpscale.InputError, match="bound: normalized -> flat"):
        run(tmp_path / "run")


@pytest.mark.slow
def test_one_group_for_all_is_the_flat_bound_and_more_are_in_the_plan(plain, tmp_path):
    one = run(tmp_path / "one", privacy={"bound": "per_group", "clip_groups": {"*": 1.0}})
    for mine, theirs in zip(jax.tree.leaves(one.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    plan = json.loads((one.run_dir / "plan.json").read_text())
    assert (plan["bound"], plan["clip_groups"], plan["clip_norm"]) == ("per_group", [["*", 1.0]], 1.0)


@pytest.mark.slow
def test_the_average_is_evaluated_and_handed_out_only_by_choice(plain, tmp_path):
    """An average that forgets at once is the parameters; a slow one is not; neither moves the parameters."""
    fast = run(tmp_path / "fast", training={"ema_decay": 1e-9, "evaluate_ema": True})
    slow = run(tmp_path / "slow", training={"ema_decay": 0.5, "evaluate_ema": True})
    unused = run(tmp_path / "unused", training={"ema_decay": 0.5})
    for mine, theirs in zip(jax.tree.leaves(unused.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    for mine, other, theirs in zip(*(jax.tree.leaves(r.params) for r in (fast, slow, plain)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
        assert np.max(np.abs(other - theirs)) > 1e-3
    assert fast.validation["loss"] == pytest.approx(plain.validation["loss"], rel=1e-4)
    assert slow.validation["loss"] != pytest.approx(plain.validation["loss"], rel=1e-4)


@pytest.mark.slow
def test_data_on_the_device_gives_the_same_run(plain, tmp_path):
    other = run(tmp_path / "run", data={"residence": "device"})
    for mine, theirs in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def accumulations_of_each_step(monkeypatch) -> list[int]:
    """Filled while runs go on: how often `accumulate` was called before each `finalize`."""
    counts, real = [], training_steps

    def counted(functions, *rest):
        calls = 0

        def accumulate(*args):
            nonlocal calls
            calls += 1
            return functions.accumulate(*args)

        def finalize(*args):
            nonlocal calls
            counts.append(calls)
            calls = 0
            return functions.finalize(*args)

        return real(dataclasses.replace(functions, accumulate=accumulate, finalize=finalize), *rest)

    monkeypatch.setattr(importlib.import_module("dpscale.train"), "training_steps", counted)
    return counts


@pytest.mark.slow
def test_in_constant_time_every_step_takes_as_many_accumulations_and_the_result_is_the_same(tmp_path, monkeypatch):
    counts = accumulations_of_each_step(monkeypatch)
    privacy = {"max_batch_size": 56}
    kwargs = {"training": {"steps": 8}, "performance": {"physical_batch_size": 1}}
    free = run(tmp_path / "free", privacy=privacy, **kwargs)
    followed_the_draw = counts[:]
    counts.clear()
    constant = run(tmp_path / "constant", privacy={**privacy, "constant_time": True}, **kwargs)
    assert len(set(followed_the_draw)) > 1
    assert counts == [7] * 8
    assert max(followed_the_draw) <= 7
    for mine, theirs in zip(jax.tree.leaves(free.params), jax.tree.leaves(constant.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_public_logs_of_runs_on_neighbouring_data_sets_have_the_same_form(plain, tmp_path):
    """Values of held-out metrics come from noised parameters; all else must be equal to the last digit."""
    neighbour = FEATURES.copy()
    neighbour[17] = 1e3
    run(tmp_path / "run", features=neighbour)
    mine, theirs = public(plain.run_dir), public(tmp_path / "run")
    assert [list(record) for record in mine] == [list(record) for record in theirs]
    for key in ("step", "epsilon", "delta", "learning_rate", "attempt", "validation_examples"):
        assert [record[key] for record in mine] == [record[key] for record in theirs]


@pytest.mark.slow
def test_an_example_with_nan_contributes_nothing_and_is_counted_in_the_sensitive_stream(tmp_path):
    broken, absent = FEATURES.copy(), FEATURES.copy()
    broken[::3] = np.nan
    result = run(tmp_path / "nan", features=broken, metrics={"sensitive": True})
    records = sensitive(tmp_path / "nan")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 < record["nonfinite_examples"] < record["batch_size"] for record in records)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    assert stat.S_IMODE((tmp_path / "nan" / "metrics" / "sensitive.jsonl").stat().st_mode) == 0o600
    # Another kind of badness in the same rows: the same bits.
    absent[::3] = np.inf
    other = run(tmp_path / "inf", features=absent)
    for mine, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_norms_of_modules_go_to_the_sensitive_stream_alone(plain, tmp_path):
    result = run(tmp_path / "run", metrics={"sensitive": True, "group_norms": True})
    for record in sensitive(tmp_path / "run"):
        names = [key for key in record if "/" in key]
        assert names == ["mean_norm/Dense_0", "mean_norm/Dense_1"]
        # A mean of norms is at most the norm of the parts' means, and at least each of them.
        parts = [record[name] for name in names]
        assert 0 < max(parts) <= record["mean_norm"] <= np.sum(parts)
    assert [set(record) for record in public(tmp_path / "run")] == [set(record) for record in public(plain.run_dir)]
    for mine, theirs in zip(jax.tree.leaves(result.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_norms_of_clip_groups_come_with_the_share_that_each_of_them_cut(tmp_path):
    groups = {"bound": "per_group", "clip_groups": {"*/bias": 1e-6, "*": 1e6}}
    run(tmp_path / "run", privacy=groups, metrics={"sensitive": True, "group_norms": True}, training={"steps": 1})
    (record,) = sensitive(tmp_path / "run")
    assert record["clip_fraction/*/bias"] == 1
    assert record["clip_fraction/*"] == 0
    assert record["mean_norm/*/bias"] > 0


@pytest.mark.slow
def test_private_held_out_metrics_stay_sensitive(tmp_path):
    run(tmp_path / "run", data={"validation_is": "private"}, metrics={"sensitive": True})
    assert not any(key.startswith("validation") for record in public(tmp_path / "run") for key in record)
    assert any("validation_accuracy" in record for record in sensitive(tmp_path / "run"))


@pytest.mark.slow
def test_without_privacy_the_same_loop_runs_without_clip_noise_and_epsilon(tmp_path):
    result = run(tmp_path / "run", privacy={"enabled": False}, training={"steps": 20})
    assert (result.epsilon, result.delta) == (None, None)
    assert result.validation["accuracy"] > 0.8
    assert all("epsilon" not in record for record in public(tmp_path / "run"))


@pytest.mark.slow
def test_tensorboard_gets_the_public_stream(tmp_path):
    run(tmp_path / "run", metrics={"tensorboard": True})
    assert list((tmp_path / "run" / "metrics" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_stop_file_saves_and_leaves_and_the_run_goes_on_to_the_same_end(plain, tmp_path):
    """A STOP file made during the run ends it on a step boundary; the sensitive stream sees every step once."""
    directory = tmp_path / "run"

    class StopAtFirstEvaluation(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    settings = config(training={"steps": 30, "evaluate_every_steps": 1}, metrics={"sensitive": True})
    arguments = {"model": StopAtFirstEvaluation(), "train_data": (FEATURES, LABELS), "progress": False}
    lines: list[str] = []

    class StoppingSource:
        """The held-out data, whose third reading asks for a stop."""

        def __init__(self):
            self.source, self.readings = dpscale_source(HELD_OUT), 0
            self.metadata = self.source.metadata

        def __len__(self):
            return len(self.source)

        def rows(self, indices):
            self.readings += 1
            if self.readings == 3:
                (directory / "STOP").touch()
            return self.source.rows(indices)

        def fingerprint_parts(self):
            return self.source.fingerprint_parts()

    stopped = dpscale.train(settings, directory, validation_data=StoppingSource(), report=lines.append, **arguments)
    assert (stopped.state, stopped.wants_requeue) == ("stopped", False)
    assert 3 <= stopped.step < 30
    assert stopped.epsilon < stopped.epsilon_planned
    finished = dpscale.train(settings, directory, validation_data=HELD_OUT, report=lines.append, **arguments)
    assert finished.state == "finished"
    assert f"resumed from the checkpoint of step {stopped.step}" in lines
    assert [record["step"] for record in sensitive(directory)] == list(range(1, 31))
    straight = dpscale.train(
        settings, tmp_path / "straight", validation_data=HELD_OUT, report=lines.append, **arguments
    )
    for mine, theirs in zip(jax.tree.leaves(finished.params), jax.tree.leaves(straight.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert public(directory) == public(tmp_path / "straight")


def dpscale_source(data):
    from dpscale.data.open import as_source

    return as_source(data, num_classes=2)


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(x))


def test_a_model_with_batch_norm_is_refused_with_the_name_of_the_remedy(tmp_path):
    with pytest.raises(dpscale.InputError, match="GroupNorm"):
        dpscale.train(config(), tmp_path / "run", model=WithBatchNorm(), train_data=(FEATURES, LABELS))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"train_data": (FEATURES, LABELS[:-1])}, "120"),
        ({"train_data": (FEATURES[:0], LABELS[:0])}, "empty"),
        ({"train_data": (FEATURES, LABELS + 5)}, "classes"),
        ({"train_data": 3}, "not a data set"),
        ({}, "data.train is not set"),
        (
            {"train_data": (FEATURES, LABELS), "validation_data": (FEATURES.copy(), LABELS.copy())},
            "the held-out examples are the training examples",
        ),
        ({"train_data": (FEATURES, LABELS), "settings": {"privacy": {"clip_norm": 1e-30}}}, "clip_norm=1e-30"),
        (
            {
                "train_data": (FEATURES, LABELS),
                "settings": {"training": {"steps": None, "epochs": 1}, "optimizer": {"warmup_steps": 3}},
            },
            "warmup_steps=3 is not below the run's 3 steps",
        ),
        ({"train_data": (FEATURES, LABELS), "model": {"w": np.zeros(3)}}, "loss must be given"),
        ({"train_data": (FEATURES, LABELS), "model": {"w": np.zeros(3)}, "loss": lambda p: 0.0}, "loss takes 1"),
    ],
)
def test_bad_input_from_python_is_refused_before_anything_is_written(arguments, part, tmp_path):
    settings = config(**arguments.get("settings", {}))
    given = {name: value for name, value in arguments.items() if name != "settings"}
    with pytest.raises(dpscale.InputError, match=part):
        dpscale.train(settings, tmp_path / "run", **given)
    assert not (tmp_path / "run" / "ledger.jsonl").exists() or not (tmp_path / "run" / "ckpt" / "1").exists()


def test_the_public_names_are_importable_and_the_function_stays_a_function():
    import dpscale.train as module_or_function

    assert module_or_function is dpscale.train
    assert callable(dpscale.train)
    for name in dpscale.__all__:
        assert getattr(dpscale, name) is not None
    with pytest.raises(AttributeError):
        dpscale.trian  # noqa: B018
