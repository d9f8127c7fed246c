"""How far the run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpscale.privacy.shown import shown_epsilon

if TYPE_CHECKING:
    import rich.console
    import rich.live

BAR_REFRESH_S = 0.1
RATE_MEMORY = 0.9  # weight of a step's duration after one more step


class ProgressBar:
    """Shows step of steps, examples/s, epsilon spent of epsilon allowed, time left, held-out accuracy.

    `expected_batch_size` is the public one: examples/s = expected_batch_size * steps/s, smoothed. `console` and
    `clock` (seconds, monotonic) can be given. Plain lines appear at each evaluation (an `accuracy`
    was given), at the last step, and every `line_every_s` seconds (None: not by time).

    It shows what it is given: give it public values only, and committed ones where the output is not the
    owner's terminal. Speed and time left follow the drawn batches' sizes, so plain lines, which
    may go to a shared log, leave them out unless `show_speed=True` (PRIVACY.md 34, 36).

    Guarantees: no failure to draw (closed pipe, odd terminal) ever reaches the run; drawing then just ends.
    No thread is started.

    Edge cases: `epsilon_allowed=None` shows the epsilon spent alone; `private=False` shows "no privacy"; the
    speed is unknown, shown as "-", until the second update.
    """

    def __init__(
        self,
        steps: int,
        expected_batch_size: float,
        *,
        epsilon_allowed: float | None = None,
        private: bool = True,
        start_step: int = 0,
        show_speed: bool | None = None,
        line_every_s: float | None = 30.0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._expected_batch_size = expected_batch_size
        self._epsilon_allowed = epsilon_allowed
        self._private = private
        self._show_speed = show_speed
        self._line_every_s = line_every_s
        self._console = console
        self._clock = clock
        self._step = start_step
        self._epsilon: float | None = None
        self._accuracy: float | None = None
        self._pace = _Pace()
        self._shown_at = -float("inf")
        self._bar: rich.live.Live | None = None
        self._alive = False

    def __enter__(self) -> ProgressBar:
        self._alive = True
        self._guarded(self._start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._guarded(self._stop)
        self._alive = False

    def update(self, step: int, epsilon: float | None = None, accuracy: float | None = None) -> None:
        """Say that `step` steps are finished; a value that is not given stays as it was.

        `accuracy` is a fraction in [0, 1]. Outside the `with` block nothing is shown.
        """
        self._guarded(lambda: self._update(step, epsilon, accuracy))

    def _update(self, step: int, epsilon: float | None, accuracy: float | None) -> None:
        now = self._clock()
        self._pace.add(step, now)
        self._step = step
        self._epsilon = self._epsilon if epsilon is None else epsilon
        self._accuracy = self._accuracy if accuracy is None else accuracy
        last = step >= self._steps
        if self._bar is not None:
            if last or accuracy is not None or now - self._shown_at >= BAR_REFRESH_S:
                self._bar.refresh()
                self._shown_at = now
            return
        overdue = self._line_every_s is not None and now - self._shown_at >= self._line_every_s
        if last or accuracy is not None or overdue:
            self._print_line()
            self._shown_at = now

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        if self._console is None:
            self._console = Console(file=sys.stderr)
        # rich's own answer to a closed pipe is to end the program and to send stdout to /dev/null.
        self._console.on_broken_pipe = _raise_broken_pipe
        self._shown_at = self._clock()
        if not self._console.is_terminal:
            return
        # No refresh thread: it would draw while the run forks, compiles or dies.
        self._bar = Live(console=self._console, auto_refresh=False, get_renderable=self._renderable)
        self._bar.start(refresh=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()  # draws once more
            self._bar = None

    def _give_up(self) -> None:
        """Hand stdout and stderr back, which rich's bar takes while it is up."""
        self._alive = False
        if self._bar is not None:
            with contextlib.suppress(Exception):
                self._bar.stop()
            self._bar = None

    def _renderable(self) -> rich.console.RenderableType:
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        text = Text(self._text())  # under the bar: beside it, they would not fit on 80 columns
        width = min(self._console.width, max(text.cell_len, 40)) if self._console else None
        lines = Table.grid()
        lines.add_row(Bar(total=self._steps, completed=min(self._step, self._steps), width=width))
        lines.add_row(text)
        return lines

    def _print_line(self) -> None:
        assert self._console is not None
        # Not through rich's wrapping: a line of a log is one line, whatever width the console guesses.
        self._console.file.write(self._text() + "\n")
        self._console.file.flush()

    def _text(self) -> str:
        on_terminal = self._console is not None and self._console.is_terminal
        show_speed = on_terminal if self._show_speed is None else self._show_speed
        speed, left = self._speed() if show_speed else ("", "")
        accuracy = "" if self._accuracy is None else f"held-out accuracy {100 * self._accuracy:.1f} %"
        parts = (f"step {self._step}/{self._steps}", speed, self._privacy(), left, accuracy)
        return ", ".join(part for part in parts if part)

    def _speed(self) -> tuple[str, str]:
        step_s = self._pace.step_s
        if not step_s:
            return "- examples/s", ""
        left_s = max(self._steps - self._step, 0) * step_s
        return f"{self._expected_batch_size / step_s:,.0f} examples/s", f"{clock_time(left_s)} left"

    def _privacy(self) -> str:
        if not self._private:
            return "no privacy"
        spent = "-" if self._epsilon is None else shown_epsilon(self._epsilon, 2)
        return f"epsilon {spent}" if self._epsilon_allowed is None else f"epsilon {spent} of {self._epsilon_allowed:g}"

    def _guarded(self, action: Callable[[], Any]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception:
            # The run is worth more than its bar: go on without one.
            self._give_up()


def _raise_broken_pipe() -> None:
    raise BrokenPipeError


class _Pace:
    """Seconds a step, smoothed: the mean over the steps so far, each weighing RATE_MEMORY of the one after it."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds = 0.0
        self._weight = 0.0

    def add(self, step: int, now: float) -> None:
        """Note that `step` steps were finished at `now`; the first call only starts the clock."""
        if self._last is not None:
            steps, seconds = step - self._last[0], now - self._last[1]
            if steps <= 0:  # the same step again, with its evaluation
                return
            forgotten = RATE_MEMORY**steps
            self._seconds = forgotten * self._seconds + (1 - forgotten) * seconds / steps
            self._weight = forgotten * self._weight + (1 - forgotten)
        self._last = (step, now)

    @property
    def step_s(self) -> float | None:
        """Smoothed seconds a step; None until two updates were seen."""
        return self._seconds / self._weight if self._weight else None


def clock_time(seconds: float) -> str:
    """`seconds` as minutes and seconds, 1:05, with hours (2:01:05) and days (3d 02:01:05) where needed."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
