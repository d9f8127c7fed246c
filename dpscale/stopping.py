"""Requests to stop (signals, the STOP file, the deadline); processes agree on the step in `finalize`'s reduction."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from dpscale.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
FILE_CHECK_INTERVAL_S = 1.0
DEADLINE, STOP_MARGIN = "DPSCALE_DEADLINE", "DPSCALE_STOP_MARGIN_S"
DEFAULT_STOP_MARGIN_S = 120.0


class StopRequests:
    """Whether this process was asked to stop, and why.

    A signal handler only sets a flag, so a signal during compilation, evaluation or saving is not lost. A second
    SIGINT interrupts at once, for a user who cannot wait for the step to end. `stop_at`: seconds since the epoch after
    which it wants to stop by itself; None: never.
    """

    def __init__(self, stop_at: float | None = None) -> None:
        self.created_at = time.time()
        self._stop_at = stop_at
        self._stop_file: Path | None = None
        self._reason: str | None = None
        self._next_file_check = 0.0
        self._previous: dict[int, object] = {}

    @classmethod
    def from_environment(cls, values: Mapping[str, str] = os.environ) -> StopRequests:
        """One that stops DPSCALE_STOP_MARGIN_S (default 120) before the job's end, DPSCALE_DEADLINE (seconds since the
        epoch), where the job script knows it.

        Raises: InputError when one is not a number.
        """
        try:
            margin_s = float(values.get(STOP_MARGIN, DEFAULT_STOP_MARGIN_S))
            return cls(float(values[DEADLINE]) - margin_s if values.get(DEADLINE) else None)
        except ValueError as error:
            raise InputError(
                f"{DEADLINE}={values.get(DEADLINE)}, {STOP_MARGIN}={values.get(STOP_MARGIN)}: both are seconds"
            ) from error

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
        if self._reason is None and self._stop_at is not None and time.time() >= self._stop_at:
            self._reason = "the job's time is nearly over"
        return self._reason

    def is_stale(self, stop_file: Path) -> bool:
        """Whether a STOP file asks an earlier run to stop, not this one.

        A requeued job is still the run that was asked to stop.
        """
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
            return False
        return stop_file.exists() and stop_file.stat().st_mtime < self.created_at

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self._reason = f"signal {signal.Signals(number).name}"
