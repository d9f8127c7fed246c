"""Laws of `privacy show`: what a reader of a run is told, and what it must refuse to believe."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_fixtures import STEPS, MadeRun, made_run

from dpscale.cli import app
from dpscale.errors import DpscaleError, InputError
from dpscale.lease import Lease
from dpscale.privacy.accounting import epsilon
from dpscale.run_record import read_run
from dpscale.spending import segments_and_replays, spending_json, spending_lines


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """6 of 12 steps ran; the ledger's lines are begin, open, close, open, close."""
    return made_run(tmp_path_factory.mktemp("stopped") / "run").directory.root


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """A copy that nothing has started yet."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def show(*arguments) -> None:
    app(["privacy", "show", *map(str, arguments)], standalone_mode=False)


def refused(run: Path, part: str) -> None:
    with pytest.raises(InputError, match=part) as refusal:
        show(run)
    assert refusal.value.exit_code == 2


def of_steps(steps: int, delta: float = 1e-4) -> float:
    return epsilon(noise_multiplier=2.0, sampling_rate=100 / 1621, steps=steps, delta=delta)


def test_a_stop_that_was_not_planned_costs_the_planned_end_and_epsilon_so_far_is_labelled(run, capsys):
    """PRIVACY.md row 42 and rule 5: what ran is reported, and what holds for a stop chosen by results is T's."""
    show(run)
    lines = capsys.readouterr().out.splitlines()
    assert f"6 charged of {STEPS} planned; step 6 is saved" in next(line for line in lines if line.startswith("steps"))
    head = next(line for line in lines if line.startswith("epsilon"))
    assert "planned end" in head
    assert "if the stop was decided in advance" in head
    row = next(line for line in lines if "plan's delta" in line).split()
    assert [float(value) for value in row[:3]] == pytest.approx([1e-4, of_steps(STEPS), of_steps(6)], abs=1e-3)
    assert float(row[1]) >= of_steps(STEPS)  # rounded up, never down
    assert any("chosen by looking at results" in line for line in lines)


def test_a_finished_run_has_one_epsilon_that_of_the_steps_that_ran(tmp_path):
    record = read_run(made_run(tmp_path / "run", STEPS).directory.root)
    assert record.is_finished
    said = spending_json(record, [1e-4, 1e-6])
    assert [row["planned_end"] for row in said["epsilon"]] == [of_steps(STEPS), of_steps(STEPS, 1e-6)]
    assert not any("in advance" in line for line in spending_lines(record, [1e-4]))


def test_replays_are_free_new_attempts_are_charged_on_top_and_both_are_told(tmp_path):
    made = MadeRun(tmp_path / "run")
    made.open(0, 3)
    made.open(3, 6)
    made.save(3, 6)  # then killed, and started again on two devices
    made.start()
    made.open(3, 6, devices=2)
    made.save(6)
    made.start(new_attempt=True)
    made.open(6, 9)
    made.save(9, 9)
    record = read_run(made.directory.root)
    assert record.charged_steps == 6 + 3
    assert record.charged_at_end == 6 + (STEPS - 6)
    segments, replays = segments_and_replays(record)
    assert [(r.attempt, r.start, r.end) for r in replays] == [(0, 3, 6)]
    assert [(s.attempt, s.start, s.end, s.devices) for s in segments] == [(0, 0, 6, 1), (0, 3, 6, 2), (1, 6, 9, 1)]
    text = "\n".join(spending_lines(record, [1e-4]))
    for part in (
        "attempt      1: steps 6 to 9 charged (a new attempt was asked for)",
        "opened again",
        "charged on top",
    ):
        assert part in text


def test_an_open_range_is_charged_to_its_end_and_repeated_attempts_can_pass_the_plan(tmp_path):
    made = MadeRun(tmp_path / "run")
    made.open(0, 9)
    assert read_run(made.directory.root).charged_steps == 9
    made.save(9)
    made.start(new_attempt=True)
    record = read_run(made.directory.root)
    assert (record.charged_steps, record.charged_at_end) == (9, 9 + STEPS - 9)


def test_a_run_in_progress_is_read_without_the_lease_and_nothing_is_written(run):
    lease = Lease(run / "lease")
    lease.acquire()
    try:
        with (run / "ledger.jsonl").open("ab") as ledger:
            ledger.write(b'{"half a li')
        for entry in [run, *run.rglob("*")]:
            entry.chmod(0o500 if entry.is_dir() else 0o400)
        before = {entry: (entry.stat().st_mtime_ns, entry.is_file() and entry.read_bytes()) for entry in run.rglob("*")}
        text = "\n".join(spending_lines(read_run(run), [1e-4]))
        after = {entry: (entry.stat().st_mtime_ns, entry.is_file() and entry.read_bytes()) for entry in run.rglob("*")}
    finally:
        for entry in [run, *run.rglob("*")]:
            entry.chmod(0o700 if entry.is_dir() else 0o600)
        lease.release()
    assert "11 bytes of a line being written" in text
    assert after == before


def test_reading_a_run_starts_no_jax(run):
    code = (
        "import sys; from dpscale.run_record import read_run; from dpscale.spending import spending_lines; "
        f"list(spending_lines(read_run({str(run)!r}), [1e-4])); sys.exit('jax' in sys.modules and 'jax is in')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("altered", "line 4 does not continue .* this line was changed, or a line before it was removed"),
        ("lost", "line 3 does not continue .* this line was changed, or a line before it was removed"),
        ("swapped", "a line was removed, moved or doubled"),
        ("doubled", "a line was removed, moved or doubled"),
        ("truncated", "the file was truncated"),
        ("emptied", "missing or empty"),
        ("removed", "missing or empty"),
        ("no record", "line 2 is no ledger record"),
    ],
)
def test_a_damaged_ledger_is_refused_in_plain_words_with_exit_code_2(run, damage, part):
    path = run / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines = {
        "altered": [*lines[:3], lines[3].replace(b'"to": 6', b'"to": 5'), *lines[4:]],
        "lost": lines[:2] + lines[3:],
        "swapped": [*lines[:2], lines[3], lines[2], *lines[4:]],
        "doubled": [*lines[:3], lines[2], *lines[3:]],
        "truncated": lines[:3],
        "emptied": [],
        "removed": [],
        "no record": [lines[0], b"\xff\n", *lines[1:]],
    }[damage]
    path.write_bytes(b"".join(lines))
    if damage == "removed":
        path.unlink()
    refused(run, part)


def test_a_line_lost_within_what_is_charged_is_seen_by_the_head_that_the_checkpoint_keeps(tmp_path):
    made = MadeRun(tmp_path / "run")
    made.open(0, STEPS)
    made.save(3, STEPS)
    made.save(6, STEPS)  # after the line that closed step 3
    path = made.directory.ledger
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    refused(tmp_path / "run", "the file was truncated")


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("ledger.jsonl", "belongs to another run"),
        ("plan.json", "another plan than"),
        ("secret.key", "the secret is not the one"),
        ("ckpt/6/manifest.json", "the checkpoint is another run's"),
    ],
)
def test_a_file_of_another_run_is_refused_with_the_reason(run, tmp_path, file, part):
    other = made_run(tmp_path / "other", noise_multiplier=3.0).directory.root
    shutil.copy(other / file, run / file)
    refused(run, part)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("run.json", "not of schema 1"),
        ("plan.json", "does not say schema_version 1"),
        ("ledger.jsonl", "line 1 has schema 2: this dpscale reads schema 1"),
        ("ckpt/6/manifest.json", "has schema 2, this dpscale reads 1"),
    ],
)
def test_a_file_of_a_newer_version_is_refused_with_the_reason(run, file, part):
    text = (run / file).read_text()
    newer = text.replace('"schema": 1', '"schema": 2').replace('"schema_version": 1', '"schema_version": 2')
    assert newer != text
    (run / file).write_text(newer)
    refused(run, part)


@pytest.mark.parametrize("edit", ["ledger_head", "facts", "step"])
def test_a_manifest_without_its_ledger_head_is_no_witness(run, edit):
    path = run / "ckpt" / "6" / "manifest.json"
    values = json.loads(path.read_text())
    if edit == "step":
        values["step"] = 7  # then it is no manifest of that directory, and the one of step 3 is the newest
        path.write_text(json.dumps(values))
        assert [found.step for found in read_run(run).saved] == [3]
        return
    values["facts"] = {"attempt": 0} if edit == "ledger_head" else {"attempt": 0, "ledger_head": ["a list"]}
    path.write_text(json.dumps(values))
    refused(run, "lines were lost")


def test_no_run_is_no_run(tmp_path):
    refused(tmp_path, "no run directory")


def test_without_privacy_or_with_a_fixed_seed_nothing_is_promised(tmp_path):
    seeded = made_run(tmp_path / "seeded", insecure_seed=1).directory.root
    text = "\n".join(spending_lines(read_run(seeded), [1e-4]))
    assert "NO guarantee" in text
    assert spending_json(read_run(seeded), [1e-4])["epsilon"] == []
    plain = made_run(tmp_path / "plain", enabled=False).directory.root
    assert "no guarantee" in "\n".join(spending_lines(read_run(plain), []))


def test_a_delta_below_what_can_be_resolved_is_said_to_be_so(run, capsys):
    show(run, "--delta", "1e-15")
    assert "1e-15     too small for the pld accountant" in capsys.readouterr().out


def test_json_and_text_say_the_same(run, capsys):
    show(run, "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["steps_charged"], said["steps_charged_at_planned_end"], said["finished"]) == (6, STEPS, False)
    assert said["epsilon"][0] == {
        "delta": 1e-4,
        "if_released": of_steps(STEPS),
        "planned_end": of_steps(STEPS),
        "if_the_stop_was_decided_in_advance": of_steps(6),
    }


FILES = ("ledger.jsonl", "plan.json", "run.json", "ckpt/6/manifest.json", "secret.key", "config.toml")
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40), st.binary(max_size=8)), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(file=st.sampled_from(FILES), edits=EDITS)
def test_whatever_bytes_a_file_holds_the_reader_refuses_or_charges_no_less(stopped, tmp_path_factory, file, edits):
    """Removed, inserted and replaced bytes, truncation included: an error of ours, or no lower charge."""
    copy = tmp_path_factory.getbasetemp() / "fuzzed"
    if not copy.exists():
        shutil.copytree(stopped, copy)
    whole = (stopped / file).read_bytes()
    data = whole
    for place, length, new in edits:
        start = int(place * len(data))
        data = data[:start] + new + data[start + length :]
    (copy / file).write_bytes(data)
    try:
        record = read_run(copy)
    except DpscaleError:
        return
    finally:
        (copy / file).write_bytes(whole)
    if file != "ckpt/6/manifest.json":  # without it, an older checkpoint is the witness
        assert record.charged_steps >= 6
    assert record.plan.noise_multiplier == 2.0
    assert record.charged_at_end >= record.charged_steps


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["schema", "kind", "attempt", "from", "to", "step", "plan", "digest", "x"]),
                        inner,
                        max_size=9,
                    )
                ),
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=4,
    )
)
def test_any_bytes_are_a_ledger_or_an_error_of_ours(lines):
    from dpscale.privacy.ledger import Ledger
    from dpscale.privacy.secret import RootSecret

    for secret in (RootSecret.from_insecure_seed(1), None):
        try:
            ledger = Ledger.parse(Path("ledger"), b"\n".join([*lines, b""]), secret)
        except DpscaleError:
            continue
        assert ledger.charged_steps >= 0


def test_deeply_nested_and_huge_values_are_refused_like_any_other():
    from dpscale.privacy.ledger import Ledger

    for line in (b"[" * 100_000, b'{"schema": 1, "a": ' + b"9" * 5000 + b"}", b'{"schema": 1, "digest": NaN}'):
        with pytest.raises(DpscaleError):
            Ledger.parse(Path("ledger"), line + b"\n", None)
