"""Watchdog: a process that makes no progress writes where it hangs, and ends.

A lost peer may leave the others waiting in a collective for ever, without an error. The timer is C code in a thread of
its own (faulthandler), so it fires while Python is blocked.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from dpscale.errors import InputError

STEP_LIMIT_S = 300.0
GRACE_LIMIT_S = 3600.0
MEDIAN_STEPS = 20.0
REMEMBERED_STEPS = 101


class Watchdog:
    """Ends this process (exit code 1) after max(`step_limit_s`, 20 x the median step) without a step.

    Compiling, restoring, evaluating and saving get `grace_limit_s` instead, inside `grace()`. `file` gets the
    tracebacks of all threads. `Watchdog.off()` never fires.
    """

    def __init__(self, step_limit_s: float | None, grace_limit_s: float, file: TextIO | None) -> None:
        self._step_limit_s, self._grace_limit_s, self._file = step_limit_s, grace_limit_s, file
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._last: float | None = None

    @classmethod
    def off(cls) -> Watchdog:
        """One that never fires."""
        return cls(None, GRACE_LIMIT_S, None)

    @classmethod
    def from_environment(cls, file: TextIO, values: Mapping[str, str] = os.environ) -> Watchdog:
        """Limits from DPSCALE_STEP_LIMIT_S and DPSCALE_GRACE_LIMIT_S, by default 300 and 3600 seconds.

        Raises: InputError when one is not a positive number.
        """
        limits = []
        for name, default in (("DPSCALE_STEP_LIMIT_S", STEP_LIMIT_S), ("DPSCALE_GRACE_LIMIT_S", GRACE_LIMIT_S)):
            try:
                limits.append(float(values.get(name, default)))
            except ValueError:
                limits.append(0.0)
            if not limits[-1] > 0:
                raise InputError(f"{name}={values[name]}: give seconds above 0")
        return cls(limits[0], limits[1], file)

    @property
    def limit_s(self) -> float | None:
        """What the next step may take; None when off."""
        if self._step_limit_s is None:
            return None
        median = statistics.median(self._steps) if self._steps else 0.0
        return max(self._step_limit_s, MEDIAN_STEPS * median)

    def step(self) -> None:
        """A step was made: the next one has the full time again."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        self._arm(self.limit_s)

    @contextmanager
    def grace(self) -> Iterator[None]:
        """Inside, the longer limit holds; the time spent does not count as a step's."""
        self._arm(None if self._step_limit_s is None else self._grace_limit_s)
        try:
            yield
        finally:
            self._last = None
            self._arm(self.limit_s)

    def close(self) -> None:
        """Stop watching."""
        if self._step_limit_s is not None:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, limit_s: float | None) -> None:
        if limit_s is not None and self._file is not None:
            faulthandler.dump_traceback_later(limit_s, exit=True, file=self._file)
