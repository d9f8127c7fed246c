"""Requests to stop: signals and the STOP file set a flag; the processes agree on the step in `finalize`'s reduction."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
FILE_CHECK_INTERVAL_S = 1.0


class StopRequests:
    """Whether this process was asked to stop, and why.

    A signal handler only sets a flag, so a signal during compilation, evaluation or saving is not lost. A second
    SIGINT interrupts at once, for a user who cannot wait for the step to end.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._reason: str | None = None
        self._next_file_check = 0.0
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals; `jax.distributed` must have been initialised before, for it takes SIGTERM."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop, or None; the file is looked for once a second."""
        now = time.monotonic()
        if self._reason is None and now >= self._next_file_check:
            self._next_file_check = now + FILE_CHECK_INTERVAL_S
            if self._stop_file.exists():
                self._reason = f"the file {self._stop_file.name} was found"
        return self._reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self._reason = f"signal {signal.Signals(number).name}"
