"""Laws of `privacy sweep`: what the runs of one search spend together."""

import dataclasses
import math
import os
import shutil

import pytest
from run_fixtures import STEPS, made_run

import dpscale.search_cost as search_cost_module
from dpscale.cli import app
from dpscale.errors import InputError
from dpscale.privacy.accounting import Step, epsilon
from dpscale.privacy.composition import composed_epsilon
from dpscale.privacy.plan import PrivacyPlan
from dpscale.search_cost import search_cost, search_lines

A, B = Step(2.0, 0.05), Step(1.2, 0.02)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def alone(step, steps, accountant="pld"):
    return epsilon(
        noise_multiplier=step.noise_multiplier,
        sampling_rate=step.sampling_rate,
        steps=steps,
        delta=1e-5,
        accountant=accountant,
        neighboring_relation=step.neighboring_relation,
    )


def test_runs_of_one_plan_compose_as_one_run_of_all_their_steps():
    assert composed_epsilon([(A, 100), (A, 50)], 1e-5) == alone(A, 150)
    assert composed_epsilon([(A, 100), (A, 50)], 1e-5, "rdp") == alone(A, 150, "rdp")
    assert composed_epsilon([], 1e-5) == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_different_plans_compose_to_what_dp_accounting_says_of_all_events(accountant):
    import dp_accounting

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    if accountant == "pld":
        theirs = dp_accounting.pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    else:
        theirs = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    for step, count in ((A, 200), (B, 300)):
        theirs.compose(step.dp_event(count))
    together = composed_epsilon([(A, 200), (B, 300)], 1e-5, accountant)
    assert together == pytest.approx(theirs.get_epsilon(1e-5), rel=2e-3)
    assert max(alone(A, 200, accountant), alone(B, 300, accountant)) < together
    assert together < alone(A, 200, accountant) + alone(B, 300, accountant)


def test_without_noise_nothing_is_left_and_relations_do_not_mix():
    assert composed_epsilon([(A, 10), (Step(0.0, 0.1), 1)], 1e-5) == math.inf
    with pytest.raises(InputError, match="different neighbouring relations"):
        composed_epsilon([(A, 10), (Step(2.0, 0.05, "replace_one"), 10)], 1e-5)
    with pytest.raises(InputError, match="too small"):
        composed_epsilon([(A, 600), (B, 600)], 2.2e-12)


@pytest.fixture
def runs(tmp_path):
    """One finished, one stopped halfway, of two plans, on the same data."""
    finished = made_run(tmp_path / "a", STEPS)
    stopped = made_run(tmp_path / "b", 6, noise_multiplier=1.5)
    return [made.directory.root for made in (finished, stopped)]


def test_a_stopped_run_counts_to_its_planned_end_for_results_stopped_it(runs, capsys):
    cost = search_cost(runs)
    q = 100 / 1621
    assert cost.planned == composed_epsilon([(Step(2.0, q), STEPS), (Step(1.5, q), STEPS)], 1e-4)
    assert cost.charged == composed_epsilon([(Step(2.0, q), STEPS), (Step(1.5, q), 6)], 1e-4)
    assert cost.charged < cost.planned
    assert "keyed fingerprints are those" in cost.sameness
    app(["privacy", "sweep", *map(str, runs)], standalone_mode=False)
    text = capsys.readouterr().out
    for part in ("for all 2 runs (pld)", "if every stop was decided in advance", "fixed before results"):
        assert part in text


def test_sameness_of_data_is_shown_by_fingerprints_or_must_be_said(runs, tmp_path):
    (runs[1] / "config.toml").write_text((runs[1] / "config.toml").read_text().replace("digits/train", "gone.npz"))
    assert "keyed fingerprints" in search_cost(runs).sameness  # the first run's data are enough
    other = made_run(tmp_path / "c", 6, data={"train": "digits/train"})
    other.directory.write_json(other.directory.identity, {**read(other), "data": "0" * 64})
    with pytest.raises(InputError, match="are not those of"):
        search_cost([*runs, other.directory.root])
    assert "ASSUMED" in search_cost([*runs, other.directory.root], assume_same_data=True).sameness
    with pytest.raises(InputError, match="cannot be read to check"):
        search_cost(runs[::-1])


def read(made):
    return made.directory.read_json(made.directory.identity)


@pytest.mark.parametrize("privacy", [{"enabled": False}, {"insecure_seed": 3}])
def test_a_run_that_promises_nothing_is_refused(runs, tmp_path, privacy):
    plain = made_run(tmp_path / "plain", 6, **privacy).directory.root
    with pytest.raises(InputError, match="promises nothing"):
        search_cost([*runs, plain])


def test_runs_that_protect_users_are_not_composed_with_runs_that_protect_records(runs):
    path = runs[1] / "plan.json"
    plan = PrivacyPlan.from_json(path.read_text())
    users = dataclasses.replace(plan, unit="user", max_examples_per_user=3)
    lines = [f"unit {unit}" for unit in ("example", "user")]
    assert lines[0] in "\n".join(search_lines(search_cost(runs)))
    with pytest.MonkeyPatch.context() as patch:

        def of_users(run, true=search_cost_module.read_run):
            record = true(run)
            return dataclasses.replace(record, plan=users) if record.plan == plan else record

        patch.setattr(search_cost_module, "read_run", of_users)
        for assumed in (False, True):
            with pytest.raises(InputError, match="protects users"):
                search_cost(runs, assume_same_data=assumed)
        assert lines[1] in "\n".join(search_lines(search_cost(runs[1:])))


def test_a_run_named_twice_is_refused_and_so_are_different_deltas_without_a_choice(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs[0])
    with pytest.raises(InputError, match="given twice"):
        search_cost([*runs, tmp_path / "link"])
    other = made_run(tmp_path / "d", 6, delta=1e-5).directory.root
    with pytest.raises(InputError, match="different deltas"):
        search_cost([*runs, other])
    assert search_cost([*runs, other], delta=1e-5).planned > search_cost(runs, delta=1e-5).planned


def test_a_damaged_run_is_refused_with_exit_code_2(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "e")
    (tmp_path / "e" / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="missing or empty"):
        app(["privacy", "sweep", str(runs[1]), str(tmp_path / "e")], standalone_mode=False)
