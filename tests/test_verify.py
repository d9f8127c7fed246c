"""Laws of the verification: correct steps pass, every planted bug is named, and a run stops before it is charged."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from step_fixtures import make_plan, mesh_of

import dpscale
import dpscale.gradients
import dpscale.shard_update
import dpscale.step
from dpscale.batching import BatchLayout
from dpscale.clipping import Flat, clipped_grad
from dpscale.config import RunConfig
from dpscale.data.source import SourceMetadata
from dpscale.errors import InputError, VerificationError
from dpscale.feed import blank_rows
from dpscale.gradients import build_finalize_for, compiled_steps, make_placement
from dpscale.loop import StepKeys
from dpscale.mesh import DATA_AXIS
from dpscale.noise import add_gaussian_noise
from dpscale.placement import Placement, cut, join
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.run_record import read_run
from dpscale.state import Statistics
from dpscale.step import StepFunctions, build_accumulate, requests_array
from dpscale.task import Task
from dpscale.verify import AFTER_RESTART, AT_START, Extent, MadeUp, Verdict, verify_steps
from dpscale.verify.bench import Bench, reference_gradient
from dpscale.verify.laws import Laws
from dpscale.verify.noise_laws import NoiseSample, check_noise
from dpscale.verify.sum_laws import check_sums

ROOT = Path(__file__).resolve().parent.parent
QUICK = Extent(2**16, 60, False)
SHAPES = {"a": (20, 40), "b": (40,), "c": (40, 10)}
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape) / 4, jnp.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}
VARIANCE = "the noise has the plan's variance on every parameter"
PLANTED = "the release less the known noise is the sum of all devices over the public batch size"


def network_loss(params, example):
    hidden = jnp.tanh(example["features"] @ params["a"] + params["b"])
    return jnp.sum(jnp.square(hidden @ params["c"] - example["label"]))


class Shapes:
    """A source that has no rows: verification must not ask for one."""

    metadata = SourceMetadata("shapes", (20,), np.dtype(np.float32), "value")

    def __len__(self):
        return 64

    def rows(self, indices):
        raise AssertionError("an example was read")


PLAN = make_plan(expected=8.0, clip_norm=0.7, sigma=0.8)
SOURCE = Shapes()


@dataclass(frozen=True)
class Parts:
    """What a run hands to its verification."""

    config: RunConfig
    plan: PrivacyPlan
    task: Task
    placement: Placement
    functions: StepFunctions
    made_up: MadeUp

    def verify(self, extent: Extent) -> Verdict:
        return verify_steps(self.config, self.plan, self.task, self.placement, self.functions, self.made_up, extent)


@lru_cache
def parts(devices: int = 2, plan: PrivacyPlan = PLAN, **performance) -> Parts:
    """Compiled as a run compiles them, without a bug."""
    config = RunConfig.model_validate(
        {
            "optimizer": {"name": "adam", "learning_rate": 0.1},
            "training": {"steps": 100},
            "privacy": {"noise_multiplier": 0.8, "delta": 1e-5, "expected_batch_size": 8},
            "performance": {"physical_batch_size": 3} | performance,
        }
    )
    mesh, task = mesh_of(devices), Task(PARAMS, network_loss, False, lambda params, example: {})
    size = config.performance.physical_batch_size
    assert isinstance(size, int)
    placement, layout = make_placement(config, plan, mesh, PARAMS), BatchLayout(size, devices)
    rows, state = blank_rows(mesh, SOURCE, layout, config.data), placement.abstract(PARAMS)
    functions = compiled_steps(config, plan, task, placement, state, {}, rows)
    made_up = MadeUp(mesh, layout, SOURCE.metadata, len(SOURCE), resident=False)
    return Parts(config, plan, task, placement, functions, made_up)


@pytest.mark.parametrize(
    ("devices", "performance"),
    [
        (8, {}),
        pytest.param(2, {"reduce_every_accumulation": True}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"update_sharding": "sharded", "clipping_method": "ghost", "physical_batch_size": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_correct_step_passes_every_law(devices, performance):
    verdict = parts(devices, **performance).verify(Extent(2**16, 60, True))
    assert {*SUM_LAWS, VARIANCE, PLANTED, "the noise is Gaussian"} < set(verdict.laws)
    assert verdict.stddev_seen == pytest.approx(verdict.stddev, rel=0.02)
    assert 0.99 < verdict.largest <= 1 + 2.0**-16
    assert verdict.line().startswith(f"verified: {len(verdict.laws)} laws on {devices} devices in ")


# The laws of the sum


SUM_LAWS = [
    "padding adds nothing",
    "every row is counted once",
    "what padding holds changes no bit",
    "a row that is not finite adds nothing and changes no bit",
    "a device's sum is the planted gradient, clipped",
    "every device makes the same sum of the same rows",
    "one row moves the sum by at most the clip norm",
    "a row above the clip norm is cut to it",
    "a row adds the same in any company",
]


def laws_of_sum(summed=None, plan: PrivacyPlan = PLAN) -> Laws:
    """The laws of the sum alone, checked on two devices; `summed` in place of the true clipped sum."""
    own, secret = parts(), RootSecret.from_insecure_seed(3)
    if summed is None and plan != PLAN:
        summed = dpscale.gradients.gradient_sum(own.config, plan, own.task)
    functions = own.functions
    if summed is not None:
        accumulate = build_accumulate(own.placement.mesh, summed, plan.clip_norm or 0.0, False)
        functions = replace(functions, accumulate=accumulate)
    keys, laws = StepKeys(secret, 0), Laws()
    bench = Bench(own.config, plan, own.task, own.placement, functions, own.made_up, keys)
    check_sums(bench, laws, reference())
    return laws


@lru_cache
def reference():
    return reference_gradient(parts().task, StepKeys(RootSecret.from_insecure_seed(3), 0))


def test_the_true_sum_keeps_all_laws():
    laws = laws_of_sum()
    assert sorted(laws.names) == sorted(SUM_LAWS)
    assert laws.failures == []


@pytest.mark.parametrize(
    "change",
    [
        {"bound": "normalized"},
        {"bound": "per_group", "clip_groups": (("a", 0.3), ("*", 0.4)), "clip_norm": 0.5},
        {"clip_norm": 1e6},
    ],
    ids=["normalized", "per group", "a norm that no row exceeds"],
)
def test_the_laws_of_the_sum_know_every_bound(change):
    assert laws_of_sum(plan=replace(PLAN, **change)).failures == []


def true_sum(params, batch, mask, clip_norm=0.7):
    return clipped_grad(network_loss, bound=Flat(clip_norm))(params, batch, mask)


def padding_counted(params, batch, mask, keys=None):
    return true_sum(params, batch, jnp.ones_like(mask))


def noise_in_every_accumulation(params, batch, mask, keys=None):
    out = true_sum(params, batch, mask)
    return replace(out, grad_sum=jax.tree.map(lambda x: x + 0.1, out.grad_sum))


def mean_over_the_batch(params, batch, mask, keys=None):
    out = true_sum(params, batch, mask)
    return replace(out, grad_sum=jax.tree.map(lambda x: x / jnp.maximum(mask.sum(), 1), out.grad_sum))


def no_clip(params, batch, mask, keys=None):
    return true_sum(params, batch, mask, float("inf"))


def clip_one_percent_too_high(params, batch, mask, keys=None):
    return true_sum(params, batch, mask, 0.707)


def clip_leaf_by_leaf(params, batch, mask, keys=None):
    def one(row, on):
        grads = jax.grad(network_loss)(params, row)
        return jax.tree.map(lambda g: jnp.where(on, g * jnp.minimum(1, 0.7 / jnp.linalg.norm(g)), 0), grads)

    out = true_sum(params, batch, mask)
    return replace(out, grad_sum=jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(batch, mask & out.finite)))


def masked_by_multiplication(params, batch, mask, keys=None):
    out = true_sum(params, batch, mask)
    grads = jax.vmap(jax.grad(network_loss), (None, 0))(params, batch)
    return replace(out, grad_sum=jax.tree.map(lambda g: jnp.tensordot(mask.astype(g.dtype), g, 1), grads))


def another_gradient(params, batch, mask, keys=None):
    out = true_sum(params, batch, mask)
    return replace(out, grad_sum={**out.grad_sum, "b": -out.grad_sum["b"]})


def broken_rows_kept(params, batch, mask, keys=None):
    features = jnp.where(jnp.isfinite(batch["features"]), batch["features"], 0.0)
    label = jnp.where(jnp.isfinite(batch["label"]), batch["label"], 0.0)
    return true_sum(params, {"features": features, "label": label}, mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("summed", "law"),
    [
        (padding_counted, "what padding holds changes no bit|padding adds nothing"),
        (noise_in_every_accumulation, "padding adds nothing"),
        (mean_over_the_batch, "a row adds the same in any company"),
        (no_clip, "one row moves the sum by at most the clip norm"),
        (clip_one_percent_too_high, "one row moves the sum by at most the clip norm"),
        (clip_leaf_by_leaf, "one row moves the sum by at most the clip norm"),
        (masked_by_multiplication, "padding adds nothing"),
        (another_gradient, "a device's sum is the planted gradient, clipped"),
        (broken_rows_kept, "a row that is not finite adds nothing and changes no bit"),
    ],
)
def test_a_bug_in_the_sum_is_named(summed, law):
    failures = laws_of_sum(summed).failures
    assert any(re.match(law, text) for text in failures), failures


# Planted bugs of the release


def plant_update(monkeypatch, **stages):
    """A whole update, stage by stage, each of which a bug may replace."""

    def update(mesh, plan, optimizer, state, sums, requests, noise_key, *, reduced):
        stage = {"own": lambda x, key: x, "reduce": lambda x: jax.lax.psum(x, DATA_AXIS), "after": lambda x, key: x}
        stage |= {"noise": add_gaussian_noise, "divide": lambda x, statistics: x / plan.expected_batch_size} | stages

        def reduce_once(sums, requests, key):
            own = stage["own"](join(sums.gradient), key)
            total = stage["after"](stage["reduce"](own), key)
            return total, jax.lax.psum(join((sums.statistics, requests)), DATA_AXIS)

        total, statistics = jax.shard_map(
            reduce_once, mesh=mesh, in_specs=(P(DATA_AXIS), P(DATA_AXIS), P()), out_specs=P(), check_vma=False
        )(sums, requests, noise_key)
        noisy = stage["noise"](total, noise_key, jnp.float32(plan.noise_stddev))
        gradient = cut(stage["divide"](noisy, Statistics(*statistics)), state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, statistics

    monkeypatch.setattr(dpscale.step, "_whole_update", update)


STD = 0.8 * 0.7


def no_noise_here(flat, key, std):
    return flat


def noise_on_each_device(own, key):
    return add_gaussian_noise(own, key, jnp.float32(STD))


def other_noise_on_device_1(total, key):
    mine = jnp.where(jax.lax.axis_index(DATA_AXIS) == 1, key + 1, key)
    return add_gaussian_noise(total, mine, jnp.float32(STD))


def device_1_left_out(own):
    return jax.lax.psum(jnp.where(jax.lax.axis_index(DATA_AXIS) == 1, 0.0, own), DATA_AXIS)


def mean_for_sum(own):
    return jax.lax.pmean(own, DATA_AXIS)


def scaled(factor):
    return lambda flat, key, std: add_gaussian_noise(flat, key, std * jnp.float32(factor))


def none_on_the_bias(flat, key, std):
    noisy = add_gaussian_noise(flat, key, std)
    return noisy.at[800:840].set(flat[800:840])


def by_the_realised_batch(noisy, statistics):
    return noisy / jnp.maximum(statistics.examples, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "law"),
    [
        ({"own": noise_on_each_device, "noise": no_noise_here}, VARIANCE),
        ({"noise": scaled(0.5)}, VARIANCE),
        ({"noise": none_on_the_bias}, r"standard deviation 0 on \['b'\]"),
        ({"after": other_noise_on_device_1, "noise": no_noise_here}, "every device gets the same noise"),
        ({"reduce": device_1_left_out}, PLANTED),
        ({"reduce": mean_for_sum}, PLANTED),
        ({"divide": by_the_realised_batch}, "verification failed"),
    ],
    ids=lambda x: "-".join(getattr(f, "__name__", "") for f in x.values()) if isinstance(x, dict) else "",
)
def test_a_bug_in_the_release_is_named(stages, law, monkeypatch):
    own = parts()
    plant_update(monkeypatch, **stages)
    with pytest.raises(VerificationError, match=law):
        own.verify(QUICK)


@pytest.mark.slow
def test_the_stages_without_a_bug_pass(monkeypatch):
    own = parts()
    plant_update(monkeypatch)
    assert VARIANCE in own.verify(QUICK).laws


@pytest.mark.slow
def test_noise_that_is_three_percent_off_is_refused_at_65_thousand_draws(monkeypatch):
    own = parts()
    plant_update(monkeypatch, noise=scaled(0.97))
    with pytest.raises(VerificationError, match=VARIANCE):
        own.verify(QUICK)


@pytest.mark.slow
def test_shards_that_begin_their_noise_alike_are_found(monkeypatch):
    own = parts(4, update_sharding="sharded", clipping_method="ghost", physical_batch_size=1)
    monkeypatch.setattr(
        dpscale.shard_update, "add_gaussian_noise", lambda x, key, std, start: add_gaussian_noise(x, key, std)
    )
    with pytest.raises(VerificationError, match=r"no draw is used twice|is independent"):
        own.verify(QUICK)


@pytest.mark.slow
def test_a_run_whose_compiled_update_is_not_the_verified_one_is_found(monkeypatch):
    own = parts()
    with monkeypatch.context() as patch:
        plant_update(patch, noise=no_noise_here)
        finalize = build_finalize_for(own.config, own.plan, own.placement)
        other = replace(own, functions=replace(own.functions, finalize=finalize))
        finalize.lower(
            own.placement.create(PARAMS),
            own.functions.zero_sums(),
            requests_array(own.placement.mesh, stop=False, save=False),
            np.zeros(8, np.uint32),
        )  # traced while the bug is there
    with pytest.raises(VerificationError, match="the run's own compiled update"):
        other.verify(Extent(2**12, 4, False))


@pytest.mark.slow
def test_one_key_for_all_steps_is_found(monkeypatch):
    real = StepKeys.noise
    own = parts()
    monkeypatch.setattr(StepKeys, "noise", lambda self, step: real(self, 0))
    with pytest.raises(VerificationError, match="every step has a key of its own"):
        own.verify(Extent(2**12, 4, False))


# The statistics of noise, without a step


def sample(draws: np.ndarray, stddev: float = 2.0) -> NoiseSample:
    return NoiseSample(draws.astype(np.float32), stddev, ["a", "b"], [draws.shape[1] - 10, 10], draws.shape[1])


@pytest.mark.parametrize(("steps", "count"), [(2, 40), (100, 30), (20, 20_000), (2, 700_000)])
def test_true_noise_is_never_refused(steps, count):
    for seed in range(3 if count > 1000 else 30):
        laws = Laws()
        check_noise(sample(2 * np.random.default_rng(seed).standard_normal((steps, count))), laws)
        assert laws.failures == []


@pytest.mark.parametrize("shift", [1, 7, 5000])
def test_noise_that_is_a_shifted_copy_of_an_earlier_steps_is_refused(shift):
    long = np.random.default_rng(1).standard_normal(20_000 + shift)
    laws = Laws()
    check_noise(sample(2 * np.stack([long[:20_000], long[shift:]])), laws)
    assert any("no draw is used twice" in text or "is independent" in text for text in laws.failures)


def test_correlated_noise_of_the_right_variance_is_refused():
    white = np.random.default_rng(1).standard_normal((20, 5001))
    laws = Laws()
    check_noise(sample(2 * (0.99 * white[:, 1:] + np.sqrt(1 - 0.99**2) * white[:, :-1])), laws)
    assert [text.split(":")[0] for text in laws.failures] == [
        "the noise of steps, parameters and devices is independent"
    ]


def bfloat16(z):
    return (z.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def uniform(z):
    return np.sqrt(12) * (np.random.default_rng(2).random(z.shape) - 0.5)


def one_key_for_all_leaves(z):
    z = z.copy()
    z[:, -10:] = z[:, :10]
    return z


def one_key_for_all_steps(z):
    return np.repeat(z[:1], len(z), axis=0)


def larger_in_every_second_step(z):
    return z * np.where(np.arange(len(z)) % 2, 1.05, 1.0)[:, None]


@pytest.mark.parametrize(
    ("bug", "law"),
    [
        (bfloat16, "no draw is used twice"),
        (uniform, "the noise is Gaussian"),
        (one_key_for_all_leaves, "every parameter has noise of its own"),
        (one_key_for_all_steps, "no draw is used twice"),
        (larger_in_every_second_step, "the plan's variance"),
    ],
)
def test_draws_that_are_not_independent_float32_normals_are_refused(bug, law):
    laws = Laws()
    check_noise(sample(2 * bug(np.random.default_rng(1).standard_normal((20, 5000)))), laws)
    assert any(law in text for text in laws.failures), laws.failures


def test_without_noise_there_must_be_none():
    laws = Laws()
    check_noise(sample(np.zeros((2, 20)), 0.0), laws)
    assert laws.failures == []
    check_noise(sample(np.ones((2, 20)), 0.0), laws)
    assert len(laws.failures) == 1


# Made-up rows


@pytest.mark.parametrize(
    ("dtype", "label_kind", "extra"),
    [
        (np.uint8, "class", {"num_classes": 10}),
        (np.float32, "value", {}),
        (np.int32, "tokens", {"label_shape": (5,), "num_classes": 50, "vocabulary_size": 50}),
        (np.bool_, "class", {}),
    ],
)
def test_made_up_rows_have_the_datas_shapes_and_only_garbage_is_no_value(dtype, label_kind, extra):
    metadata = SourceMetadata("shapes", (5,), np.dtype(dtype), label_kind, **extra)
    made_up = MadeUp(mesh_of(2), BatchLayout(2, 2), metadata, 64, resident=False)
    for kind in (0, 1):
        row = made_up.example(kind)
        assert row["features"].dtype == dtype
        assert row["features"].shape == (5,)
        assert all(np.isfinite(x).all() for x in row.values())
        if label_kind != "value":
            assert (row["label"] >= 0).all()
            assert (row["label"] < (metadata.num_classes or 2)).all()
        if metadata.vocabulary_size:
            assert (row["features"] < 50).all()
    assert made_up.holds_nan == (dtype == np.float32)
    (rows,) = made_up.batches([1], padding=2)
    np.testing.assert_array_equal(rows.mask, [True, False, True, False])
    np.testing.assert_array_equal(rows.id_words[:, 1], [1, 2, 1, 2])
    assert len(made_up.batches([0, 1, 2])) == 2


def test_a_made_up_user_has_all_records_and_a_broken_one_is_not_finite():
    metadata = SourceMetadata("users", (5,), np.dtype(np.float32), "class", num_classes=3, records=4)
    made_up = MadeUp(mesh_of(1), BatchLayout(2, 1), metadata, 64, resident=False)
    for kind in range(4):
        row = made_up.example(kind)
        assert row["features"].shape == (4, 5)
        assert row["present"].all()
    assert np.isnan(made_up.example(2)["features"]).all()


def test_too_small_a_data_set_on_the_devices_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"privacy\.verify=false"):
        MadeUp(mesh_of(1), BatchLayout(2, 1), Shapes.metadata, 3, resident=True)


# In a run

FEATURES = np.random.default_rng(5).normal(size=(120, 6)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)


def run(directory: Path, lines: list[str], steps: int = 4, **privacy):
    config = RunConfig.model_validate(
        {
            "data": {"num_classes": 2, "residence": "device"},
            "model": {"name": "mlp", "widths": [4]},
            "training": {"steps": steps},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 40, "insecure_seed": 7}
            | privacy,
            "performance": {"physical_batch_size": 4},
            "checkpoint": {"every_steps": 2},
        }
    )
    return dpscale.train(config, directory, train_data=(FEATURES, LABELS), report=lines.append, progress=False)


@pytest.mark.slow
def test_a_run_says_that_it_was_verified_and_ends_as_it_would_have_without(tmp_path):
    lines: list[str] = []
    with_it = run(tmp_path / "with", lines)
    (said,) = [line for line in lines if line.startswith("verified: ")]
    assert read_run(tmp_path / "with").checked.startswith(f"{laws_in(said)} laws held on 8 device(s) of 1 process(es)")
    status = json.loads((tmp_path / "with" / "status.json").read_text())
    assert status["verified_laws"] == laws_in(said)
    assert f"{laws_in(said)} held on the run" in (tmp_path / "with" / "report.html").read_text()
    without = run(tmp_path / "without", [], verify=False)
    assert read_run(tmp_path / "without").checked == "not before the first step (privacy.verify was off)"
    for mine, theirs in zip(jax.tree.leaves(with_it.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    lines.clear()
    run(tmp_path / "with", lines, verify=False)  # it has finished; and the switch is neither in its plan nor program
    assert not [line for line in lines if line.startswith("verified")]


@pytest.mark.slow
def test_a_run_whose_step_breaks_a_law_stops_before_anything_is_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(dpscale.step, "add_gaussian_noise", _half_the_noise)
    with pytest.raises(VerificationError, match=VARIANCE) as caught:
        run(tmp_path / "run", [])
    assert caught.value.exit_code == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["begin", "verify"]
    assert (records[1]["held"], records[1]["laws"]) == (False, 0)
    kept = read_run(tmp_path / "run")
    assert kept.charged_steps == 0
    assert kept.checked == "not yet; 1 check(s) failed, and no step was run then"
    assert not list((tmp_path / "run" / "ckpt").glob("[0-9]*"))


def _half_the_noise(flat, key, std):
    return add_gaussian_noise(flat, key, std / 2)


@pytest.mark.slow
def test_after_a_restart_a_smaller_part_is_verified(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, lines = StepKeys.examples, []

    def killed_in_step_3(self, step):
        if step == 3 and len(lines) == 1 and self.attempt < 2**62:
            raise Killed
        return real(self, step)

    monkeypatch.setattr(StepKeys, "examples", killed_in_step_3)
    with pytest.raises(Killed):
        run(tmp_path / "run", lines)
    first = len(lines)
    run(tmp_path / "run", lines)
    (again,) = [line for line in lines[first:] if line.startswith("verified")]
    assert read_run(tmp_path / "run").checked.endswith("before the first step, and in part at 1 later start(s)")
    # Without the reference gradient and its two laws.
    assert laws_in(again) <= laws_in(lines[0]) - 2
    assert AFTER_RESTART.draws < AT_START.draws


def laws_in(line: str) -> int:
    return int(line.removeprefix("verified: ").split()[0])


DIVERGED = """
import os, runpy, sys
from dpscale.loop import StepKeys
noise = StepKeys.noise
def diverged(self, step):
    words = noise(self, step)
    return words + 1 if os.environ["DPSCALE_PROCESS_ID"] == "1" else words
StepKeys.noise = diverged
sys.argv = ["launch.runtime", *sys.argv[1:]]
runpy.run_module("launch.runtime", run_name="__main__", alter_sys=True)
"""
CONFIG = """
[data]
train = "digits/train"
[model]
name = "mlp"
[training]
steps = 4
[privacy]
noise_multiplier = 1.0
delta = 1e-4
expected_batch_size = 100
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_diverged_key_on_one_of_two_processes_ends_both_and_is_named(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", DIVERGED, "--verb", "verify"]
    command += ["--run-dir", str(tmp_path / "logs"), "--", str(tmp_path / "config.toml")]
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base |= {"DPSCALE_COORDINATOR": address, "DPSCALE_NUM_PROCESSES": "2", "DPSCALE_INIT_TIMEOUT_S": "60"}
    processes = [
        subprocess.Popen(
            command,
            env=base | {"DPSCALE_PROCESS_ID": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], output
    law = "all processes have the same keys: seen another value on process(es) [1] than on process 0"
    assert all(law in text for text in output)
