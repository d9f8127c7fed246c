"""Laws of the progress display: what it says, when, and that it never harms the run."""

import io
import re
import sys
import threading

import pytest
from rich.console import Console

from dpscale.metrics.progress import ProgressBar, clock_time


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, color_system=None)


def log():
    return Console(file=io.StringIO(), force_terminal=False, width=20)


def text(console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def last_line(console) -> str:
    return re.split(r"[\r\n]+", text(console).strip())[-1]


def test_a_terminal_shows_steps_speed_epsilon_time_left_and_accuracy():
    console, clock = terminal(), Clock()
    with ProgressBar(150, 1024, epsilon_allowed=3, console=console, clock=clock) as progress:
        for step in range(1, 51):
            clock.now += 0.8
            progress.update(step, epsilon=0.03 * step, accuracy=0.914 if step == 50 else None)
    # 1024 examples / 0.8 s; 100 steps left * 0.8 s.
    bar, line = re.split(r"[\r\n]+", text(console).strip())[-2:]
    assert line == "step 50/150, 1,280 examples/s, epsilon 1.50 of 3, 1:20 left, held-out accuracy 91.4 %"
    assert len(bar.strip()) == len(line) // 3  # without colour only the finished third is drawn


def test_the_bar_is_redrawn_at_most_ten_times_a_second():
    console, clock = terminal(), Clock()
    with ProgressBar(10_000, 64, console=console, clock=clock) as progress:
        for step in range(1, 1001):
            clock.now += 0.001
            progress.update(step)
    assert 10 <= text(console).count("step ") <= 15


def test_no_thread_is_started():
    before = threading.active_count()
    with ProgressBar(10, 64, console=terminal()) as progress:
        progress.update(1)
        assert threading.active_count() == before


def test_a_log_gets_one_whole_line_at_each_evaluation_and_at_the_end():
    console, clock = log(), Clock()
    with ProgressBar(9, 64, epsilon_allowed=3, line_every_s=None, console=console, clock=clock) as progress:
        for step in range(1, 10):
            clock.now += 60
            progress.update(step, epsilon=step / 3, accuracy=0.5 if step in (3, 6) else None)
    assert console.file.getvalue() == (
        "step 3/9, epsilon 1.00 of 3, held-out accuracy 50.0 %\n"
        "step 6/9, epsilon 2.00 of 3, held-out accuracy 50.0 %\n"
        "step 9/9, epsilon 3.00 of 3, held-out accuracy 50.0 %\n"
    )


def test_a_log_gets_a_line_every_so_many_seconds():
    console, clock = log(), Clock()
    with ProgressBar(1000, 64, line_every_s=30, console=console, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step)
    assert [line.split(",")[0] for line in text(console).splitlines()] == [
        "step 30/1000",
        "step 60/1000",
        "step 90/1000",
    ]


@pytest.mark.parametrize("slow", [1.0, 7.0])
def test_a_log_says_nothing_that_follows_step_times_unless_asked(slow):
    seen = {}
    for show_speed in (None, True):
        console, clock = log(), Clock()
        with ProgressBar(4, 64, line_every_s=None, console=console, clock=clock, show_speed=show_speed) as progress:
            for step in range(1, 5):
                clock.now += slow
                progress.update(step, epsilon=1.0, accuracy=0.5)
        seen[show_speed] = text(console)
    assert seen[None] == "".join(f"step {s}/4, epsilon 1.00, held-out accuracy 50.0 %\n" for s in range(1, 5))
    assert f"{64 / slow:.0f} examples/s" in seen[True]


def test_speed_is_smoothed_and_forgets_a_slow_start():
    console, clock = log(), Clock()
    with ProgressBar(400, 100, line_every_s=None, console=console, clock=clock, show_speed=True) as progress:
        progress.update(1, accuracy=0.1)
        assert "- examples/s" in last_line(console)
        clock.now += 100.0
        progress.update(2, accuracy=0.1)
        assert "1 examples/s" in last_line(console)
        for step in range(3, 201):
            clock.now += 1.0
            progress.update(step)
        progress.update(200, accuracy=0.1)
    assert "100 examples/s, epsilon -, 3:20 left" in last_line(console)


def test_speed_after_a_resume_counts_only_the_steps_of_this_process():
    console, clock = terminal(), Clock()
    with ProgressBar(1000, 10, start_step=900, console=console, clock=clock) as progress:
        assert "step 900/1000, - examples/s" in last_line(console)
        for step in (901, 902):
            clock.now += 2.0
            progress.update(step)
    assert "step 902/1000, 5 examples/s, epsilon -, 3:16 left" in last_line(console)


def test_no_privacy_and_no_limit_are_said():
    for options, said in (
        ({"private": False}, "no privacy"),
        ({}, "epsilon 1.25"),
        ({"epsilon_allowed": 8.0}, "epsilon 1.25 of 8"),
    ):
        console = log()
        with ProgressBar(1, 10, console=console, **options) as progress:
            progress.update(1, epsilon=1.25)
        assert text(console) == f"step 1/1, {said}\n"


class Pipe(io.StringIO):
    closed_by_reader = False

    def write(self, text):
        if self.closed_by_reader:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("closes_at", [0, 1, 2, 3])
def test_a_closed_pipe_ends_the_display_and_not_the_run(is_terminal, closes_at):
    pipe, clock, streams = Pipe(), Clock(), (sys.stdout, sys.stderr)
    pipe.closed_by_reader = closes_at == 0
    console = Console(file=pipe, force_terminal=is_terminal, color_system=None)
    with ProgressBar(3, 10, console=console, clock=clock) as progress:
        for step in (1, 2, 3):
            pipe.closed_by_reader |= step == closes_at
            clock.now += 60
            progress.update(step, accuracy=0.5)
            if pipe.closed_by_reader:
                assert (sys.stdout, sys.stderr) == streams  # what the run prints is not sent to the dead pipe
        pipe.closed_by_reader = True
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("console", [terminal(), log()])
def test_a_value_that_cannot_be_shown_ends_the_display_and_not_the_run(console):
    streams = (sys.stdout, sys.stderr)
    with ProgressBar(2, 10, console=console) as progress:
        progress.update(1, accuracy="much")  # pyright: ignore[reportArgumentType]
        assert (sys.stdout, sys.stderr) == streams
        progress.update(2)


def failing_run(console):
    with ProgressBar(2, 10, console=console) as progress:
        progress.update(1)
        raise RuntimeError("the run")


def test_an_error_of_the_run_passes_through_and_the_bar_lets_go_of_the_terminal():
    console, streams = terminal(), (sys.stdout, sys.stderr)
    with pytest.raises(RuntimeError, match="the run"):
        failing_run(console)
    assert console.file.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again
    assert (sys.stdout, sys.stderr) == streams


def test_nothing_is_shown_outside_the_with_block():
    console = log()
    progress = ProgressBar(2, 10, console=console)
    progress.update(1, accuracy=0.5)
    with progress:
        pass
    progress.update(2)
    assert text(console) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (65, "1:05"), (59.6, "1:00"), (7265, "2:01:05"), (3 * 86400 + 7265, "3d 02:01:05")],
)
def test_clock_time(seconds, shown):
    assert clock_time(seconds) == shown
