"""What runs inside each task, however it was launched: environment -> dpscale.train -> exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import dataclass

EXIT_DONE, EXIT_WANTS_REQUEUE, EXIT_CRASH = 0, 75, 13


@dataclass(frozen=True)
class TaskArguments:
    """The same for every process of a run."""

    config: str
    overrides: tuple[str, ...]
    run_dir: str
    new_attempt: bool = False

    def command(self) -> list[str]:
        """Arguments of `python -m launch.runtime`."""
        return [
            *(["--new-attempt"] if self.new_attempt else []),
            *("--run-dir", self.run_dir, "--", self.config, *self.overrides),
        ]


def run_task(arguments: TaskArguments) -> int:
    """Train, and say how it ended; the process's exit code.

    Raises: DpscaleError, in a process alone. Among several, an error ends this process at once instead: jax would
    otherwise wait for the others at exit, and they for it.
    """
    from dpscale.distributed import Membership
    from dpscale.errors import DpscaleError

    alone = Membership.from_environment().num_processes == 1
    try:
        return _train(arguments)
    except DpscaleError as error:
        if alone:
            raise
        _end_now(f"dpscale: {error}\n", error.exit_code)
    except BaseException:
        if alone:
            raise
        _end_now(traceback.format_exc(), EXIT_CRASH)
    return EXIT_CRASH


def _train(arguments: TaskArguments) -> int:
    from dpscale.stopping import StopRequests

    stops = StopRequests()
    stops.install()  # before the imports that take seconds: an early signal is not lost
    from dpscale.config import load_config
    from dpscale.distributed import is_main
    from dpscale.train import train

    config = load_config(arguments.config, arguments.overrides)
    result = train(config, arguments.run_dir, new_attempt=arguments.new_attempt, stops=stops)
    if is_main():
        for line in _summary(result):
            print(line, flush=True)
    if result.state == "finished":
        return EXIT_DONE
    return EXIT_WANTS_REQUEUE if result.wants_requeue else EXIT_DONE


def _summary(result) -> list[str]:
    lines = []
    if result.state == "stopped":
        lines.append(f"stopped at step {result.step} of {result.steps} ({result.stop_reason}); run again to go on")
    else:
        lines.append(f"finished {result.step} steps")
    if "accuracy" in result.validation:
        lines.append(f"accuracy     {100 * result.validation['accuracy']:.1f} % on held-out examples")
    elif "loss" in result.validation:
        lines.append(f"loss         {result.validation['loss']:.4f} on held-out examples")
    if result.epsilon is None:
        lines.append("privacy      none (privacy.enabled = false)")
    elif result.state == "finished":
        lines.append(f"privacy      epsilon {result.epsilon:.3f} at delta {result.delta:g}")
    else:
        lines.append(
            f"privacy      epsilon {result.epsilon:.3f} at delta {result.delta:g} if the stop was decided in advance; "
            f"{result.epsilon_planned:.3f} if it was chosen by looking at results"
        )
    lines.append(f"checkpoint   {result.checkpoint}")
    lines.append(f"metrics      {result.metrics}")
    if result.plot is not None:
        lines.append(f"plot         {result.plot}")
    return lines


def _end_now(message: str, code: int) -> None:
    sys.stderr.write(message)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """`python -m launch.runtime [--new-attempt] --run-dir DIR -- CONFIG [section.key=value ...]`."""
    parser = argparse.ArgumentParser(prog="launch.runtime")
    parser.add_argument("--new-attempt", action="store_true")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    sys.exit(run_task(TaskArguments(given.config, tuple(given.overrides), given.run_dir, given.new_attempt)))


if __name__ == "__main__":
    main()
