"""Laws of charged ranges: agreed on before they are opened, by a check sent so early that no device waits for it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_loop import KEYS, NOTHING
from test_replicas import with_one_device_different
from test_train import run

from dpscale.checkpoint import read_parameters
from dpscale.errors import DivergedError
from dpscale.loop import STEPS_IN_FLIGHT, training_steps
from dpscale.mesh import data_mesh, place_replicated
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import RootSecret
from dpscale.ranges import OPENED_AHEAD, STEPS_AHEAD, Ranges
from dpscale.replicas import ReplicaCheck
from dpscale.state import RIDERS, TrainState
from dpscale.step import StepFunctions

PLANS = [
    (0, 20, 10), (0, 20, 1), (0, 9, 2), (0, 9, 3), (0, 12, STEPS_AHEAD), (0, 12, STEPS_AHEAD + 1),
    (3, 20, 10), (7, 20, 10), (9, 20, 10), (10, 20, 10), (19, 20, 10), (0, 7, 100), (99, 103, 100), (5, 6, 1),
]  # fmt: skip


class Sent:
    """Stands for a check: writes down when it is read."""

    def __init__(self, events: list[tuple[str, int]], start: int) -> None:
        self.events, self.start = events, start

    def agreed(self) -> bytes:
        self.events.append(("read", self.start))
        return bytes(4)


def looped(first: int, last: int, length: int, stop_at: int | None = None) -> list[tuple[str, int]]:
    """What happens in the loop, in order: checks sent and read, ranges opened, steps sent, results read."""
    events: list[tuple[str, int]] = []
    ranges = Ranges(first, last, length)

    def send(start: int) -> Any:
        events.append(("check", start))
        return Sent(events, start)

    def charge(step: int) -> None:
        for opening in ranges.before(step, send):
            assert opening.state_step == max(first, opening.start - STEPS_AHEAD)
            events.append(("open to", opening.end))

    def finalize(state: Any, sums: Any, requests: Any, key: Any) -> Any:
        events.append(("send", state.step))
        reduced = NOTHING._replace(stop=float(state.step == stop_at))
        return TrainState(state.step + 1, None, None), sums, np.array(reduced[:RIDERS], np.float32)

    functions: Any = StepFunctions(None, finalize, lambda: None)
    state: Any = TrainState(first, None, None)
    for _ in training_steps(
        functions,
        state,
        {},
        lambda step: [],
        KEYS,
        range(first, last),
        charge,
        lambda: None,
        lambda done, statistics: events.append(("results", done - 1)),
    ):
        pass
    return events


@pytest.mark.parametrize(("first", "last", "length"), PLANS)
def test_every_step_is_in_a_range_that_was_agreed_on_and_opened_before_it_was_sent(first, last, length):
    events = looped(first, last, length)
    charged_to, agreed = first, set()
    for name, step in events:
        if name == "read":
            agreed.add(step)
        elif name == "open to":
            assert charged_to in agreed, "opened before it was agreed on"
            assert charged_to == first or charged_to % length == 0
            assert charged_to < step <= last
            charged_to = step
        elif name == "send":
            assert step < charged_to, "sent before it was charged"
            # Who sends a step has the results of the step that was sent so much earlier, and of nothing later.
            soon = min(step + STEPS_IN_FLIGHT, last - 1)
            assert soon < charged_to, "another process may send a step before process 0 has charged it"
    assert charged_to == last
    starts = [step for name, step in events if name == "check"]
    assert starts == sorted(set(starts)), "not one check a range, in order"


@pytest.mark.parametrize(("first", "last", "length"), PLANS)
def test_no_check_that_is_read_can_keep_the_devices_waiting(first, last, length):
    """What is read was sent before a step whose results the loop has already, or before the very first step."""
    events = looped(first, last, length)
    begun = events.index(("send", first))
    for place, (name, start) in enumerate(events):
        if name == "read" and place > begun:
            sent = events.index(("check", start))
            after_it = [step for what, step in events[sent:place] if what == "send"]
            results = [step for what, step in events[:place] if what == "results"]
            assert after_it == list(range(max(first, start - STEPS_AHEAD), start - OPENED_AHEAD))
            assert set(after_it) - set(results), "no step is queued while it is read"
            if sent > begun:
                assert after_it[0] in results, "what is read may not be there yet"
            else:
                assert ("read", start) in events[:begun], "first read when steps were queued"


def test_a_check_is_sent_further_ahead_than_the_loop_lags():
    assert STEPS_AHEAD > OPENED_AHEAD >= STEPS_IN_FLIGHT


@pytest.mark.parametrize("stop_at", range(14))
def test_a_stop_near_the_end_of_a_range_opens_nothing_that_no_process_may_have_begun(stop_at):
    events = looped(0, 20, 10, stop_at)
    sent = [step for name, step in events if name == "send"]
    opened = [step for name, step in events if name == "open to"]
    assert sent == list(range(stop_at + STEPS_IN_FLIGHT))
    assert opened == ([10] if len(sent) <= 10 - OPENED_AHEAD else [10, 20])


# Whole runs, on eight virtual devices

TRAIN = importlib.import_module("dpscale.train")


def opened(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "open"]


Change = Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]


def change_after(steps: int, change: Change, patch: pytest.MonkeyPatch) -> None:
    """Once a run has sent `steps` steps, its state and the statistics of the last one are what `change` gives."""
    compiled = TRAIN.compiled_steps

    def changed(*given: Any) -> StepFunctions:
        functions, sent = compiled(*given), []

        def finalize(*arguments: Any) -> Any:
            state, sums, reduced = functions.finalize(*arguments)
            sent.append(state)
            if len(sent) == steps:
                state, reduced = change(state, reduced)
            return state, sums, reduced

        return StepFunctions(functions.accumulate, finalize, functions.zero_sums)

    patch.setattr(TRAIN, "compiled_steps", changed)


def test_a_range_is_opened_while_the_step_before_it_still_runs(tmp_path, monkeypatch):
    """The devices do not finish that step before the range is in the ledger: a host that waited would wait long."""
    boundary, is_open, on_time = 6, threading.Event(), []
    open_range = Ledger.open_range

    def opening(self: Ledger, attempt: int, start: int, end: int, facts: dict[str, Any]) -> None:
        open_range(self, attempt, start, end, facts)
        if start == boundary:
            is_open.set()

    def wait(values: Any) -> Any:
        on_time.append(is_open.wait(20))
        return values

    def on_one_device(values: Any) -> Any:
        return jax.pure_callback(wait, jax.tree.map(jax.typeof, values), values)

    hold = jax.jit(jax.shard_map(on_one_device, mesh=data_mesh(), in_specs=P(), out_specs=P(), check_vma=False))

    def held_up(state: TrainState, reduced: jax.Array) -> tuple[TrainState, jax.Array]:
        params, reduced = hold((state.params, reduced))
        return dataclasses.replace(state, params=params), reduced

    change_after(boundary, held_up, monkeypatch)
    monkeypatch.setattr(TRAIN, "DEFAULT_RANGE_STEPS", boundary)
    monkeypatch.setattr(Ledger, "open_range", opening)
    run(tmp_path, training={"steps": 8, "evaluate_every_steps": 0}, checkpoint={"every_steps": None})
    assert on_time == [True] * len(jax.devices())


def test_before_the_first_step_all_processes_wait_until_process_zero_has_opened_it(tmp_path, monkeypatch):
    """They need no results to send the first steps; later ones wait for nobody."""
    decided, open_range, waited_for, waiting = TRAIN.decided_by_process_zero, Ledger.open_range, {}, []

    def deciding(decide: Any) -> Any:
        waiting.append(True)
        try:
            return decided(decide)
        finally:
            waiting.pop()

    def opening(self: Ledger, attempt: int, start: int, end: int, facts: dict[str, Any]) -> None:
        open_range(self, attempt, start, end, facts)
        waited_for[start] = bool(waiting)

    monkeypatch.setattr(TRAIN, "decided_by_process_zero", deciding)
    monkeypatch.setattr(Ledger, "open_range", opening)
    run(tmp_path, training={"steps": 8, "evaluate_every_steps": 0}, checkpoint={"every_steps": 1})
    assert waited_for == {start: start <= OPENED_AHEAD for start in range(8)}


@pytest.mark.parametrize(("wrong_after", "charged_to"), [(1, 6), (8, 8)])
def test_a_device_that_goes_wrong_stops_the_run_before_the_next_range_is_charged_and_before_a_save(
    wrong_after, charged_to, tmp_path, monkeypatch
):
    def flipped(state: TrainState, reduced: jax.Array) -> tuple[TrainState, jax.Array]:
        params = jax.tree.map(np.asarray, state.params)
        return dataclasses.replace(state, params=with_one_device_different(data_mesh(), params, one_larger)), reduced

    change_after(wrong_after, flipped, monkeypatch)
    monkeypatch.setattr(TRAIN, "DEFAULT_RANGE_STEPS", 6)
    with pytest.raises(DivergedError, match=r"the parameters of device\(s\) \[5\]"):
        run(tmp_path, training={"steps": 8, "evaluate_every_steps": 0}, checkpoint={"every_steps": None})
    assert opened(tmp_path)[-1]["to"] == charged_to
    assert not list(tmp_path.glob("ckpt/[0-9]*"))


def one_larger(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 1, params)


@pytest.mark.parametrize("update", ["replicated", "sharded"])
def test_a_range_says_truly_of_which_steps_state_its_digest_is(tmp_path, update):
    """Ranges of two steps: the digest that a line states is that of the checkpoint of the step that it names."""
    training, performance = {"steps": 8, "evaluate_every_steps": 4}, {"update_sharding": update}
    kept = {"keep": 10}
    lines = log_compiles(lambda: run(tmp_path, training=training, performance=performance, checkpoint=kept))
    assert sum("compilation of jit(_gather_checksums)" in line for line in lines) == 1
    ranges = opened(tmp_path)
    assert [line["from"] for line in ranges] == [0, 2, 4, 6]
    assert [line["state_step"] for line in ranges] == [0, 0, 0, 2]
    assert [ranges[0]["state"]] * 2 == [line["state"] for line in ranges[1:3]]
    assert ranges[3]["state"] == digest_of_checkpoint(tmp_path, 2) != ranges[0]["state"]


def digest_of_checkpoint(run_dir: Path, step: int) -> str:
    params = read_parameters(run_dir / "ckpt" / str(step), "params")
    mesh = data_mesh()
    checksum = ReplicaCheck(mesh).send((place_replicated(mesh, params), None), bytes(16)).agreed()
    return RootSecret.from_insecure_seed(7).mac("fingerprint", b"state before the range/" + checksum)


def log_compiles(call: Any) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            call()
    finally:
        logging.getLogger("jax").removeHandler(handler)
    return [line for line in lines if "Finished XLA compilation" in line]
