"""The write-ahead record of every charged step; the epsilon of a run is computed from it and from nothing else.

A range record is on disk before any step of the range can produce an output; a closing record lowers it to what ran,
once the checkpoint of its last step is durable. Lines form a chain of keyed digests, so that an edited, removed or
reordered line is seen by whoever holds the run's secret. Rolling back the whole directory is not seen.
"""

from __future__ import annotations

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
    """The charged steps [start, end) of one attempt, and its last committed step (None: none yet)."""

    number: int
    start: int
    end: int
    committed: int | None = None

    @property
    def steps(self) -> int:
        return self.end - self.start


@dataclass
class Ledger:
    """RUN/ledger.jsonl. Only process 0 writes it.

    Guarantees: `open_range` and `close` return after the line is on disk. `charged_steps` never falls below the
    number of distinct (attempt, step) whose output may have been seen: replays of uncommitted steps within an attempt
    are free, every attempt is charged in full on top of the others.
    """

    path: Path
    secret: RootSecret
    attempts: list[Attempt] = field(default_factory=list)
    head: str = FIRST
    heads: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, secret: RootSecret) -> Ledger:
        """Read and verify the chain; a last line torn by a crash was never acted on, and is removed.

        Raises: PrivacyError when a line was altered, removed or reordered, or the file is of a newer version.
        """
        ledger = cls(path, secret)
        data = path.read_bytes() if path.exists() else b""
        whole, newline, torn = data.rpartition(b"\n")
        if torn:
            write_atomically(path, whole + newline)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                digest = record.pop("digest")
                kind, schema = record["kind"], record["schema"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PrivacyError(f"{path}, line {number} is no ledger record ({error}): restore the file") from error
            if schema != SCHEMA:
                raise PrivacyError(
                    f"{path}, line {number} has schema {schema}: this dpscale reads schema {SCHEMA}; use the newer one"
                )
            if digest != ledger._digest(record):
                raise PrivacyError(
                    f"{path}, line {number} does not continue the chain of keyed digests: a line was changed, removed "
                    "or moved, or the file belongs to another run. Restore it; epsilon cannot be computed from it"
                )
            ledger._take(kind, record, digest)
        return ledger

    @property
    def charged_steps(self) -> int:
        """Steps that epsilon is computed for: the sum over attempts."""
        return sum(attempt.steps for attempt in self.attempts)

    @property
    def committed_step(self) -> int | None:
        """The newest step whose checkpoint became durable in the current attempt, or None."""
        return self.attempts[-1].committed if self.attempts else None

    def open_range(self, attempt: int, start: int, end: int, facts: dict[str, Any]) -> None:
        """Charge steps [start, end) of `attempt` before they run.

        Args:
            facts: what the record also states (plan and program digests, mesh, versions); never a secret.

        Raises: PrivacyError when the range falls behind a committed step of the same attempt: those outputs may have
            been seen, so only a new attempt, with fresh batches and fresh noise, may run such steps again.
        """
        if self.attempts and self.attempts[-1].number == attempt:
            committed = self.attempts[-1].committed
            if committed is not None and start < committed:
                raise PrivacyError(
                    f"step {start} of attempt {attempt} would be run again after step {committed} was committed: "
                    "start a new attempt"
                )
        elif any(known.number == attempt for known in self.attempts):
            raise PrivacyError(f"attempt {attempt} was left for a later one: an attempt number is never used twice")
        self._append("open", {"attempt": attempt, "from": start, "to": end, **facts})

    def close(self, attempt: int, step: int, ran_to: int) -> None:
        """State that the checkpoint of `step` (steps below it ran) is durable.

        Args:
            ran_to: no step from this one on has run or will run without another range record: the end of the range
                that is open, or `step` itself where the run ends there.

        Raises: PrivacyError when the attempt has no range, or `ran_to` is below `step`.
        """
        if ran_to < step:
            raise PrivacyError(f"closing at step {step} with ran_to={ran_to}: steps that ran would not be charged")
        if not self.attempts or self.attempts[-1].number != attempt:
            raise PrivacyError(f"attempt {attempt} has no open range in {self.path}: nothing to close")
        self._append("close", {"attempt": attempt, "step": step, "to": ran_to})

    def next_attempt(self) -> int:
        """A number that no attempt has had."""
        return 1 + max((attempt.number for attempt in self.attempts), default=-1)

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        record = {"schema": SCHEMA, "kind": kind, "time": round(time.time(), 3), **content}
        digest = self._digest(record)
        line = json.dumps({**record, "digest": digest}, sort_keys=True, allow_nan=False)
        try:
            append_durably(self.path, line.encode() + b"\n")
        except OSError as error:
            raise InputError(
                f"the ledger {self.path} cannot be written ({error.strerror}): no step runs that is not recorded. "
                "Free space or restore access, and start again"
            ) from error
        self._take(kind, record, digest)

    def _digest(self, record: dict[str, Any]) -> str:
        text = json.dumps(record, sort_keys=True, allow_nan=False)
        return self.secret.mac("ledger", f"{self.head}\n{text}".encode())

    def _take(self, kind: str, record: dict[str, Any], digest: str) -> None:
        number = record["attempt"]
        if kind == "open":
            if not self.attempts or self.attempts[-1].number != number:
                self.attempts.append(Attempt(number, record["from"], record["from"]))
            current = self.attempts[-1]
            # Between two commits a shorter range may follow a longer one: what was opened stays charged until a close.
            current.end = max(current.end, record["to"])
        else:
            self.attempts[-1].committed, self.attempts[-1].end = record["step"], record["to"]
        self.head = digest
        self.heads.append(digest)
