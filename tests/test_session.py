"""Laws of opening a run: a model of runs that are killed, damaged, copied and changed, against the real decisions."""

import functools
import itertools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpscale import session
from dpscale.config import config_from_dict
from dpscale.errors import DpscaleError, InputError, PrivacyError, RunDirectoryError
from dpscale.manifest import Found
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.run_directory import RunDirectory
from dpscale.run_record import RunRecord

STEPS, EVERY, RESERVE = 12, 3, 2
SECRET = RootSecret.from_insecure_seed(3)
FACTS = {"plan": "p"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclass
class Saved:
    """A checkpoint of the model: the (attempt, step, world) that made its parameters, one after the other."""

    lineage: tuple
    facts: dict[str, Any]
    whole: bool = True


@dataclass
class Store:
    """Stands for Checkpoints: what is durable, with or without a manifest, whole or damaged."""

    saved: dict[int, Saved] = field(default_factory=dict)
    bad: dict[int, Saved] = field(default_factory=dict)

    def steps(self):
        return sorted(self.saved)

    def newest_good(self, report, committed):
        steps = self.steps()
        for step in reversed(steps):
            found = self.saved[step]
            if found.whole and (found.facts or (step == steps[-1] and step > committed)):
                return Found(step, found.facts)
            self.bad[step] = self.saved.pop(step)
        if steps:
            raise RunDirectoryError("none is whole")
        return None

    def adopt(self, found, facts):
        self.saved[found.step].facts = self.saved[found.step].facts or facts


class World:
    """One directory, and the process that may run in it. `seen` and `made` are shared by all copies."""

    def __init__(self, path: Path, store: Store, shared: "Shared", budget: float | None, name: int):
        self.path, self.store, self.shared, self.budget, self.name = path, store, shared, budget, name
        self.moved, self.process = name > 0, None
        self.promises: list[int] = []
        self.keys: set = set()  # every (attempt, step) that was ever saved here, or in what this is a copy of

    @property
    def plan(self) -> Any:
        plan: Any = SimpleNamespace(steps=STEPS, chargeable_steps=STEPS + RESERVE, epsilon_target=self.budget)
        plan.last_step = functools.partial(PrivacyPlan.last_step, plan)
        return plan

    def release(self):
        """What `dpscale release` writes of a run that nobody is running."""
        self.kill()
        ledger = Ledger.load(self.path, SECRET)
        if ledger.current is None or not self.store.steps():
            return
        facts: dict[str, Any] = dict.fromkeys(("directory", "config", "ended"))
        record = RunRecord(
            plan=self.plan, identity={}, secret=SECRET, saved=[], ledger=ledger, ledger_sha256="", **facts
        )
        self.promises.append(record.covered_steps)
        assert record.covered_steps >= ledger.charged_steps
        ledger.release(self.store.steps()[-1], record.covered_steps)
        assert record.covered_steps == self.promises[-1], "the card would say something else when it is made again"

    def start(self, changed: bool):
        if self.process is not None:
            return
        ledger = Ledger.load(self.path, SECRET)
        plan = self.plan
        for asked in (changed, True):  # a refusal is answered by --new-attempt
            try:
                brief = session._brief(
                    ledger,
                    plan,
                    SECRET,
                    self.store,
                    lambda line: None,
                    moved=self.moved,
                    changed=[],
                    asked=asked,
                    model={},
                )
                break
            except RunDirectoryError:
                continue
        self.moved = False
        lineage = self.store.saved[brief.start_step].lineage if brief.restore else ()
        self.process = SimpleNamespace(
            brief=brief, ledger=ledger, step=brief.start_step, range_end=0, lineage=lineage, saving=None
        )

    def run_step(self):
        p = self.process
        if p is None or p.step >= p.brief.last_step:
            return
        if p.step >= p.range_end:
            p.range_end = min((p.step // EVERY + 1) * EVERY, p.brief.last_step)
            p.ledger.open_range(p.brief.attempt, p.step, p.range_end, FACTS)
        self.shared.draw(p.brief.attempt, p.step, p.lineage)
        p.lineage, p.step = (*p.lineage, (p.brief.attempt, p.step, self.name)), p.step + 1

    def advance_save(self):
        """One of the four writes of a save: the copy, Orbax's rename, the manifest, the closing record."""
        p = self.process
        if p is None:
            return
        if p.saving is None:
            if p.step not in self.store.saved:
                p.saving = ("copied", p.step, p.lineage, p.ledger.head)
            return
        stage, step, lineage, head = p.saving
        if stage == "copied":
            self.store.saved[step] = Saved(lineage, {})
            self.shared.seen |= {(attempt, at) for attempt, at, _ in lineage}
            p.saving = ("renamed", step, lineage, head)
        elif stage == "renamed":
            self.store.saved[step].facts = {"attempt": p.brief.attempt, "ledger_head": head}
            p.saving = ("manifest", step, lineage, head)
            for old in self.store.steps()[:-2]:
                del self.store.saved[old]
        else:
            p.ledger.close(p.brief.attempt, step, max(step, p.range_end))
            p.saving = None

    def end_well(self):
        p = self.process
        if p is None or (p.saving is None and p.step in self.store.saved and p.step == p.brief.start_step):
            return self.kill()
        while p.saving is not None:
            self.advance_save()
        if p.step not in self.store.saved:
            self.advance_save()
            while p.saving is not None:
                self.advance_save()
        p.ledger.close(p.brief.attempt, p.step, p.step)
        return self.kill()

    def kill(self):
        self.process = None

    def copy(self, place: Path, name: int) -> "World":
        twin = World(place / str(name), Store(), self.shared, self.budget, name)
        if self.path.exists():
            shutil.copy(self.path, twin.path)
        twin.promises = list(self.promises)
        twin.store.saved = {step: Saved(s.lineage, dict(s.facts), s.whole) for step, s in self.store.saved.items()}
        return twin

    def check(self):
        self.keys |= {(attempt, at) for saved in self.store.saved.values() for attempt, at, _ in saved.lineage}
        ledger = Ledger.load(self.path, SECRET)
        assert len(self.keys) <= ledger.charged_steps, "steps whose results may have been seen are not charged"
        assert all(ledger.charged_steps <= promise for promise in self.promises), "a card is no longer true"
        if self.budget is not None:
            assert ledger.charged_steps <= STEPS + RESERVE, "more was charged than the allowed epsilon has room for"

    def restore_damaged(self):
        """The owner puts a checkpoint back from a backup."""
        for step, saved in self.store.bad.items():
            if saved.facts and self.process is None:
                self.store.saved[step] = Saved(saved.lineage, saved.facts)

    def damage_newest(self):
        if self.process is None and len(self.store.saved) > 1:
            self.store.saved[max(self.store.saved)].whole = False


@dataclass
class Shared:
    """What must hold over all copies: what ran under which key, and which results may have been seen."""

    seen: set = field(default_factory=set)
    drawn: dict = field(default_factory=dict)

    def draw(self, attempt: int, step: int, lineage: tuple):
        assert (attempt, step) not in self.seen, "a step whose result may have been seen ran again with its noise"
        before = self.drawn.setdefault((attempt, step), lineage)
        assert before == lineage, "one key was used with two starting states"


OPERATIONS = (
    "run",
    "run",
    "run",
    "save",
    "save",
    "changed",
    "end",
    "finish",
    "kill",
    "kill",
    "damage",
    "damage",
    "restore",
    "copy",
    "release",
    "release",
)


def play(world: World, operation: str, count: int) -> None:
    """One move: `count` says how many steps or writes it has."""
    if operation in ("run", "changed"):
        world.start(changed=operation == "changed")
        for _ in range(count):
            world.run_step()
    elif operation == "save":
        for _ in range(count):
            world.advance_save()
    elif operation == "damage":
        world.kill()
        world.damage_newest()
    elif operation == "restore":
        world.kill()
        world.restore_damaged()
    elif operation == "release":
        world.release()
    elif operation == "finish":
        world.start(changed=False)
        for _ in range(STEPS):
            world.run_step()
        world.end_well()
    elif operation == "end":
        world.end_well()
    else:
        world.kill()


def scenario(text: str) -> list[tuple[str, int, int]]:
    """Moves of the first world, as "run 3, save 4"."""
    return [(name, 0, int(count)) for name, count in (move.split() for move in text.split(", "))]


SAVED_3_AND_6 = "run 3, save 4, run 3, save 4"


@example(
    scenario("run 3, save 4, run 3, save 2, kill 1, run 1, damage 1, run 3"), None
)  # 6 has neither manifest nor record
@example(scenario("run 3, save 4, run 3, save 3, kill 1, run 1, damage 1, run 3"), None)  # 6 has no record
@example(scenario(f"{SAVED_3_AND_6}, run 3, save 3, kill 1, run 1, damage 1, run 1, damage 1, run 3"), None)
@example(scenario(f"{SAVED_3_AND_6}, damage 1, run 4, kill 1, restore 1, run 3"), None)
@example(scenario(f"{SAVED_3_AND_6}, damage 1, run 1, save 4, kill 1, finish 1"), 3.0)
@example(scenario(f"{SAVED_3_AND_6}, release 1, damage 1, run 4, save 4, damage 1, finish 1, release 1"), None)
@example(scenario("finish 1, release 1, damage 1, changed 4, save 4, finish 1"), 3.0)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    moves=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2), st.integers(1, 4)), max_size=30),
    budget=st.sampled_from([None, 3.0]),
)
def test_no_key_is_used_twice_and_no_seen_step_is_uncharged(tmp_path_factory, moves, budget):
    place = tmp_path_factory.getbasetemp() / "worlds"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shared = Shared()
    worlds = [World(place / "0", Store(), shared, budget, 0)]
    for operation, index, count in moves:
        world = worlds[index % len(worlds)]
        if operation != "copy":
            play(world, operation, count)
        elif len(worlds) < 3:
            worlds.append(world.copy(place, len(worlds)))
        for each in worlds:
            each.check()


PROGRAM = {"optimizer.learning_rate": 0.5, "loss": "a"}


def config(**privacy):
    values = {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 20, "accountant": "rdp"} | privacy
    return config_from_dict({"training": {"steps": STEPS}, "privacy": values})


def opened(root: Path, *, program=PROGRAM, data=b"data", new_attempt=False, store=None, said=None, **privacy):
    directory = RunDirectory.at(root)
    directory.prepare()
    report = said.append if said is not None else (lambda line: None)
    store = store or Store()
    return session.open_session(
        directory, config(**privacy), 100, data, program, store, new_attempt=new_attempt, report=report
    )


def saved_run(root: Path, **privacy) -> tuple[Store, Ledger]:
    """A run stopped after 6 of 12 steps, both checkpoints whole."""
    brief, ledger = opened(root, **privacy)
    store = Store()
    plan = brief.plan.digest()
    for step in (3, 6):
        ledger.open_range(0, step - 3, step, {"plan": plan})
        store.saved[step] = Saved((), {"attempt": 0, "ledger_head": ledger.head})
        ledger.close(0, step, step)
    return store, ledger


@pytest.mark.parametrize(("reserve", "last"), [(0, 9), (2, 11), (3, 12), (10, 12)])
def test_reserved_steps_are_used_up_before_a_run_is_shortened(reserve, last):
    asked = config(noise_multiplier=None, epsilon=2.0, replay_reserve=reserve)
    plan = PrivacyPlan.from_config(asked, num_examples=100)
    brief = session.Briefing(plan, SECRET, 1, start_step=6, attempt_start=6, charged_before=9, restore=True)
    assert brief.last_step == last
    assert plan.epsilon_after(brief.charged_at(brief.last_step)) <= 2.0


def test_two_runs_of_one_config_have_different_secrets(tmp_path):
    first, second = (opened(tmp_path / name)[0].secret for name in ("a", "b"))
    assert first != second
    assert (tmp_path / "a" / "secret.key").stat().st_mode & 0o777 == 0o600


def test_the_secret_is_in_one_file_only(tmp_path):
    secret = opened(tmp_path / "a")[0].secret
    text = secret.for_other_processes()
    forms = (text.encode(), text.upper().encode(), bytes.fromhex(text), str(int(text, 16)).encode())
    holders = {f.name for f in (tmp_path / "a").rglob("*") if f.is_file() and any(x in f.read_bytes() for x in forms)}
    assert holders == {"secret.key"}


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_run_killed_while_it_was_set_up_is_set_up_again(tmp_path, written):
    survivors = ["secret.key", "config.toml", "plan.json"][:written]
    opened(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        if file.is_file() and file.name not in survivors:
            file.unlink()
    if written == 1:
        (tmp_path / "a" / "secret.key").write_bytes(b"")  # torn
    brief, _ = opened(tmp_path / "a")
    assert (brief.attempt, brief.start_step, brief.restore) == (0, 0, False)


@pytest.mark.parametrize("left", ["ledger.jsonl", "checkpoints"])
def test_a_lost_run_json_never_costs_the_secret(tmp_path, left):
    store, _ = saved_run(tmp_path / "a")
    key = (tmp_path / "a" / "secret.key").read_bytes()
    (tmp_path / "a" / "run.json").unlink()
    if left == "checkpoints":
        (tmp_path / "a" / "ledger.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match="files are missing"):
        opened(tmp_path / "a", store=store if left == "checkpoints" else Store())
    assert (tmp_path / "a" / "secret.key").read_bytes() == key


def test_a_stopped_run_goes_on_in_its_attempt(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    brief, ledger = opened(tmp_path / "a", store=store)
    assert (brief.attempt, brief.start_step, brief.attempt_start, brief.charged_before) == (0, 6, 0, 0)
    assert brief.charged_at(7) == 7
    assert len(ledger.heads) == 5  # nothing was written


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"program": PROGRAM | {"optimizer.learning_rate": 0.25}}, "optimizer.learning_rate: 0.5 -> 0.25"),
        ({"program": PROGRAM | {"loss": "b"}}, "loss: 'a' -> 'b'"),
        ({"noise_multiplier": 2.0}, "noise_multiplier: 1.0 -> 2.0"),
        ({"expected_batch_size": 10}, "sampling_rate: 0.2 -> 0.1"),
        ({"clip_norm": 0.5}, "clip_norm: 1.0 -> 0.5"),
        ({"data": b"other"}, "training data differ"),
        ({"insecure_seed": 1}, "true secret"),
    ],
)
def test_a_change_is_refused_with_the_difference_and_changes_nothing(tmp_path, change, shown):
    store, _ = saved_run(tmp_path / "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.is_file()}
    with pytest.raises(RunDirectoryError, match=shown) as refusal:
        opened(tmp_path / "a", store=store, **change)
    assert refusal.value.exit_code == 2
    assert before == {file: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.is_file()}


@pytest.mark.parametrize("change", [{"noise_multiplier": 2.0}, {"data": b"other"}])
def test_a_new_attempt_does_not_excuse_another_plan_or_other_data(tmp_path, change):
    store, _ = saved_run(tmp_path / "a")
    with pytest.raises(RunDirectoryError):
        opened(tmp_path / "a", store=store, new_attempt=True, **change)


def test_an_edited_run_json_does_not_let_another_program_use_the_noise_again(tmp_path):
    brief, ledger = opened(tmp_path / "a")
    ledger.open_range(0, 0, 3, session.ledger_facts(brief.plan, PROGRAM, 1, "cpu"))
    other = PROGRAM | {"optimizer.learning_rate": 0.25}
    file = tmp_path / "a" / "run.json"
    file.write_text(file.read_text().replace('"optimizer.learning_rate": 0.5', '"optimizer.learning_rate": 0.25'))
    for new_attempt in (False, True):
        with pytest.raises(PrivacyError, match="states another program than"):
            opened(tmp_path / "a", program=other, new_attempt=new_attempt)


def test_another_seed_or_secret_is_named_as_such(tmp_path):
    opened(tmp_path / "a", insecure_seed=1)
    with pytest.raises(RunDirectoryError, match="secret is not the one"):
        opened(tmp_path / "a", insecure_seed=2)


def test_a_new_attempt_is_charged_on_top_with_other_keys_for_batch_and_noise(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    changed = PROGRAM | {"optimizer.learning_rate": 0.25}
    brief, ledger = opened(tmp_path / "a", store=store, program=changed, new_attempt=True)
    assert (brief.attempt, brief.start_step, brief.charged_before) == (1, 6, 6)
    ledger.open_range(1, 6, 12, {"plan": brief.plan.digest()})
    assert ledger.charged_steps == brief.charged_at(12) == 12
    for step, purpose in itertools.product(range(12), ("noise", "augmentation")):
        assert brief.secret.derive(purpose, 0, step) != brief.secret.derive(purpose, 1, step)


@pytest.mark.parametrize("how", ["changed", "copied"])
def test_a_kill_before_the_first_draw_does_not_hide_that_a_new_attempt_was_due(tmp_path, how):
    """Between the decision and the first step lie seconds of compilation."""
    store, _ = saved_run(tmp_path / "a")
    root, program = tmp_path / "a", PROGRAM
    if how == "copied":
        root = tmp_path / "b"
        shutil.copytree(tmp_path / "a", root)
    else:
        program = PROGRAM | {"loss": "b"}
    first, _ = opened(root, store=store, program=program, new_attempt=how == "changed")
    again, _ = opened(root, store=store, program=program)  # the process was killed; nothing looks new any more
    assert first.attempt == again.attempt != 0


def test_killed_between_the_new_attempt_and_run_json_it_is_found_again(tmp_path, monkeypatch):
    store, _ = saved_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path / "b", store=store)
    brief, ledger = opened(tmp_path / "b", store=store)
    assert len(ledger.attempts) == 3
    assert brief.attempt == ledger.attempts[-1].number
    assert brief.charged_before == 6


def test_copies_of_one_directory_share_no_key_even_before_the_first_step(tmp_path):
    opened(tmp_path / "a")
    (tmp_path / "a" / "ledger.jsonl").unlink()  # killed right after run.json
    numbers = [opened(tmp_path / "a")[0].attempt]
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        numbers.append(opened(tmp_path / name)[0].attempt)
    assert numbers[0] == 0
    assert len(set(numbers)) == 3


def test_a_moved_directory_gets_a_new_attempt_once(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    said: list[str] = []
    first, _ = opened(tmp_path / "b", store=store, said=said)
    second, _ = opened(tmp_path / "b", store=store)
    assert first.attempt == second.attempt > 2**61
    assert "copied or moved" in said[0]


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_ledger_lines_lost_beside_a_checkpoint_are_seen(tmp_path, lost):
    """Line 5, the last, says that step 6 was committed: without it the run is charged more, never less."""
    store, _ = saved_run(tmp_path / "a")
    ledger = tmp_path / "a" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[: 5 - lost]))
    if lost == 1:
        brief, again = opened(tmp_path / "a", store=store)
        assert (brief.start_step, again.charged_steps) == (6, 6)
        return
    with pytest.raises(PrivacyError, match="lines were lost"):
        opened(tmp_path / "a", store=store)


def test_a_checkpoint_without_manifest_cannot_hide_lost_lines(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    store.saved[9] = Saved((), {})
    with pytest.raises(PrivacyError, match="lines were lost"):
        opened(tmp_path / "a", store=store)


def test_a_missing_ledger_is_never_made_anew(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    (tmp_path / "a" / "ledger.jsonl").unlink()
    with pytest.raises(PrivacyError, match="restore it"):
        opened(tmp_path / "a", store=store)


def test_a_ledger_of_another_plan_is_refused(tmp_path):
    store, ledger = saved_run(tmp_path / "a")
    ledger.open_range(0, 6, 9, {"plan": "another"})
    with pytest.raises(PrivacyError, match="another plan"):
        opened(tmp_path / "a", store=store)


def test_no_fresh_start_in_silence_when_every_checkpoint_is_gone(tmp_path):
    saved_run(tmp_path / "a")
    for _ in range(2):  # also when it is started again, as a requeued job is
        with pytest.raises(RunDirectoryError, match="no checkpoint is left"):
            opened(tmp_path / "a")
    brief, _ = opened(tmp_path / "a", new_attempt=True)
    assert (brief.attempt, brief.start_step, brief.charged_before, brief.restore) == (1, 0, 6, False)


def test_a_run_that_is_not_finished_is_not_marked_so(tmp_path):
    store, _ = saved_run(tmp_path / "a")
    (tmp_path / "a" / "finished").touch()
    opened(tmp_path / "a", store=store)
    assert not (tmp_path / "a" / "finished").exists()


def test_an_identity_file_without_its_keys_is_bad_input(tmp_path):
    opened(tmp_path / "a")
    for text in ("{}", "[]", "{", '{"schema": 9}'):
        (tmp_path / "a" / "run.json").write_text(text)
        with pytest.raises(InputError):
            opened(tmp_path / "a")


def test_a_full_disk_while_setting_up_is_one_clear_error_and_a_second_start_works(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DpscaleError, match="No space left"):
            opened(tmp_path / "a")
    opened(tmp_path / "a")


def test_the_briefing_survives_the_way_to_the_other_processes(tmp_path):
    brief, _ = opened(tmp_path / "a")
    assert session.Briefing.from_json(brief.to_json()) == brief
    assert "hidden" in repr(brief)
    assert brief.secret.for_other_processes() not in repr(brief)
