"""Laws of a release: the weights, the model and the card leave, at once and whole, and nothing else does."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_fixtures import FACTS, MODEL, PROGRAM, STEPS, MadeRun, config

import dpscale
from dpscale import release as release_function
from dpscale.cli import app
from dpscale.config import config_from_dict
from dpscale.errors import InputError, PrivacyError, RunDirectoryError
from dpscale.lease import Lease
from dpscale.metrics.streams import PublicStream
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.release import release
from dpscale.release_files import load_release
from dpscale.run_record import read_run
from dpscale.spending import spending_json, spending_lines
from dpscale.state import TrainState
from dpscale.weights import as_tree, named_leaves

release_module, release_files = sys.modules["dpscale.release"], sys.modules["dpscale.release_files"]
SAID = ("privacy.public_data_used=none", "privacy.hyperparameter_search=none")
FILES = {"weights.safetensors", "orbax", "model.json", "privacy.json", "PRIVACY.md"}
MOMENTUM = 12345.6789  # stands for what only the optimizer knows
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def params(step: int) -> dict:
    key = jax.random.key(step)
    shapes = {"Dense_0": {"kernel": (64, 4), "bias": (4,)}, "Dense_1": {"kernel": (4, 10), "bias": (10,)}}
    return jax.tree.map(lambda shape: jax.random.normal(key, shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def state(step: int) -> TrainState:
    made = TrainState.create(params(step), OPTIMIZER)
    return TrainState(jnp.int32(step), made.params, jax.tree.map(lambda x: jnp.full_like(x, MOMENTUM), made.opt_state))


def trained(root: Path, end: int, **options) -> Path:
    """A run with true checkpoints of steps 3 and `end`."""
    made = MadeRun(root, **options)
    for start, step in ((0, 3), (3, end)):
        made.open(start, step)
        made.save_state(step, state(step))
    return made.directory.root


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("finished") / "run", STEPS)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def quietly(run, out, **options) -> Path:
    return release(run, out, **{"statements": SAID, "report": lambda line: None} | options)


def every_byte(directory: Path) -> bytes:
    return b"\n".join(str(f).encode() + f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file())


def test_a_release_holds_no_leaf_but_the_weights_no_secret_and_nothing_of_the_runs_other_files(run, tmp_path):
    """PRIVACY.md rows 35 and 1."""
    for name in ("pending.jsonl", "sensitive.jsonl"):
        (run / "metrics").mkdir(exist_ok=True)
        (run / "metrics" / name).write_text('{"step": 12, "train_loss": 0.77345, "batch_size": 98712345}\n')
    out = quietly(run, tmp_path / "out")
    assert {entry.name for entry in out.iterdir()} == FILES
    import orbax.checkpoint as ocp

    weights = params(STEPS)
    stored = ocp.StandardCheckpointer().restore(out / "orbax")
    for tree in (stored, load_release(out).params):
        assert jax.tree.structure(tree) == jax.tree.structure(weights)
        jax.tree.map(np.testing.assert_array_equal, tree, weights)
    content = every_byte(out)
    secret = (run / "secret.key").read_text().strip()
    number = int(secret, 16)
    backwards = bytes.fromhex(secret)[::-1]
    forms = [secret.encode(), secret.upper().encode(), bytes.fromhex(secret), backwards, str(number).encode()]
    heads = [line["digest"].encode() for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines())]
    kept = [np.float32(MOMENTUM).tobytes() * 2, b"12345.6", b"0.77345", b"98712345", str(run).encode(), b"digits/train"]
    identity = json.loads((run / "run.json").read_text())
    for form in [*forms, *heads, *kept, identity["data"].encode(), identity["secret"].encode()]:
        assert form not in content
    assert not any(str(tmp_path).encode() in f.read_bytes() for f in out.rglob("*") if f.is_file())


def test_the_scan_finds_what_is_planted(run, tmp_path):
    """The scan of the law above is able to fail: the optimizer's state, had it been saved, would be seen."""
    from dpscale.weights import write_weights

    write_weights(tmp_path / "bad", {"momentum": np.full(8, MOMENTUM, np.float32)})
    assert np.float32(MOMENTUM).tobytes() * 2 in (tmp_path / "bad").read_bytes()


def test_a_finished_run_releases_its_own_epsilon_and_loads_again_without_jax(run, tmp_path):
    out = quietly(run, tmp_path / "out")
    loaded = load_release(out)
    assert loaded.model == MODEL
    assert loaded.card["epsilon"] == read_run(run).plan.epsilon_after(STEPS)
    assert loaded.card["finished"] is True
    assert loaded.card["ledger"]["sha256"] == read_run(run).ledger_sha256
    assert loaded.card["versions"]["jax"] == PROGRAM["version of jax"]
    code = (
        f"import sys; from dpscale.release_files import load_release; r = load_release({str(out)!r}); "
        "sys.exit('jax' in sys.modules and 'jax is in')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dpscale.release is release_function
    assert (out / "weights.safetensors").stat().st_mode & 0o777 == 0o644


def test_where_the_average_is_what_is_evaluated_it_is_what_is_released(tmp_path):
    """As the start that saved the step had it; what the config says now does not count."""
    made = MadeRun(tmp_path / "run", {"averaged": True}, training={"ema_decay": 0.9})
    made.open(0, 3)
    made.save_state(3, dataclasses.replace(state(3), ema=params(7)))
    loaded = load_release(quietly(tmp_path / "run", tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params(7))
    assert loaded.card["released"].startswith("the moving average of the weights after step 3")


def test_a_stopped_run_releases_the_planned_ends_epsilon(tmp_path):
    run = trained(tmp_path / "run", 6)
    card = load_release(quietly(run, tmp_path / "out")).card
    plan = read_run(run).plan
    assert card["epsilon"] == plan.epsilon_after(STEPS)
    assert card["epsilon_if_the_stop_was_decided_in_advance"] == plan.epsilon_after(6)


def test_an_earlier_checkpoint_of_a_finished_run_costs_what_the_whole_run_cost(run, tmp_path):
    loaded = load_release(quietly(run, tmp_path / "out", step=3))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params(3))
    assert loaded.card["epsilon"] == read_run(run).plan.epsilon_after(STEPS)
    assert loaded.card["released_step"] == 3
    with pytest.raises(InputError, match="checkpoints of steps 3, 12"):
        quietly(run, tmp_path / "other", step=5)


def saved_but_not_committed(root: Path) -> MadeRun:
    """A run that died between the checkpoint of step 3 and its closing record."""
    made = MadeRun(root)
    made.open(0, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.ledger, "close", lambda *_: None)
        made.save_state(3, state(3))
    return made


def test_what_is_released_is_committed_so_that_its_steps_never_run_again_uncharged(tmp_path):
    made = saved_but_not_committed(tmp_path / "run")
    assert read_run(made.directory.root).committed_step == 0
    card = load_release(quietly(made.directory.root, tmp_path / "out")).card
    record = read_run(made.directory.root)
    assert record.committed_step == 3
    assert card["ledger"]["sha256"] == record.ledger_sha256
    shutil.rmtree(made.directory.checkpoints / "3")
    with pytest.raises(RunDirectoryError, match="step 3 was committed"):
        made.start()
    made.start(new_attempt=True)
    assert (made.briefing.attempt, made.briefing.charged_before) == (1, 6)


def released_epsilon(run: Path, out: Path) -> float:
    return load_release(quietly(run, out)).card["epsilon"]


def test_show_release_card_and_limit_agree_with_a_reserve_and_the_card_stays_true(tmp_path):
    """A card that is out is never overtaken: what it covers is the limit of the run from then on."""
    made = MadeRun(tmp_path / "run", noise_multiplier=None, epsilon=2.0, replay_reserve=4)
    run, plan = made.directory.root, made.briefing.plan
    made.open(0, 6)
    made.save_state(6, state(6))
    record = read_run(run)
    assert (record.charged_at_end, record.covered_steps, record.chargeable_steps) == (STEPS, STEPS + 4, STEPS + 4)
    assert f"{STEPS + 4} can ever be charged" in "\n".join(spending_lines(record, [1e-4]))
    said = spending_json(record, [1e-4])["epsilon"][0]
    early = released_epsilon(run, tmp_path / "early")
    assert early == said["if_released"] == plan.epsilon_after(STEPS + 4) <= 2.0
    # The rest, all of the reserve and no step more.
    made.start()
    made.open(6, 12)
    made.save_state(12, state(12))
    shutil.rmtree(made.directory.checkpoints / "12")
    made.start()
    assert made.briefing.last_step == 10
    made.open(6, 10)
    made.save_state(10, state(10))
    assert read_run(run).charged_steps == STEPS + 4
    assert plan.epsilon_after(read_run(run).charged_steps) <= early
    assert released_epsilon(run, tmp_path / "late") == early


@pytest.mark.parametrize("given", [{}, {"noise_multiplier": None, "epsilon": 2.0, "replay_reserve": 4}])
def test_a_finished_run_is_closed_by_its_release_also_where_a_reserve_or_no_epsilon_would_let_it_go_on(tmp_path, given):
    run = trained(tmp_path / "run", STEPS, **given)
    epsilon = released_epsilon(run, tmp_path / "out")
    assert epsilon == read_run(run).plan.epsilon_after(STEPS)
    assert read_run(run).chargeable_steps == STEPS
    shutil.rmtree(run / "ckpt" / "12")
    made = MadeRun.__new__(MadeRun)
    made.directory, made.config, made.facts = read_run(run).directory, read_run(run).config, FACTS
    made.start()
    assert (made.briefing.attempt, made.briefing.start_step, made.briefing.last_step) == (1, 3, 3)
    with pytest.raises(PrivacyError, match="card of a released model covers"):
        made.open(3, 6)


def test_a_ledger_that_lost_the_line_of_a_release_is_refused(run, tmp_path):
    before = (run / "ledger.jsonl").read_bytes()
    quietly(run, tmp_path / "out")
    (run / "ledger.jsonl").write_bytes(before)
    for opened in (read_run, lambda run: MadeRun(run)):
        with pytest.raises(PrivacyError, match="does not hold the line of the release"):
            opened(run)


def test_a_release_that_lost_the_lease_writes_nothing_more(run, tmp_path, monkeypatch):
    before = (run / "ledger.jsonl").read_bytes()

    def lost(lease):
        raise RunDirectoryError("another run took over")

    monkeypatch.setattr(Lease, "check", lost)
    with pytest.raises(RunDirectoryError, match="took over"):
        quietly(run, tmp_path / "out")
    assert (run / "ledger.jsonl").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_what_is_released_is_described_by_the_start_that_saved_it_and_not_by_later_ones(tmp_path):
    """Another program went on after step 6, and its config and model.json are the ones that are there."""
    run = trained(tmp_path / "run", 6)
    made = MadeRun.__new__(MadeRun)
    made.directory, made.config = read_run(run).directory, read_run(run).config
    later = PROGRAM | {"version of jax": "0.99", "optimizer.learning_rate": 0.25}
    made.facts = FACTS | {"averaged": True, "options": {"widths": [9]}, "program": later}
    made.start(new_attempt=True)
    made.open(6, 9)
    made.save_state(9, dataclasses.replace(state(9), ema=params(7)))
    old, new = (load_release(quietly(run, tmp_path / str(step), step=step)) for step in (3, 9))
    assert (old.model["options"], new.model["options"]) == ({"widths": [4]}, {"widths": [9]})
    assert (old.card["versions"]["jax"], new.card["versions"]["jax"]) == ("0.10.2", "0.99")
    assert old.card["program_digest"] != new.card["program_digest"]
    for made_of, loaded in ((params(3), old), (params(7), new)):
        jax.tree.map(np.testing.assert_array_equal, loaded.params, made_of)
    assert old.card["released"].startswith("the weights")


@pytest.mark.parametrize("damage", ["another program", "nothing"])
def test_a_manifest_that_describes_another_program_than_the_ledger_is_not_released(run, tmp_path, damage):
    path = run / "ckpt" / "12" / "manifest.json"
    values = json.loads(path.read_text())
    if damage == "nothing":
        del values["facts"]["model"]
    else:
        values["facts"]["model"]["program"]["optimizer.learning_rate"] = 0.25
    path.write_text(json.dumps(values))
    with pytest.raises(RunDirectoryError, match="does not say" if damage == "nothing" else "another program than"):
        quietly(run, tmp_path / "out")


def test_a_step_that_can_no_longer_be_committed_is_not_released(tmp_path):
    run = saved_but_not_committed(tmp_path / "run").directory.root
    record = read_run(run)
    record.directory.write_json(record.directory.ended, {"schema": 1, "ledger_sha256": record.ledger_sha256})
    with pytest.raises(RunDirectoryError, match="saved but not committed"):
        quietly(run, tmp_path / "out")
    (run / "secret.key").unlink()
    with pytest.raises(RunDirectoryError, match="saved but not committed"):
        quietly(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pretrained_weights_are_public_data_on_the_card_and_contradict_none(tmp_path):
    run = trained(tmp_path / "run", 6, facts={"pretrained": {"file": "vit.npz", "format": "npz"}})
    with pytest.raises(InputError, match="pre-trained weights count as public data: say what"):
        quietly(run, tmp_path / "out")
    said = ["privacy.public_data_used=ImageNet-21k", SAID[1]]
    weights = load_release(quietly(run, tmp_path / "out", statements=said)).card["pretrained_weights"]
    assert weights.startswith("vit.npz")
    assert "does not cover what they were trained on" in weights


@pytest.mark.parametrize("kind", ["plan from N", "rate given"])
def test_with_a_private_size_the_card_says_what_of_the_plan_was_made_from_it(tmp_path, kind):
    given = {"expected_batch_size": None, "sampling_rate": 0.05} if kind == "rate given" else {}
    run = trained(tmp_path / "run", 6, neighboring_relation="add_or_remove", **given)
    said = load_release(quietly(run, tmp_path / "out")).card["accountant_assumptions"]
    made = "the divisor" if kind == "rate given" else "the sampling rate"
    assert any(f"Made from the private number of records: {made};" in line for line in said)
    assert any("can compute the number" in line for line in said) == (kind == "plan from N")


@pytest.mark.parametrize("said", [(), SAID[:1], SAID[1:]])
def test_what_only_the_owner_knows_must_be_stated(run, tmp_path, said):
    """PRIVACY.md row 40."""
    with pytest.raises(InputError, match="not stated") as refusal:
        quietly(run, tmp_path / "out", statements=said)
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    for statement in SAID:
        assert (statement.split("=")[0] in str(refusal.value).split(": not stated")[0]) == (statement not in said)


def test_statements_of_the_config_are_enough_and_no_other_key_can_be_stated(run, tmp_path):
    path = run / "config.toml"
    said = '[privacy]\npublic_data_used = "CIFAR-10, for pre-training"\nhyperparameter_search = "private"\n'
    path.write_text(path.read_text().replace("[privacy]\n", said))
    card = load_release(quietly(run, tmp_path / "out", statements=())).card
    assert (card["public_data_used"], card["hyperparameter_search"]) == ("CIFAR-10, for pre-training", "private")
    for statement in ("privacy.delta=0.5", "privacy.unit=user", "privacy.insecure_seed=1", "nonsense"):
        with pytest.raises(InputError, match="cannot be said"):
            quietly(run, tmp_path / "other", statements=[*SAID, statement])
    with pytest.raises(InputError, match="hyperparameter_search"):
        quietly(run, tmp_path / "other", statements=["privacy.hyperparameter_search=maybe"])


def test_statements_are_part_of_neither_plan_nor_program_so_they_can_be_added_later():
    from dpscale.program import program_facts

    bare, said = config(), config(public_data_used="ImageNet", hyperparameter_search="public")
    assert PrivacyPlan.from_config(bare, num_examples=1621) == PrivacyPlan.from_config(said, num_examples=1621)
    weights, example = {"w": jnp.zeros(2)}, {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
    facts = [
        program_facts(each, lambda p, e: (p["w"] * e["x"]).sum(), weights, example, False) for each in (bare, said)
    ]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("is_public", [True, False])
def test_held_out_metrics_are_on_the_card_only_where_the_held_out_data_are_public(tmp_path, is_public):
    kind = "public" if is_public else "private"
    data = {"validation": "digits/validation", "validation_is": kind}
    run = trained(tmp_path / "run", 6, data=data)
    stream = PublicStream(run, validation_is="public")
    for step, accuracy in ((3, 0.25), (6, 0.515625)):
        stream.write(step, attempt=0, validation_accuracy=accuracy)
    stream.commit(6)
    stream.close()
    out = quietly(run, tmp_path / "out")
    assert load_release(out).card["public_results"] == ({"validation_accuracy": 0.515625} if is_public else {})
    assert (b"0.515625" in every_byte(out)) == is_public


def test_a_directory_with_something_in_it_is_refused_and_an_empty_one_taken(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(InputError, match="not an empty directory"):
            quietly(run, tmp_path / name)
    assert quietly(run, tmp_path / "empty").exists()
    with pytest.raises(InputError, match="not an empty directory"):
        quietly(run, tmp_path / "empty")


WRITES = ("write_weights", "write_json", "_promised", "_card", "write_atomically", "_sync", "sync_directory")


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_a_release_that_fails_at_any_write_leaves_nothing_behind(run, tmp_path, monkeypatch, write, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(release_module if hasattr(release_module, write) else release_files, write, fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        quietly(run, tmp_path / "target" / "out")
    left = [entry.name for entry in (tmp_path / "target").iterdir()]
    if write == "sync_directory" and left:  # fails after the rename: then it is whole
        assert load_release(tmp_path / "target" / "out").card["finished"]
    else:
        assert left == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if not left:
        quietly(run, tmp_path / "target" / "out")  # and the run is as it was


@pytest.mark.parametrize("file", ["weights.safetensors", "model.json", "privacy.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_release_with_a_changed_or_missing_file_is_not_loaded(run, tmp_path, file, damage):
    out = quietly(run, tmp_path / "out")
    if damage == "missing":
        (out / file).unlink()
    else:
        (out / file).write_bytes((out / file).read_bytes()[:-3] + b"   ")
    with pytest.raises(InputError):
        load_release(out)


def test_every_file_of_a_release_is_checked_and_no_other_is_taken(run, tmp_path):
    out = quietly(run, tmp_path / "out")
    listed = load_release(out).card["files"]
    assert set(listed) == {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} - {"privacy.json"}
    assert any(name.startswith("orbax/") for name in listed)
    for name in listed:
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept + b" ")
        with pytest.raises(InputError, match="is not the file that"):
            load_release(out)
        (out / name).write_bytes(kept)
    (out / "orbax" / "more").touch()
    with pytest.raises(InputError, match="not listed"):
        load_release(out)


def test_nobody_else_sees_a_release_before_it_is_whole_and_a_killed_ones_rest_is_removed(run, tmp_path, monkeypatch):
    rest = tmp_path / ".out.1.tmp"
    rest.mkdir()
    (rest / "weights.safetensors").touch()
    other = tmp_path / ".other.1.tmp"
    other.mkdir()
    modes = []

    def look(path, *rest, true=release_module.write_weights):
        modes.append(path.parent.stat().st_mode & 0o777)
        true(path, *rest)

    monkeypatch.setattr(release_module, "write_weights", look)
    out = quietly(run, tmp_path / "out")
    assert modes == [0o700]
    assert out.stat().st_mode == other.stat().st_mode  # as the umask has it
    assert not rest.exists()


def test_a_run_in_use_or_damaged_releases_nothing(run, tmp_path):
    lease = Lease(run / "lease")
    lease.acquire()
    try:
        with pytest.raises(RunDirectoryError, match="in use"):
            quietly(run, tmp_path / "out")
    finally:
        lease.release()
    weights = max((run / "ckpt" / "12").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunDirectoryError, match="checkpoint of step 12 is damaged"):
        quietly(run, tmp_path / "out")
    (run / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(PrivacyError):
        quietly(run, tmp_path / "out", step=3)
    with pytest.raises(RunDirectoryError, match="no run directory"):
        quietly(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_a_fixed_seed_the_card_promises_nothing_and_nothing_needs_to_be_stated(tmp_path):
    run = trained(tmp_path / "run", 6, insecure_seed=424242)
    out = quietly(run, tmp_path / "out", statements=())
    card = load_release(out).card
    assert (card["guarantee"], card["epsilon"]) == (False, None)
    assert "NO privacy guarantee" in (out / "PRIVACY.md").read_text()
    assert b"424242" not in every_byte(out)
    with pytest.raises(InputError, match="no secret"):
        quietly(run, tmp_path / "other", destroy_secret=True)


def test_destroying_the_secret_ends_the_run_for_good(run, tmp_path):
    """PRIVACY.md row 50."""
    os.link(run / "secret.key", tmp_path / "same blocks")
    secret = (run / "secret.key").read_bytes()
    said: list[str] = []
    out = quietly(run, tmp_path / "out", destroy_secret=True, report=said.append)
    assert not (run / "secret.key").exists()
    assert (tmp_path / "same blocks").read_bytes() != secret  # overwritten, not only unlinked
    assert secret.strip() not in every_byte(run) + every_byte(out)
    assert load_release(out).card["secret_destroyed"] is True
    assert "backups" in said[-1]
    record = read_run(run)
    assert record.charged_steps == STEPS
    assert "can no longer be verified" in "\n".join(spending_lines(record, [1e-4]))
    again = load_release(quietly(run, tmp_path / "again", step=3))
    assert again.card["secret_destroyed"] is True
    assert again.card["epsilon"] == record.plan.epsilon_after(STEPS)


def test_a_run_without_its_secret_cannot_go_on_nor_be_submitted(tmp_path):
    from launch.submission import Submission
    from launch.submit import submit_run

    run = trained(tmp_path / "run", 6)
    quietly(run, tmp_path / "out", destroy_secret=True)
    made = MadeRun.__new__(MadeRun)
    made.directory, made.config, made.facts = read_run(run).directory, config(), FACTS
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(RunDirectoryError, match="ended for good"):
        made.start()
    with pytest.raises(RunDirectoryError, match="ended for good"):
        made.start(new_attempt=True)
    asked = Submission(1, "1:00:00", 0, 1, None, "generic", "sbatch")
    with pytest.raises(RunDirectoryError, match="ended for good"):
        submit_run(config(), run, asked, new_attempt=False, dry_run=True)
    assert before == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert not (run / "secret.key").exists()


def test_a_ledger_that_was_altered_after_the_secret_was_gone_is_still_noticed(run, tmp_path):
    quietly(run, tmp_path / "out", destroy_secret=True)
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"to": 12', b'"to": 11'))
    with pytest.raises(InputError, match="altered"):
        app(["privacy", "show", str(run)], standalone_mode=False)


def test_killed_while_the_secret_was_destroyed_it_is_finished_the_next_time(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(release_module, "destroy", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quietly(run, tmp_path / "out", destroy_secret=True)
    assert (run / "secret.key").exists()
    assert not (tmp_path / "out").exists()
    assert read_run(run).verification.endswith(
        "ended, the secret is not yet destroyed (release --destroy-secret does it)"
    )
    ledger = (run / "ledger.jsonl").read_bytes()
    ended = (run / "ended.json").read_text()
    (run / "ledger.jsonl").write_bytes(changed := ledger.replace(b'"devices": 1', b'"devices": 2'))
    digests = [hashlib.sha256(each).hexdigest() for each in (ledger, changed)]
    (run / "ended.json").write_text(ended.replace(*digests))
    with pytest.raises(PrivacyError, match="chain of keyed digests"):  # both files changed: the secret still shows it
        read_run(run)
    (run / "ledger.jsonl").write_bytes(ledger)
    (run / "ended.json").write_text(ended)
    assert load_release(quietly(run, tmp_path / "kept")).card["secret_destroyed"] is False
    assert load_release(quietly(run, tmp_path / "out", destroy_secret=True)).card["secret_destroyed"] is True
    assert not (run / "secret.key").exists()


def test_the_secret_of_a_run_whose_ledger_is_damaged_is_never_destroyed(run, tmp_path):
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-30] + b"\n")
    with pytest.raises(PrivacyError):
        quietly(run, tmp_path / "out", destroy_secret=True)
    RootSecret.load(run / "secret.key")


def test_names_and_trees_are_one_to_one_whatever_the_keys():
    tree = {"a/b": {"~": np.zeros(2)}, "a": {"b": np.ones(()), "~1": [np.zeros(1), (np.ones(3),)]}}
    leaves = named_leaves(tree)
    assert set(leaves) == {"a~1b/~0", "a/b", "a/~01/0", "a/~01/1/0"}
    back = as_tree(leaves)
    assert back["a/b"]["~"].shape == (2,)
    assert back["a"]["b"].shape == ()
    assert back["a"]["~1"]["1"]["0"].shape == (3,)
    with pytest.raises(InputError, match="two parameters"):
        named_leaves({"1": np.zeros(1), 1: np.zeros(1)})
    for bad in ({"a": np.zeros(1), "a/b": np.zeros(1)}, {"a/b": np.zeros(1), "a": np.zeros(1)}):
        with pytest.raises(InputError, match="not written by dpscale"):
            as_tree(bad)


def check_that_the_ledger_is_as_documented(path: Path) -> None:
    """The fields that are written, kind by kind, are those of the table in docs/privacy.md."""
    docs = (Path(__file__).parent.parent / "docs" / "privacy.md").read_text()
    table = docs.split("| key | in | meaning |")[1].split("\n\n")[0].splitlines()[2:]
    documented: dict[str, set[str]] = {}
    written: dict[str, set[str]] = {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        written.setdefault(line["kind"], set()).update(line)
    for row in table:
        names, kinds, _ = (cell.strip() for cell in row.strip("|").split("|", 2))
        for kind in written if kinds == "all" else kinds.split(", "):
            documented.setdefault(kind, set()).update(name.strip("` ") for name in names.split(","))
    assert written == documented
    assert set(written) == {"begin", "verify", "open", "close", "release"}


@pytest.mark.slow
def test_what_was_trained_is_what_is_released_and_predicts_the_same(tmp_path):
    """From train to a rebuilt model, by the public names and the command line."""
    values = {
        "data": {"train": "digits/train", "validation": "digits/validation", "validation_is": "public"},
        "model": {"name": "mlp", "widths": [8]},
        "training": {"steps": 2},
        "privacy": {"epsilon": 8.0, "delta": 1e-4, "expected_batch_size": 60, "accountant": "rdp", "unit": "digit"},
    }
    made = config_from_dict(values)
    result = dpscale.train(made, tmp_path / "run", progress=False, report=lambda line: None)
    arguments = ["release", str(tmp_path / "run"), *SAID, "--out", str(tmp_path / "out"), "--destroy-secret"]
    app(arguments, standalone_mode=False)
    loaded = dpscale.load_release(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.params)
    from dpscale.data.open import open_source
    from dpscale.models import build_model

    model = build_model(loaded.model["name"], loaded.model["num_classes"], **loaded.model["options"])
    source = open_source("digits/validation")
    everything = source.rows(np.arange(len(source)))
    scaled = everything["features"].astype(np.float32) / loaded.model["preprocessing"]["full_scale"]
    logits = jax.vmap(lambda x: model.apply({"params": loaded.params}, x))(scaled)
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == everything["label"]))
    assert accuracy == pytest.approx(loaded.card["public_results"]["validation_accuracy"], abs=1e-6)
    assert "for each record (called 'digit') of the training data" in loaded.card["statement"]
    assert "laws held on 8 device(s) of 1 process(es) before the first step" in loaded.card["laws_checked"]
    check_that_the_ledger_is_as_documented(tmp_path / "run" / "ledger.jsonl")
    with pytest.raises(RunDirectoryError, match="ended for good"):
        dpscale.train(made, tmp_path / "run", progress=False, report=lambda line: None)
