"""Requests to stop: signals and the STOP file set a flag; the processes agree on the step in `finalize`'s reduction."""

from __future__ import annotations

import signal
import threading
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

    def __init__(self) -> None:
        self._stop_file: Path | None = None
        self._reason: str | None = None
        self._next_file_check = 0.0
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals, from the main thread; elsewhere only the STOP file is watched.

        Call it early, and again after `jax.distributed` was initialised, for that takes SIGTERM away.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def watch(self, stop_file: Path) -> None:
        """Also look for this file."""
        self._stop_file = stop_file

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop, or None; the file is looked for once a second."""
        now = time.monotonic()
        if self._reason is None and self._stop_file is not None and now >= self._next_file_check:
            self._next_file_check = now + FILE_CHECK_INTERVAL_S
            if self._stop_file.exists():
                self._reason = f"the file {self._stop_file.name} was found"
        return self._reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self._reason = f"signal {signal.Signals(number).name}"
