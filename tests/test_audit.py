"""Laws of the audit: what its bound may say, what a canary is, which bugs it must see, and what it must not touch."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale.gradients
import dpscale.step
from dpscale.audit import AuditResult, audit
from dpscale.audit.bound import evidence, guess_counts, lower_bound, p_value, reach
from dpscale.audit.canaries import CanarySource, canary_task, fair_coins
from dpscale.audit.power import BUGS, power, simulate
from dpscale.audit.report import result_lines
from dpscale.audit.scores import SCORES, all_scores
from dpscale.clipping import Flat, clipped_grad
from dpscale.config import RunConfig
from dpscale.data.arrays import ArraySource
from dpscale.data.source import SourceMetadata
from dpscale.data.users import UserSource
from dpscale.errors import InputError
from dpscale.loop import StepKeys
from dpscale.losses import sum_over_records
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler
from dpscale.task import Task

DELTA = 1e-5
SIGNIFICANCE = 0.05 / len(SCORES)
# The quickstart's: q = 1024 / 4500, 150 steps, the noise that epsilon 3 calibrates to.
QUICKSTART = PrivacyPlan(
    num_examples=4500,
    sampling_rate=1024 / 4500,
    steps=150,
    expected_batch_size=1024.0,
    noise_multiplier=4.0299,
    clip_norm=0.5,
    delta=DELTA,
    epsilon_target=None,
)


# The bound


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_without_delta_the_p_value_is_that_of_independent_coins(epsilon):
    """A mechanism that tells each coin with probability e^eps / (1 + e^eps) is epsilon-private, and the worst one."""
    generator = np.random.default_rng(1)
    right = np.exp(epsilon) / (1 + np.exp(epsilon))
    correct = generator.binomial(60, right, size=200_000)
    for count in (int(60 * right) - 3, int(60 * right) + 3):
        observed = np.mean(correct >= count)
        assert p_value(500, 60, count, epsilon, 0.0) == pytest.approx(observed, abs=5 * np.sqrt(0.25 / 200_000))


@pytest.mark.parametrize(
    ("guesses", "correct"), [(125, 125), (125, 90), (125, 65), (500, 500), (500, 330), (1000, 990)]
)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.slow
def test_the_bound_is_that_of_jax_privacy(guesses, correct, delta):
    auditing = pytest.importorskip("jax_privacy.auditing", reason="pip install 'dpscale[bench]'")
    # Scores of which exactly the asked number lies above the threshold 0.5, the others being on the other side.
    auditor = auditing.CanaryScoreAuditor(
        [1.0] * correct + [0.0] * (500 - correct) if correct <= 500 else [1.0] * correct,
        [1.0] * (guesses - correct) + [0.0] * (1000 - max(500, correct) - (guesses - correct)),
    )
    theirs = auditor.epsilon_one_run(SIGNIFICANCE, max(delta, 1e-300), threshold_strategy=auditing.Explicit(0.5))
    assert lower_bound(1000, guesses, correct, delta, SIGNIFICANCE).epsilon == pytest.approx(theirs, abs=1e-5)


def test_the_bound_rises_with_right_guesses_and_falls_with_delta_and_confidence():
    bounds = [lower_bound(1000, 500, correct, DELTA, SIGNIFICANCE).epsilon for correct in (250, 300, 400, 500)]
    assert bounds[0] == 0 < bounds[1] < bounds[2] < bounds[3] == reach(1000, DELTA, 2 * SIGNIFICANCE)
    assert lower_bound(1000, 500, 400, 1e-3, SIGNIFICANCE).epsilon < bounds[2]
    assert lower_bound(1000, 500, 400, DELTA, SIGNIFICANCE / 10).epsilon < bounds[2]


def test_guesses_take_the_highest_as_included_the_lowest_as_not_and_ties_at_random():
    included = np.arange(1000) % 2 == 0
    assert evidence(included.astype(float), included, DELTA, SIGNIFICANCE).correct == max(guess_counts(1000))
    assert evidence(-included.astype(float), included, DELTA, SIGNIFICANCE).epsilon == 0
    # Without any signal the order of the canaries must not count, though here it follows the coins.
    ordered = np.arange(1000) >= 500
    assert evidence(np.zeros(1000), ordered, DELTA, SIGNIFICANCE).epsilon < 0.5


@pytest.mark.parametrize(("guesses", "correct"), [(5, 6), (2000, 3)])
def test_impossible_counts_are_refused(guesses, correct):
    with pytest.raises(InputError, match="right of"):
        p_value(1000, guesses, correct, 1.0, DELTA)


# Power


def test_the_power_at_the_quickstarts_settings_is_the_documented_one():
    table = power(QUICKSTART, 1000, 150, runs=4)
    assert 0.4 < table["correct"]["total"] < 1.3
    assert 4.4 < table["noise at 1/10"]["total"] < 4.8
    assert 4.4 < table["no clip"]["total"] < 4.8
    assert table["no clip, canaries of norm C"]["total"] < 1.3
    assert table["one draw for all steps"]["total"] < 0.4
    assert 4.4 < table["one draw for all steps"]["spread"] < 4.8
    assert 4.4 < table["draws repeat after 10 steps"]["repeats"] < 4.8
    assert max(table["draws repeat after 10 steps"][name] for name in ("total", "spread")) < 1.5
    assert max(table["noise at 2/3"].values()) < 3  # no audit in one run sees this


def test_correct_code_is_accused_in_none_of_two_hundred_simulated_audits():
    """At epsilon 0.5, where the bound is nearest to the claim: a 95 % bound may be wrong in 5 % of them."""
    plan = PrivacyPlan(
        num_examples=100,
        sampling_rate=1.0,
        steps=1,
        expected_batch_size=100.0,
        noise_multiplier=7.0,
        clip_norm=1.0,
        delta=DELTA,
        epsilon_target=None,
    )
    claimed, generator, bounds = plan.epsilon_after(1), np.random.default_rng(3), []
    for _ in range(200):
        released, included = simulate(plan, BUGS["correct"], 400, 1, generator)
        scores = all_scores(released, plan.noise_multiplier)
        bounds.append(max(evidence(x, included, DELTA, SIGNIFICANCE).epsilon for x in scores.values()))
    assert sum(bound > claimed for bound in bounds) == 0


# Canaries


class Kept:
    """A source that remembers what it was asked for."""

    def __init__(self, metadata: SourceMetadata, label) -> None:
        self.metadata, self._label, self.asked = metadata, label, []

    def __len__(self):
        return 20

    def rows(self, indices):
        self.asked += list(indices)
        shape = (len(indices), *self.metadata.label_shape)
        return {
            "features": np.asarray(indices, np.float32)[:, None] * np.ones(3, np.float32),
            "label": np.broadcast_to(self._label, shape).astype(self.metadata.label_dtype),
        }

    def fingerprint_parts(self):
        return b""


def linear(params, example):
    return jnp.dot(params, example["features"]) + 0 * jnp.sum(example["label"])


@pytest.mark.parametrize(
    ("kind", "shape"), [("class", ()), ("value", ()), ("value", (2, 2))], ids=["class", "value", "array of values"]
)
def test_a_canary_has_a_unit_direction_of_its_own_and_all_other_rows_have_none(kind, shape):
    metadata = SourceMetadata("kept", (3,), np.dtype(np.float32), kind, label_shape=shape)
    included = np.array([True, False, True, True])
    source = CanarySource(Kept(metadata, 5), included)
    assert len(source) == 20
    task = canary_task(Task(jnp.ones(3), linear, False, lambda p, e: {}), metadata, 4, norm=7.0)
    rows = source.rows(np.arange(20))
    grads = jax.vmap(jax.grad(task.loss), (None, 0))(task.params, rows)
    planted = np.zeros((20, 4))
    for canary, row in enumerate([0, 5, 10, 15]):
        planted[row, canary] = 7.0 * included[canary]
    np.testing.assert_array_equal(grads["canary"], planted)
    # The model's gradient is the features, but zero on the canaries' rows: they contribute nothing else.
    expected = np.arange(20.0)[:, None] * np.ones(3)
    expected[[0, 5, 10, 15]] = 0
    np.testing.assert_array_equal(grads["model"], expected)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_a_canary_is_clipped_like_any_example(method):
    metadata = SourceMetadata("kept", (3,), np.dtype(np.float32), "class")
    source = CanarySource(Kept(metadata, 1), np.array([True, False]))
    task = canary_task(Task(jnp.ones(3), linear, False, lambda p, e: {}), metadata, 2, norm=10.0)
    batch = jax.tree.map(jnp.asarray, source.rows(np.array([0, 10, 3])))
    out = clipped_grad(task.loss, clip_norm=0.5, method=method)(task.params, batch, jnp.ones(3, bool))
    np.testing.assert_allclose(out.grad_sum["canary"], [0.5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(out.grad_sum["model"], np.full(3, 0.5 / np.sqrt(3)), rtol=1e-5)


def test_the_coins_are_fair_fresh_and_independent_of_the_sampling():
    secret = RootSecret.from_insecure_seed(4)
    coins = fair_coins(secret, 4000)
    assert abs(coins.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert (coins != fair_coins(RootSecret.from_insecure_seed(5), 4000)).any()
    drawn = PoissonSampler(4000, 0.5, secret.derive("sampling")).indices(0)
    sampled = np.isin(np.arange(4000), drawn)
    assert abs(np.corrcoef(coins, sampled)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("count", [1, 21])
def test_more_canaries_than_records_or_fewer_than_two_are_refused(count):
    metadata = SourceMetadata("kept", (3,), np.dtype(np.float32), "class")
    with pytest.raises(InputError, match="canaries among 20 examples"):
        CanarySource(Kept(metadata, 1), np.ones(count, bool))


def test_where_users_are_protected_a_canary_is_a_user_with_one_unit_vector_for_all_its_records():
    users = np.repeat(np.arange(20), np.arange(20) % 4 + 1)
    features = np.random.default_rng(2).normal(size=(len(users), 3)).astype(np.float32)
    by_user = UserSource(ArraySource(features, np.zeros(len(users), np.float32)), users, 3)
    source = CanarySource(by_user, np.array([True, False, True, False]))
    summed = sum_over_records(linear, uses_key=False)
    task = canary_task(Task(jnp.ones(3), summed, False, lambda p, e: {}), by_user.metadata, 4, norm=10.0)
    batch = jax.tree.map(jnp.asarray, source.rows(np.arange(20)))
    grads = jax.vmap(jax.grad(task.loss), (None, 0))(task.params, batch)
    planted = np.zeros((20, 4))
    planted[0, 0] = planted[10, 2] = 10.0
    np.testing.assert_array_equal(grads["canary"], planted)
    plain = jax.vmap(jax.grad(summed), (None, 0))(jnp.ones(3), jax.tree.map(jnp.asarray, by_user.rows(np.arange(20))))
    expected = np.array(plain)
    expected[[0, 5, 10, 15]] = 0
    np.testing.assert_allclose(grads["model"], expected, rtol=1e-6)
    out = clipped_grad(task.loss, clip_norm=0.5)(task.params, batch, jnp.ones(20, bool))
    np.testing.assert_allclose(out.grad_sum["canary"], [0.5, 0.0, 0.5, 0.0], rtol=1e-5)


# Whole audits, through the real path

FEATURES = np.random.default_rng(6).normal(size=(1200, 4)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)
STEPS = 60


def config(update_sharding: str = "replicated", **privacy) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"num_classes": 2},
            "model": {"name": "mlp", "widths": [3]},
            "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
            "training": {"steps": STEPS},
            "privacy": {"noise_multiplier": 2.7, "delta": DELTA, "clip_norm": 0.5, "expected_batch_size": 300}
            | privacy,
            "performance": {"physical_batch_size": 16, "update_sharding": update_sharding},
        }
    )


def run(directory: Path, update_sharding: str = "replicated", **keywords) -> AuditResult:
    return audit(
        config(update_sharding), directory, canaries=1000, train_data=(FEATURES, LABELS), progress=False, **keywords
    )


@pytest.mark.slow
@pytest.mark.parametrize("update_sharding", ["replicated", "sharded"])
def test_correct_code_is_not_accused_and_nothing_but_the_audits_files_is_written(update_sharding, tmp_path):
    result = run(tmp_path / "audit", update_sharding)
    assert not result.violation
    assert result.claimed == pytest.approx(3.0, abs=0.5)
    assert result.lower_bound < 1.6 < result.claimed < result.reach
    assert (result.lost_rows, result.steps) == (0, STEPS)
    assert result_lines(result)[-3] == "verdict        consistent with the claim"
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [Path("audit/audit.json"), Path("audit/released.npz")]
    assert all(stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o600 for path in files)
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["lower_bound"] == result.lower_bound
    saved = np.load(tmp_path / "audit" / "released.npz")
    assert saved["released"].shape == (STEPS, 1000)
    # Present canaries move by the clip norm, q of the time: their mean release is q, the others' zero.
    means = [saved["released"][:, saved["included"] == on].mean() for on in (True, False)]
    assert means == pytest.approx([0.25, 0.0], abs=5 * 2.7 / np.sqrt(STEPS * 480))


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, "noise at 1/10"])
def test_where_users_are_protected_the_audit_is_of_users(bug, tmp_path, monkeypatch):
    if bug is not None:
        noise_at_a_tenth(monkeypatch)
    data = (np.repeat(FEATURES, 2, axis=0), np.repeat(LABELS, 2), np.repeat(np.arange(1200), 2))
    made = config(unit="user", max_examples_per_user=2)
    result = audit(made, tmp_path / "audit", canaries=1000, train_data=data, progress=False)
    assert (result.examples, result.canaries) == (1200, 1000)
    assert result.violation == (bug is not None)
    assert (result.lower_bound > 4) == (bug is not None)


def noise_at_a_tenth(monkeypatch):
    real = dpscale.step.add_gaussian_noise
    monkeypatch.setattr(dpscale.step, "add_gaussian_noise", lambda flat, key, std: real(flat, key, std / 10))


def no_clip(monkeypatch):
    def unclipped(config, plan, task):
        return clipped_grad(task.loss, bound=Flat(float("inf")))

    monkeypatch.setattr(dpscale.gradients, "gradient_sum", unclipped)


def one_key(monkeypatch):
    real = StepKeys.noise
    monkeypatch.setattr(StepKeys, "noise", lambda self, step: real(self, 0))


def ten_keys(monkeypatch):
    real = StepKeys.noise
    monkeypatch.setattr(StepKeys, "noise", lambda self, step: real(self, step % 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "seen_by"),
    [(noise_at_a_tenth, "total"), (no_clip, "total"), (one_key, "spread"), (ten_keys, "repeats")],
)
def test_a_planted_bug_is_seen_by_the_score_that_is_there_for_it(plant, seen_by, tmp_path, monkeypatch):
    plant(monkeypatch)
    result = run(tmp_path / "audit")
    assert result.violation
    assert result.evidence[seen_by].epsilon == result.lower_bound > 4
    assert "VIOLATION" in result_lines(result)[-3]


def test_an_audit_refuses_a_runs_directory_foreign_files_and_what_has_no_claim(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="is a run's directory"):
        run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        run(tmp_path / "other")
    for bad, part in (({"steps": STEPS + 1}, "1 to 60 steps"), ({"confidence": 1.5}, "confidence=1.5")):
        with pytest.raises(InputError, match=part):
            run(tmp_path / "audit", **bad)
    with pytest.raises(InputError, match="nothing is claimed"):
        audit(config(enabled=False), tmp_path / "audit", train_data=(FEATURES, LABELS))
    assert not (tmp_path / "audit").exists()


def test_canaries_that_cannot_reach_the_claim_give_no_verdict_instead_of_a_good_one():
    few = {name: lower_bound(20, 10, 8, DELTA, SIGNIFICANCE) for name in SCORES}
    result = AuditResult(3.0, DELTA, 0.0, 0.95, reach(20, DELTA, SIGNIFICANCE), few, 20, 11, 5, 100, 0, Path("x"))
    assert result.reach < 3
    assert result_lines(result)[-3].startswith("verdict        none: so few canaries cannot contradict epsilon 3.000")


def test_rows_that_were_lost_are_said_since_canaries_may_be_among_them():
    found = {name: lower_bound(1000, 500, 300, DELTA, SIGNIFICANCE) for name in SCORES}
    result = AuditResult(3.0, DELTA, 0.1, 0.95, 4.5, found, 1000, 500, 5, 5000, 17, Path("x"))
    assert any("17 rows were not finite" in line for line in result_lines(result))


def test_the_data_of_an_array_source_keep_their_length_and_features():
    data = ArraySource(FEATURES, LABELS, num_classes=2)
    source = CanarySource(data, np.ones(7, bool))
    asked = np.array([0, 3, 500, 171])
    np.testing.assert_array_equal(source.rows(asked)["features"], FEATURES[asked])
    np.testing.assert_array_equal(source.rows(asked)["label"][:, 0], LABELS[asked])
    np.testing.assert_array_equal(source.rows(asked)["label"][:, 1], [1, 0, 0, 2])
