"""The run's two metric streams: public records, held back until a checkpoint covers them, and sensitive ones.

RUN/metrics/pending.jsonl    public records whose step is not durable yet   mode 0600
RUN/metrics/public.jsonl     records that may be shared                     append only
RUN/metrics/sensitive.jsonl  what must not leave the run                    mode 0600, off by default

Only process 0 writes; the others make their streams with `enabled=False`.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpscale.metrics.files import PRIVATE_MODE, SHARED_MODE, AppendFile
from dpscale.metrics.records import (
    PUBLIC_KEYS,
    SENSITIVE_KEYS,
    Record,
    check_public,
    complete_lines,
    decode,
    encode,
)

__all__ = ["PUBLIC_KEYS", "SENSITIVE_KEYS", "PublicStream", "SensitiveStream"]

Listener = Callable[[Record], None]


class _Waiting(NamedTuple):
    step: int
    line: bytes


class PublicStream:
    """Output commit for metrics: a record of step t is public once a checkpoint of a step >= t is durable.

    `validation_is` is config's `data.validation_is`; unless it is "public", held-out metrics are refused.

    Guarantees:
    - a key that is not in PUBLIC_KEYS never gets in (PrivacyError);
    - nothing of step t is in public.jsonl before `commit` or `recover` was called with a step >= t;
    - a crash between any two system calls, followed by `recover`, neither loses nor doubles a record whose
      `write` returned; a power failure can lose records that were not committed;
    - what is in public.jsonl once stays there (released is released), but for a line torn by the crash.
    - a listener sees each committed record once in the life of a process; records whose commit a crash cut
      short may be seen again by the listeners of the next process.

    Edge cases: records keep the order of writing; equal records are kept as often as they were written.

    Raises: RunDirectoryError when the files cannot be written; nothing is lost, and the call may be repeated.
    """

    # How it works: the first line of pending.jsonl says how long public.jsonl was when pending.jsonl was made.
    # What public.jsonl holds beyond that was moved by a commit that did not get to rewriting pending.jsonl.

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        validation_is: Literal["public", "private"] | None = None,
        enabled: bool = True,
    ) -> None:
        directory = Path(run_dir) / "metrics"
        self._public = AppendFile(directory / "public.jsonl", SHARED_MODE)
        self._pending = AppendFile(directory / "pending.jsonl", PRIVATE_MODE)
        self._validation_is = validation_is
        self._enabled = enabled
        self._ready = not (self._public.path.exists() or self._pending.path.exists())
        self._waiting: list[_Waiting] = []
        self._public_size = 0  # bytes
        self._stale = True  # pending.jsonl does not hold self._waiting and self._public_size
        self._listeners: list[Listener] = []
        self._undelivered: deque[tuple[Listener, Record]] = deque()

    def on_commit(self, listener: Listener) -> None:
        """Call `listener` with every record that is committed from now on; register before `recover`."""
        self._listeners.append(listener)

    def write(self, step: int, **values: Any) -> None:
        """Add a record of `step` (int >= 0) to those that wait; values are numbers, named as in PUBLIC_KEYS.

        Raises: PrivacyError for any other name; TypeError or ValueError for what is no number or no step.
        """
        check_public(values, validation_is=self._validation_is)
        line = encode(step, values)
        if not self._enabled:
            return
        self._require_recovery()
        record = _Waiting(int(step), line)
        if self._stale:
            self._rewrite_pending([*self._waiting, record])
        else:
            self._stale = True  # until the whole line is there
            self._pending.append(record.line)
            self._stale = False
        self._waiting.append(record)

    def commit(self, step: int) -> None:
        """Make every record of a step <= `step` public. A checkpoint of `step` must be durable. Idempotent."""
        if not self._enabled:
            return
        self._require_recovery()
        self._commit(step)

    def recover(self, durable_step: int | None) -> None:
        """On start: commit what `durable_step` covers, drop the rest, for those steps are run and written again.

        `durable_step` is the step that was restored; None where there is no checkpoint.

        Raises: RunDirectoryError when pending.jsonl is damaged beyond a torn last line.
        """
        if not self._enabled:
            return
        self._ready = True
        self._read_files()
        self._commit(-1 if durable_step is None else durable_step)
        self._waiting = []
        self._rewrite_pending(self._waiting)

    def close(self) -> None:
        """Let go of the files. Records that wait keep waiting on disk."""
        self._public.close()
        self._pending.close()

    def _commit(self, step: int) -> None:
        ripe = [record for record in self._waiting if record.step <= step]
        if ripe:
            self._stale = True
            self._publish(ripe)
            self._waiting = [record for record in self._waiting if record.step > step]
        # Before pending.jsonl forgets them, so that a crash repeats a record to listeners rather than losing it.
        while self._undelivered:
            listener, record = self._undelivered.popleft()
            listener(record)
        if self._stale and self._pending.path.exists():
            self._rewrite_pending(self._waiting)

    def _publish(self, records: list[_Waiting]) -> None:
        data = b"".join(record.line for record in records)
        self._public.truncate(self._public_size)  # what an append that failed in this process left behind
        self._public.append(data)
        self._public.sync()
        self._public_size += len(data)
        self._deliver_later(record.line for record in records)

    def _deliver_later(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            record = decode(line, self._public.path)
            self._undelivered.extend((listener, dict(record)) for listener in self._listeners)

    def _rewrite_pending(self, records: list[_Waiting]) -> None:
        self._stale = True
        header = json.dumps({"public_bytes": self._public_size}).encode() + b"\n"
        self._pending.replace([header, *(record.line for record in records)])
        self._stale = False

    def _read_files(self) -> None:
        path = self._public.path
        size = path.stat().st_size if path.exists() else 0
        lines = list(complete_lines(self._pending.path))
        known_size = _public_bytes(lines[0]) if lines else None
        if known_size is not None:
            lines.pop(0)
        if known_size is None or known_size > size:  # edited by hand: compare with all that public.jsonl holds
            known_size = 0
        moved = list(complete_lines(path, known_size))
        self._public_size = known_size + sum(map(len, moved))
        if self._public_size < size:
            self._public.truncate(self._public_size)  # a torn line: its record still waits
        left = Counter(moved)
        self._waiting = []
        for line in lines:
            if left[line]:
                left[line] -= 1
            else:
                self._waiting.append(_Waiting(int(decode(line, self._pending.path)["step"] or 0), line))
        self._stale = True
        self._deliver_later(moved)

    def _require_recovery(self) -> None:
        assert self._ready, "the run directory holds public records: call recover(durable_step) first"


class SensitiveStream:
    """Records that must not leave the run: training loss, realised batch sizes, norms, step times.

    Guarantees: off unless `enabled`, and then no file is made; otherwise sensitive.jsonl has mode 0600 from
    its creation, and SIGKILL loses no record whose `write` returned.

    Raises: RunDirectoryError when the file cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike[str], enabled: bool = False) -> None:
        self.enabled = enabled
        self._file = AppendFile(Path(run_dir) / "metrics" / "sensitive.jsonl", PRIVATE_MODE)
        self._torn = False

    def write(self, step: int, **values: Any) -> None:
        """Append one record of `step` (int >= 0); values are numbers under any names, see SENSITIVE_KEYS."""
        if not self.enabled:
            return
        line = encode(step, values)
        if self._torn:
            self._file.replace(list(complete_lines(self._file.path)))
        self._torn = True  # until the whole line is there
        self._file.append(line)
        self._torn = False

    def recover(self, step: int | None) -> None:
        """On start: drop the records beyond the restored `step` (all, for None); they are written again."""
        path = self._file.path
        if not self.enabled or not path.exists():
            return
        last = -1 if step is None else step
        self._file.replace(line for line in complete_lines(path) if int(decode(line, path)["step"] or 0) <= last)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _public_bytes(line: bytes) -> int | None:
    """The length that the first line of pending.jsonl states; None where the line is no such statement."""
    try:
        size = json.loads(line)["public_bytes"]
    except (ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size >= 0 else None
