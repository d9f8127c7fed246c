"""What a run has spent, and how it came to that: `dpscale privacy show`. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpscale.errors import InputError
from dpscale.privacy.shown import shown_epsilon
from dpscale.run_record import RunRecord

OTHER_DELTAS = (1e-5, 1e-6, 1e-7, 1e-8)


@dataclass
class Segment:
    """Steps [start, end) of one attempt that one process group ran, or may have run."""

    attempt: int
    start: int
    end: int
    devices: int | None
    device_kind: str | None
    job: str | None
    restart: int | None


@dataclass(frozen=True)
class Replay:
    """Steps [start, end) whose range was opened again within an attempt: same draws, same noise, no charge."""

    attempt: int
    start: int
    end: int


@dataclass(frozen=True)
class Spent:
    """epsilon at one delta; None: below what can be resolved.

    `charged`: of the steps charged now. `planned`: of the planned end. `covered`: what a release now states.
    """

    delta: float
    charged: float | None
    planned: float | None
    covered: float | None


def segments_and_replays(record: RunRecord) -> tuple[list[Segment], list[Replay]]:
    """The ledger's ranges, joined where one process group ran on, and those that were opened again."""
    segments: list[Segment] = []
    replays: list[Replay] = []
    end, who = 0, None
    for line in record.ledger.records:
        if line["kind"] == "begin":
            end, who = line["from"], None
        elif line["kind"] == "close":
            end = line["to"]
            if segments and who is not None:
                segments[-1].end = max(line["step"], min(segments[-1].end, line["to"]))
        elif line["kind"] == "open":
            facts = (line.get("devices"), line.get("device_kind"), line.get("job"), line.get("restart"))
            if line["from"] < end:
                replays.append(Replay(line["attempt"], line["from"], min(end, line["to"])))
            if line["from"] < end or facts != who:
                segments.append(Segment(line["attempt"], line["from"], line["to"], *facts))
            segments[-1].end, end, who = line["to"], max(end, line["to"]), facts
    return [segment for segment in segments if segment.end > segment.start], replays


def spent(record: RunRecord, deltas: Sequence[float]) -> list[Spent]:
    """epsilon at each of `deltas`, the larger first."""
    return [_spent_at(record, delta) for delta in sorted(set(deltas), reverse=True)]


def _spent_at(record: RunRecord, delta: float) -> Spent:
    try:
        plan = dataclasses.replace(record.plan, delta=delta)
        steps = (record.charged_steps, record.charged_at_end, record.covered_steps)
        return Spent(delta, *(plan.epsilon_after(count) for count in steps))
    except InputError:
        return Spent(delta, None, None, None)


def spending_lines(record: RunRecord, deltas: Sequence[float]) -> Iterator[str]:
    """Yield what `dpscale privacy show` prints, line by line."""
    plan, ledger = record.plan, record.ledger
    yield f"run          {record.directory.root}"
    yield f"plan         {plan.digest()[:12]}; protects one {plan.unit}; {plan.neighboring_relation}, {plan.accountant}"
    yield f"ledger       {len(ledger.records)} lines: {record.verification}"
    if ledger.torn_bytes:
        yield f"             {ledger.torn_bytes} bytes of a line being written, or torn by a crash: not counted"
    yield f"steps        {record.charged_steps} charged of {plan.steps} planned; step {record.committed_step} is saved"
    yield (
        f"             {record.charged_at_end} will be charged at the planned end"
        if not record.is_finished
        else ("             the run has come to its planned end")
    )
    yield f"             {_limit_text(record)}"
    segments, replays = segments_and_replays(record)
    yield from _attempt_lines(record)
    for segment in segments:
        yield f"segment      {_segment_text(segment)}"
    for replay in replays:
        yield f"replay       {_replay_text(replay)}"
    for line in record.ledger.records:
        if line["kind"] == "release":
            yield f"released     step {line['step']}, with a card that covers {line['at_most']} charged steps"
    yield f"verified     {record.checked}"
    if not plan.enabled:
        yield "epsilon      none (privacy.enabled = false): no guarantee"
        return
    if record.is_insecure:
        yield "epsilon      none (privacy.insecure_seed is set): NO guarantee, anyone can make the same noise"
        return
    yield from _epsilon_lines(record, spent(record, deltas))


def _limit_text(record: RunRecord) -> str:
    most, promised = record.chargeable_steps, record.ledger.promised
    if most is None:
        return "nothing limits new attempts (no privacy.epsilon is set), until a release does"
    if record.ended is not None:
        why = "the run was ended for good"
    elif promised is not None and promised == most:
        why = "the card of a released model covers no more"
    else:
        why = "more would pass privacy.epsilon"
    return f"{most} can ever be charged, new attempts included: {why}"


def _attempt_lines(record: RunRecord) -> Iterator[str]:
    reasons = {line["attempt"]: line.get("reasons") or [] for line in record.ledger.records if line["kind"] == "begin"}
    for attempt in record.ledger.attempts:
        why = f" ({'; '.join(map(str, reasons[attempt.number]))})" if reasons.get(attempt.number) else ""
        yield f"attempt      {attempt.number}: steps {attempt.start} to {attempt.end} charged{why}"
    extra = len(record.ledger.attempts) - 1
    if extra > 0:
        yield f"             {extra} new attempt{'s' if extra > 1 else ''}, fresh batches and noise, charged on top"


def _segment_text(segment: Segment) -> str:
    text = f"steps {segment.start} to {segment.end} of attempt {segment.attempt}"
    if segment.devices is not None:
        text += f" on {segment.devices} x {segment.device_kind}"
    if segment.job is not None:
        text += f", job {segment.job}" + (f", restart {segment.restart}" if segment.restart else "")
    return text


def _replay_text(replay: Replay) -> str:
    steps = f"steps {replay.start} to {replay.end} of attempt {replay.attempt}"
    return f"{steps} were opened again: same batches, same noise, no charge"


def _epsilon_lines(record: RunRecord, rows: list[Spent]) -> Iterator[str]:
    finished, own = record.is_finished, record.plan.delta
    names = {"covered": "if released", "planned": "planned end", "charged": "if the stop was decided in advance"}
    if finished:
        names = {"covered": "if released", "charged": "spent"}
    elif record.covered_steps == record.charged_at_end:
        del names["covered"]
    if finished and record.covered_steps == record.charged_steps:
        del names["covered"]
    yield f"epsilon      {'delta':<10}" + "".join(f"{name:<14}" for name in names.values()).rstrip()
    for row in rows:
        mark = "  <- the plan's delta" if row.delta == own else ""
        values = [getattr(row, name) for name in names]
        if None in values:
            yield f"             {row.delta:<10g}too small for the {record.plan.accountant} accountant{mark}"
        else:
            yield f"             {row.delta:<10g}" + "".join(f"{shown_epsilon(x):<14}" for x in values).rstrip() + mark
    if "covered" in names:
        yield f"             a release covers {record.covered_steps} charged steps, those kept for repetitions included"
    if not finished:
        yield "             a stop that is chosen by looking at results costs the planned end's epsilon"
    yield "             choosing this run among others on the same data is not in it: dpscale privacy sweep"


def spending_json(record: RunRecord, deltas: Sequence[float]) -> dict[str, Any]:
    """The same facts as `spending_lines`, as JSON values; an epsilon that is not finite is null."""
    segments, replays = segments_and_replays(record)
    has_guarantee = record.plan.enabled and not record.is_insecure
    rows = spent(record, deltas) if has_guarantee else []
    return {
        "run": str(record.directory.root),
        "plan": record.plan.digest(),
        "verified": record.secret is not None,
        "verification": record.verification,
        "ledger_lines": len(record.ledger.records),
        "ledger_sha256": record.ledger_sha256,
        "steps_planned": record.plan.steps,
        "steps_charged": record.charged_steps,
        "steps_charged_at_planned_end": record.charged_at_end,
        "committed_step": record.committed_step,
        "steps_that_can_ever_be_charged": record.chargeable_steps,
        "steps_that_a_release_covers": record.covered_steps,
        "finished": record.is_finished,
        "laws_checked": record.checked,
        "releases": [
            {key: line[key] for key in ("step", "at_most")}
            for line in record.ledger.records
            if line["kind"] == "release"
        ],
        "attempts": [dataclasses.asdict(attempt) for attempt in record.ledger.attempts],
        "segments": [dataclasses.asdict(segment) for segment in segments],
        "replays": [dataclasses.asdict(replay) for replay in replays],
        "epsilon": [
            {
                "delta": row.delta,
                "if_released": _finite(row.covered),
                "planned_end": _finite(row.planned),
                "if_the_stop_was_decided_in_advance": _finite(row.charged),
            }
            for row in rows
        ],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value
