"""The write-ahead record of every charged step; the epsilon of a run is computed from it and from nothing else.

A range record is on disk before any step of the range can produce an output; a closing record lowers it to what ran,
once the checkpoint of its last step is durable. Lines form a chain of keyed digests, so that an edited, removed or
reordered line is seen by whoever holds the run's secret. Rolling back the whole directory is not seen.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpscale.durable import append_durably, write_atomically
from dpscale.errors import InputError, PrivacyError
from dpscale.privacy.secret import RootSecret

SCHEMA = 1
FIRST = "0" * 64  # what stands for the digest of the line before the first


@dataclass
class Attempt:
    """The charged steps [start, end) of one attempt, and its last committed step; its start counts as one."""

    number: int
    start: int
    end: int
    committed: int

    @property
    def steps(self) -> int:
        return self.end - self.start


@dataclass
class Ledger:
    """RUN/ledger.jsonl. Only process 0 writes it.

    Guarantees: `open_range` and `close` return after the line is on disk. `charged_steps` never falls below the
    number of distinct (attempt, step) whose output may have been seen: replays of uncommitted steps within an attempt
    are free, every attempt is charged in full on top of the others. It never rises above `promised`, the number of
    steps that the cards of released models cover (the smallest; None where nothing was released).

    `head`: digest of the last line; `heads`: of all lines. `plans`: digests of the plans that ranges were opened with.
    `records`: the lines without their digests. `torn_bytes`: what follows the last whole line, as a crash leaves it.
    `secret` is None where the run's secret was destroyed: the lines are then taken as they are.
    """

    path: Path
    secret: RootSecret | None
    attempts: list[Attempt] = field(default_factory=list)
    promised: int | None = None
    head: str = FIRST
    heads: list[str] = field(default_factory=list)
    plans: set[str] = field(default_factory=set)
    records: list[dict[str, Any]] = field(default_factory=list)
    torn_bytes: int = 0

    @classmethod
    def load(cls, path: Path, secret: RootSecret) -> Ledger:
        """Read and verify the chain, to go on with it; a last line torn by a crash was never acted on, and is removed.

        Raises: PrivacyError when a line was altered, removed or reordered, or the file is of a newer version.
        """
        data = path.read_bytes() if path.exists() else b""
        ledger = cls.parse(path, data, secret)
        if ledger.torn_bytes:
            write_atomically(path, data[: -ledger.torn_bytes])
            ledger.torn_bytes = 0
        return ledger

    @classmethod
    def parse(cls, path: Path, data: bytes, secret: RootSecret | None) -> Ledger:
        """The ledger whose file holds `data`; writes nothing, so it may be used while the run goes on.

        Args:
            secret: None where it was destroyed: then nothing shows whether a line was altered.

        Raises: PrivacyError as `load` does.
        """
        ledger = cls(path, secret)
        whole, _, torn = data.rpartition(b"\n")
        ledger.torn_bytes = len(torn)
        lines = whole.splitlines()
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            record, digest = _parse(line, where)
            if secret is not None and digest != chain_digest(secret, ledger.head, record):
                raise PrivacyError(
                    f"{where} does not continue the chain of keyed digests: {_damage(lines, number - 1, secret)}. "
                    "Restore the file; epsilon cannot be computed from it"
                )
            ledger._check_order(record, where)
            ledger._take(record, digest)
        return ledger

    @property
    def charged_steps(self) -> int:
        """Steps that epsilon is computed for: the sum over attempts."""
        return sum(attempt.steps for attempt in self.attempts)

    @property
    def current(self) -> Attempt | None:
        """The attempt that runs or ran last; None before the first."""
        return self.attempts[-1] if self.attempts else None

    def check_saved(self, step: int, facts: dict[str, Any]) -> None:
        """Check that every line that a checkpoint was saved after is here.

        Args:
            facts: its manifest's (`attempt`, `ledger_head`); {} where the process died before writing one.

        Raises: PrivacyError when lines were lost, or the checkpoint is another run's.
        """
        current, attempt, head = self.current, facts.get("attempt"), facts.get("ledger_head")
        if current is None:
            raise PrivacyError(f"{self.path} is missing or empty although step {step} was saved: restore it")
        beyond = attempt in (None, current.number) and step > current.end
        if beyond or (facts and head not in self.heads):
            raise PrivacyError(
                f"the checkpoint of step {step} was saved after ledger lines that {self.path} does not hold: lines "
                "were lost (the file was truncated or replaced by an older one), or the checkpoint is another run's. "
                "Restore the ledger; epsilon cannot be computed without them"
            )

    def begin(self, number: int, start: int, reasons: list[str]) -> None:
        """Begin an attempt at step `start`; nothing of it may be drawn before this returns.

        Args:
            reasons: why, for whoever reads the file.

        Raises: PrivacyError when an attempt had this number: its keys were used.
        """
        if any(known.number == number for known in self.attempts):
            raise PrivacyError(f"{self.path} has an attempt {number} already: an attempt number is never used twice")
        self._append("begin", {"attempt": number, "from": start, "reasons": reasons})

    def open_range(self, attempt: int, start: int, end: int, facts: dict[str, Any]) -> None:
        """Charge steps [start, end) of `attempt` before they run.

        Args:
            facts: what the record also states (plan and program digests, mesh, versions); never a secret.

        Raises: PrivacyError when the attempt is not the current one, or the range begins behind its committed step:
            those outputs may have been seen, so only a new attempt, with fresh batches and fresh noise, may run such
            steps again; or beyond what was charged: steps before it would have run without a record.
        """
        current = self._current(attempt)
        if start < current.committed:
            raise PrivacyError(
                f"step {start} of attempt {attempt} would be run again after step {current.committed} was committed: "
                "start a new attempt"
            )
        if start > current.end:
            raise PrivacyError(
                f"step {start} of attempt {attempt} follows steps that {self.path} does not hold (it ends at "
                f"{current.end}): lines were lost. Restore the ledger; epsilon cannot be computed without them"
            )
        if self._breaks_a_promise(end):
            raise PrivacyError(
                f"steps {start} to {end} would bring {self.path} above the {self.promised} steps that the card of a "
                "released model covers: the run has ended. Start a new one (its epsilon comes on top)"
            )
        self._append("open", {"attempt": attempt, "from": start, "to": end, **facts})

    def close(self, attempt: int, step: int, ran_to: int) -> None:
        """State that the checkpoint of `step` (steps below it ran) is durable.

        Args:
            ran_to: no step from this one on has run or will run without another range record: the end of the range
                that is open, or `step` itself where the run ends there.

        Raises: PrivacyError when the attempt is not the current one, `ran_to` is below `step`, or `step` lies outside
            of what is committed and charged.
        """
        if ran_to < step:
            raise PrivacyError(f"closing at step {step} with ran_to={ran_to}: steps that ran would not be charged")
        current = self._current(attempt)
        if not current.committed <= step <= current.end:
            raise PrivacyError(
                f"a checkpoint of step {step} cannot be of attempt {attempt}, whose steps {current.committed} to "
                f"{current.end} are charged and not committed in {self.path}"
            )
        self._append("close", {"attempt": attempt, "step": step, "to": ran_to})

    def release(self, step: int, at_most: int) -> None:
        """State that the weights of `step` leave, with a card whose epsilon covers `at_most` charged steps.

        Nothing may leave before this returns; no range that would charge more is opened after it.

        Raises: PrivacyError where more is charged already, or nothing ran.
        """
        if self.current is None or at_most < self.charged_steps:
            raise PrivacyError(
                f"{self.charged_steps} steps are charged in {self.path}, more than a card of {at_most} says"
            )
        self._append("release", {"attempt": self.current.number, "step": step, "at_most": at_most})

    def verified(self, attempt: int, step: int, held: bool, facts: dict[str, Any]) -> None:
        """State that the laws were checked on made-up rows before `step` runs, and whether all held.

        Args:
            facts: what was checked where; nothing that depends on data.

        Raises: PrivacyError when the attempt is not the current one.
        """
        self._current(attempt)
        self._append("verify", {"attempt": attempt, "from": step, "held": held, **facts})

    def next_attempt(self) -> int:
        """A number that no attempt has had, here or in a copy of this directory.

        It follows the last one, not the largest: a copy's attempts count on from its own random number.
        """
        numbers = {attempt.number for attempt in self.attempts}
        number = self.attempts[-1].number + 1 if self.attempts else 0
        while number in numbers:
            number += 1
        return number

    def _current(self, attempt: int) -> Attempt:
        if self.current is None or self.current.number != attempt:
            raise PrivacyError(
                f"attempt {attempt} is not the current one in {self.path}: an attempt begins with a record of its "
                "own, and is not taken up again once it was left"
            )
        return self.current

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        assert self.secret is not None, "a run whose secret was destroyed has ended"
        record = {"schema": SCHEMA, "kind": kind, "time": round(time.time(), 3), **content}
        digest = chain_digest(self.secret, self.head, record)
        line = json.dumps({**record, "digest": digest}, sort_keys=True, allow_nan=False)
        try:
            append_durably(self.path, line.encode() + b"\n")
        except OSError as error:
            raise InputError(
                f"the ledger {self.path} cannot be written ({error.strerror}): no step runs that is not recorded. "
                "Free space or restore access, and start again"
            ) from error
        self._take(record, digest)

    def _check_order(self, record: dict[str, Any], where: str) -> None:
        """Refuse what no dpscale writes: it would make the sum of charges meaningless."""
        current, number = self.current, record["attempt"]
        kind = record["kind"]
        if kind == "begin":
            fits = all(known.number != number for known in self.attempts)
        elif current is None or current.number != number:
            fits = False
        elif kind == "open":
            fits = current.committed <= record["from"] <= current.end and record["from"] <= record["to"]
            fits = fits and not self._breaks_a_promise(record["to"])
        elif kind == "release":
            fits = record["at_most"] >= self.charged_steps
        elif kind == "verify":
            fits = isinstance(record.get("held"), bool)
        else:
            fits = current.committed <= record["step"] <= current.end and record["step"] <= record["to"]
        if not fits:
            raise PrivacyError(f"{where} cannot follow the lines before it: lines were lost. Restore the file")

    def _breaks_a_promise(self, end: int) -> bool:
        """Whether charging the current attempt up to step `end` would charge more than a released card covers."""
        current = self.current
        return (
            self.promised is not None
            and current is not None
            and self.charged_steps + max(0, end - current.end) > self.promised
        )

    def _take(self, record: dict[str, Any], digest: str) -> None:
        kind = record["kind"]
        if kind == "begin":
            start = record["from"]
            self.attempts.append(Attempt(record["attempt"], start, start, start))
        elif kind == "open":
            # Between two commits a shorter range may follow a longer one: what was opened stays charged until a close.
            self.attempts[-1].end = max(self.attempts[-1].end, record["to"])
            self.plans.add(record["plan"])
        elif kind == "release":
            self.promised = min(record["at_most"], record["at_most"] if self.promised is None else self.promised)
        elif kind == "close":
            self.attempts[-1].committed, self.attempts[-1].end = record["step"], record["to"]
        self.head = digest
        self.heads.append(digest)
        self.records.append(record)


_KEYS = {
    "begin": ("attempt", "from"),
    "open": ("attempt", "from", "to"),
    "close": ("attempt", "step", "to"),
    "release": ("attempt", "step", "at_most"),
    "verify": ("attempt", "from"),
}


def chain_digest(secret: RootSecret, head: str, record: dict[str, Any]) -> str:
    """The keyed digest of a record that follows the line with digest `head`."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return secret.mac("ledger", f"{head}\n{text}".encode())


def _parse(line: bytes, where: str) -> tuple[dict[str, Any], str]:
    """(record, digest) of one line. Raises: PrivacyError unless it has the keys and types of a record."""
    try:
        record = json.loads(line)
        json.dumps(record, allow_nan=False)
        digest, schema, kind = record.pop("digest"), record["schema"], record["kind"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"{where} is no ledger record ({error}): restore the file") from error
    if schema != SCHEMA:
        raise PrivacyError(f"{where} has schema {schema}: this dpscale reads schema {SCHEMA}; use the newer one")
    numbers = [record.get(key) for key in _KEYS[kind]] if isinstance(kind, str) and kind in _KEYS else [None]
    if not isinstance(digest, str) or any(type(value) is not int or value < 0 for value in numbers):
        raise PrivacyError(f"{where} is no ledger record (kind {kind!r}, or its numbers): restore the file")
    if kind == "open" and not isinstance(record.get("plan"), str):
        raise PrivacyError(f"{where} is no ledger record (a range without its plan): restore the file")
    return record, digest


def _damage(lines: list[bytes], index: int, secret: RootSecret) -> str:
    """What must have happened, in plain words: `lines[index]` is the first that does not follow the one before it."""
    parsed: list[tuple[dict[str, Any] | None, str]] = [(None, "")] * len(lines)
    for number, line in enumerate(lines):
        with contextlib.suppress(PrivacyError):
            parsed[number] = _parse(line, "")
    before = [FIRST, *(digest for _, digest in parsed)]

    def follows(number: int, head: str) -> bool:
        record, digest = parsed[number]
        return record is not None and digest == chain_digest(secret, head, record)

    if any(follows(index, head) for head in before):
        return "a line was removed, moved or doubled, for this one was written after another line of the file"
    if not any(follows(number, before[number]) for number in range(len(lines))):
        return "no line of the file was written with this run's secret: the file belongs to another run"
    return "this line was changed, or a line before it was removed"
