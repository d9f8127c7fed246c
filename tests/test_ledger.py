"""Laws of the ledger: what is charged, what the chain sees, and what a crash can leave behind."""

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpscale.errors import InputError, PrivacyError
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import RootSecret

SECRET = RootSecret.from_insecure_seed(11)
FACTS = {"plan": "p", "program": "c"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(path: Path) -> Ledger:
    """Two attempts: 0 ran [0, 6) and fell back to 3 after 6 was committed; 1 has [3, 9) charged and 6 committed."""
    ledger = Ledger(path, SECRET)
    ledger.begin(0, 0, [])
    ledger.open_range(0, 0, 3, FACTS)
    ledger.open_range(0, 3, 6, FACTS)
    ledger.close(0, 3, 6)
    ledger.close(0, 6, 6)
    ledger.begin(1, 3, ["step 6 was lost"])
    ledger.open_range(1, 3, 6, FACTS)
    ledger.open_range(1, 6, 9, FACTS)
    ledger.close(1, 6, 9)
    return ledger


def test_charges_are_the_sum_over_attempts(tmp_path):
    assert write(tmp_path / "ledger").charged_steps == 6 + 6


def test_what_is_read_back_is_what_was_written(tmp_path):
    written, read = write(tmp_path / "ledger"), Ledger.load(tmp_path / "ledger", SECRET)
    assert (read.attempts, read.head, read.heads) == (written.attempts, written.head, written.heads)
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600


def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path):
    path = tmp_path / "ledger"
    write(path)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    path.write_bytes(whole[:start])
    before = Ledger.load(path, SECRET)
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        ledger = Ledger.load(path, SECRET)
        assert (ledger.attempts, ledger.head) == (before.attempts, before.head)
        assert path.read_bytes() == whole[:start]
    ledger.close(1, 6, 9)
    assert Ledger.load(path, SECRET).attempts == ledger.attempts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_a_whole_line_can_change_unseen(tmp_path_factory, place, bit):
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.unlink(missing_ok=True)
    write(path)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    if b"\n" not in data[-1:]:
        return
    try:
        ledger = Ledger.load(path, SECRET)
    except PrivacyError:
        return
    # Only what JSON does not tell apart may pass: the records are the same.
    lines = [json.loads(line) for line in bytes(data).splitlines()]
    assert [line["digest"] for line in lines] == ledger.heads
    assert ledger.charged_steps == 12


@pytest.mark.parametrize("damage", ["first", "middle", "swapped", "doubled"])
def test_a_removed_moved_or_doubled_line_is_seen(tmp_path, damage):
    path = tmp_path / "ledger"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines = {
        "first": lines[1:],
        "middle": lines[:3] + lines[4:],
        "swapped": [*lines[:3], lines[4], lines[3], *lines[5:]],
        "doubled": [*lines[:4], lines[3], *lines[4:]],
    }[damage]
    path.write_bytes(b"".join(lines))
    with pytest.raises(PrivacyError, match="chain of keyed digests"):
        Ledger.load(path, SECRET)


def test_another_runs_ledger_is_refused(tmp_path):
    write(tmp_path / "ledger")
    with pytest.raises(PrivacyError, match="another run"):
        Ledger.load(tmp_path / "ledger", RootSecret.from_insecure_seed(12))


def test_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "ledger").write_text('{"schema": 2, "kind": "open", "digest": "0"}\n')
    with pytest.raises(PrivacyError, match="schema 2"):
        Ledger.load(tmp_path / "ledger", SECRET)


def test_a_committed_step_cannot_run_again_in_its_attempt(tmp_path):
    ledger = write(tmp_path / "ledger")
    with pytest.raises(PrivacyError, match="run again"):
        ledger.open_range(1, 5, 9, FACTS)
    ledger.open_range(1, 6, 9, FACTS)
    assert ledger.charged_steps == 12


def test_the_step_that_an_attempt_began_at_counts_as_committed(tmp_path):
    ledger = Ledger(tmp_path / "ledger", SECRET)
    ledger.begin(4, 6, ["moved"])
    with pytest.raises(PrivacyError, match="run again"):
        ledger.open_range(4, 3, 9, FACTS)


def test_a_range_cannot_leave_a_gap(tmp_path):
    with pytest.raises(PrivacyError, match="lines were lost"):
        write(tmp_path / "ledger").open_range(1, 10, 12, FACTS)


def test_an_attempt_that_was_left_is_never_taken_up_again(tmp_path):
    ledger = write(tmp_path / "ledger")
    for act in (lambda: ledger.open_range(0, 6, 9, FACTS), lambda: ledger.close(0, 6, 6)):
        with pytest.raises(PrivacyError, match="not the current one"):
            act()
    with pytest.raises(PrivacyError, match="never used twice"):
        ledger.begin(0, 6, [])
    assert ledger.next_attempt() == 2


@pytest.mark.parametrize(("step", "to"), [(5, 9), (10, 12), (8, 7)])
def test_closing_never_moves_back_nor_beyond_what_was_charged(tmp_path, step, to):
    with pytest.raises(PrivacyError):
        write(tmp_path / "ledger").close(1, step, to)


def test_a_reopened_shorter_range_stays_charged_in_full_until_a_close(tmp_path):
    ledger = Ledger(tmp_path / "ledger", SECRET)
    ledger.begin(0, 0, [])
    ledger.open_range(0, 0, 100, FACTS)
    ledger.open_range(0, 0, 3, FACTS)
    assert ledger.charged_steps == 100
    ledger.close(0, 3, 3)
    assert ledger.charged_steps == 3


def test_a_second_generation_of_copies_draws_other_numbers():
    """B (a copy) counts on from its own number; C (a copy of B) must not meet it when it counts on from its own."""
    numbers = {}
    for name, drawn in (("B", [0, 2**62 + 9]), ("C", [0, 2**62 + 9, 2**62 + 1])):
        ledger = Ledger(Path("/nowhere"), SECRET)
        for number in drawn:
            ledger._take({"kind": "begin", "attempt": number, "from": 0}, "")
        numbers[name] = ledger.next_attempt()
    assert numbers["B"] != numbers["C"]


def test_a_full_disk_charges_or_refuses_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "ledger"
    ledger = write(path)
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # 20 bytes of the next line fit
    try:
        with pytest.raises(InputError, match="no step runs that is not recorded"):
            ledger.open_range(1, 9, 12, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    assert ledger.charged_steps == 12
    ledger.open_range(1, 9, 12, FACTS)
    assert Ledger.load(path, SECRET).charged_steps == 15


def test_the_ledger_holds_no_secret(tmp_path):
    write(tmp_path / "ledger")
    assert SECRET.for_other_processes() not in (tmp_path / "ledger").read_text()


def test_a_release_holds_the_run_to_the_steps_of_its_card(tmp_path):
    ledger = write(tmp_path / "ledger")
    with pytest.raises(PrivacyError, match="12 steps are charged"):
        ledger.release(6, 11)
    ledger.release(6, 14)
    ledger.release(6, 13)
    ledger.release(6, 20)  # the smallest counts: every card must stay true
    assert Ledger.load(tmp_path / "ledger", SECRET).promised == 13
    ledger.open_range(1, 9, 10, FACTS)
    with pytest.raises(PrivacyError, match="above the 13 steps that the card of a released model covers"):
        ledger.open_range(1, 10, 11, FACTS)
    ledger.begin(2, 6, ["step 9 was lost"])
    with pytest.raises(PrivacyError, match="13 steps"):
        ledger.open_range(2, 6, 7, FACTS)
    assert Ledger.load(tmp_path / "ledger", SECRET).charged_steps == 13


def test_what_no_dpscale_writes_around_a_release_is_refused(tmp_path, monkeypatch):
    ledger = write(tmp_path / "ledger")
    ledger.release(6, 12)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_breaks_a_promise", lambda *_: False)
        ledger.open_range(1, 9, 10, FACTS)
    with pytest.raises(PrivacyError, match="cannot follow the lines before it"):
        Ledger.load(tmp_path / "ledger", SECRET)


def test_a_verification_is_on_record_and_charges_nothing(tmp_path):
    ledger = write(tmp_path / "ledger")
    ledger.verified(1, 6, True, {"laws": 20, "devices": 2, "processes": 1, "whole": False})
    assert Ledger.load(tmp_path / "ledger", SECRET).charged_steps == 12
    with pytest.raises(PrivacyError, match="not the current one"):
        ledger.verified(0, 6, True, {})
