"""What runs inside each task, however it was launched: environment -> train, verify, audit, .. -> exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from launch.attempt import Attempt

if TYPE_CHECKING:
    from dpscale.config import RunConfig
    from dpscale.stopping import StopRequests
    from dpscale.watchdog import Watchdog

EXIT_DONE, EXIT_BAD_INPUT, EXIT_CRASH, EXIT_WANTS_REQUEUE = 0, 2, 13, 75
EXIT_VIOLATION = 1  # an audit refuted the claim
# The end of process 0 aborts the others: they may first say what they have to say.
PROCESS_ZERO_ENDS_LATER_S = 2.0


@dataclass(frozen=True)
class TaskArguments:
    """The same for every process of a run. `logs`: each task writes to RUN/attempts/JOB.RESTART/rank-K.log.

    `verb`: what the tasks do, one of VERBS; `options`: "name=value" each, for that verb alone.
    """

    config: str
    overrides: tuple[str, ...]
    run_dir: str
    new_attempt: bool = False
    logs: bool = False
    verb: str = "train"
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Arguments of `python -m launch.runtime`."""
        return [
            *(["--new-attempt"] if self.new_attempt else []),
            *(["--logs"] if self.logs else []),
            *([] if self.verb == "train" else ["--verb", self.verb]),
            *(f"--option={option}" for option in self.options),
            *("--run-dir", self.run_dir, "--", self.config, *self.overrides),
        ]


def run_task(arguments: TaskArguments) -> int:
    """Train (or what `verb` says), and say how it ended; the process's exit code.

    Raises: DpscaleError, in a process alone without log files. Otherwise the process ends here, without Python's exit
    hooks: among several, jax would wait for the others, and they for it.
    """
    from dpscale.stopping import StopRequests

    stops = StopRequests.from_environment()
    stops.install()  # before the imports that take seconds: an early signal is not lost
    from dpscale.distributed import Membership
    from dpscale.errors import DpscaleError
    from dpscale.watchdog import Watchdog

    attempt = Attempt.from_environment(arguments.run_dir) if arguments.logs else None
    if attempt is not None:
        attempt.open()
    alone = False
    try:
        membership = Membership.from_environment()
        alone = membership.num_processes == 1 and attempt is None
        crash_file = attempt.crash if attempt is not None else sys.stderr
        code = VERBS[arguments.verb](
            arguments, stops, Watchdog.off() if alone else Watchdog.from_environment(crash_file)
        )
        if membership.num_processes > 1:
            _leave_together()
    except DpscaleError as error:
        if alone:
            raise
        _fail(attempt, f"dpscale: {error}\n", error.exit_code)
    except BaseException:
        if alone:
            raise
        _fail(attempt, traceback.format_exc(), EXIT_CRASH)
    if not alone:
        if attempt is not None:
            attempt.close()
        _end_now(code)
    return code


def _train(arguments: TaskArguments, stops: StopRequests, watchdog: Watchdog) -> int:
    from dpscale.config import load_config
    from dpscale.distributed import is_main
    from dpscale.train import train

    config = load_config(arguments.config, arguments.overrides)
    result = train(config, arguments.run_dir, new_attempt=arguments.new_attempt, stops=stops, watchdog=watchdog)
    if is_main():
        for line in _summary(result, config):
            print(line, flush=True)
    if result.state == "finished":
        return EXIT_DONE
    return EXIT_WANTS_REQUEUE if result.wants_requeue else EXIT_DONE


def _verify(arguments: TaskArguments, stops: StopRequests, watchdog: Watchdog) -> int:
    from dpscale.config import load_config
    from dpscale.distributed import is_main
    from dpscale.verify_config import verify

    verdict = verify(load_config(arguments.config, arguments.overrides), watchdog=watchdog)
    if is_main():
        for line in verdict.lines():
            print(line, flush=True)
    return EXIT_DONE


def _audit(arguments: TaskArguments, stops: StopRequests, watchdog: Watchdog) -> int:
    from pathlib import Path

    from dpscale.audit import audit
    from dpscale.audit.report import result_lines
    from dpscale.config import load_config
    from dpscale.distributed import is_main
    from dpscale.privacy.plan import PrivacyPlan

    given = dict(option.split("=", 1) for option in arguments.options)
    result = audit(
        load_config(arguments.config, arguments.overrides),
        arguments.run_dir,
        canaries=int(given["canaries"]),
        steps=int(given["steps"]) if "steps" in given else None,
        confidence=float(given["confidence"]),
        plan=PrivacyPlan.from_json(Path(given["plan"]).read_text(encoding="utf-8")) if "plan" in given else None,
        stops=stops,
        watchdog=watchdog,
    )
    if is_main():
        for line in result_lines(result):
            print(line, flush=True)
    return EXIT_VIOLATION if result.violation else EXIT_DONE


def _measure(arguments: TaskArguments, stops: StopRequests, watchdog: Watchdog) -> int:
    from dpscale.scaling.in_task import measure_in_task

    with watchdog.grace():
        measure_in_task(arguments.config, arguments.overrides, arguments.options)
    watchdog.close()
    return EXIT_DONE


VERBS = {"train": _train, "verify": _verify, "audit": _audit, "measure": _measure}


def _leave_together() -> None:
    """After a barrier all processes end within milliseconds: srun ends the others at the first exit code above 0."""
    from dpscale.distributed import leave

    _ignore_signals()
    leave()


def _fail(attempt: Attempt | None, message: str, code: int) -> NoReturn:
    _ignore_signals()
    sys.stderr.write(message)
    sys.stderr.flush()
    if attempt is not None:
        attempt.failed(message)
    if int(os.environ.get("DPSCALE_PROCESS_ID") or os.environ.get("SLURM_PROCID") or 0) == 0:
        time.sleep(PROCESS_ZERO_ENDS_LATER_S)
    _end_now(code)


def _ignore_signals() -> None:
    """This process ends in a moment, with its own exit code and not with that of srun's TERM."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _summary(result, config: RunConfig) -> list[str]:
    """Lines for a terminal or a log, which others may read: held-out metrics only if they were declared public."""
    from dpscale.privacy.shown import shown_epsilon

    lines = []
    if result.state == "stopped":
        lines.append(f"stopped at step {result.step} of {result.steps} ({result.stop_reason}); run again to go on")
    else:
        short = "" if result.step == result.steps else f" of {result.steps}: the allowed epsilon is spent"
        lines.append(f"finished {result.step} steps{short}")
    if result.validation and config.data.validation_is != "public":
        lines.append("accuracy     not shown: the held-out examples are private (metrics.sensitive = true records it)")
    elif "accuracy" in result.validation:
        lines.append(f"accuracy     {100 * result.validation['accuracy']:.1f} % on held-out examples")
    elif "loss" in result.validation:
        lines.append(f"loss         {result.validation['loss']:.4f} on held-out examples")
    if result.epsilon is None:
        lines.append("privacy      none (privacy.enabled = false)")
    elif config.privacy.insecure_seed is not None:
        lines.append("privacy      NONE: a fixed seed stands in place of the secret (privacy.insecure_seed)")
    elif result.state == "finished":
        lines.append(f"privacy      epsilon {shown_epsilon(result.epsilon)} at delta {result.delta:g}")
    else:
        lines.append(
            f"privacy      epsilon {shown_epsilon(result.epsilon)} at delta {result.delta:g} if the stop was decided "
            f"in advance; {shown_epsilon(result.epsilon_planned)} if it was chosen by looking at results"
        )
    lines.append(f"checkpoint   {result.checkpoint}")
    lines.append(f"metrics      {result.metrics}")
    if result.plot is not None:
        lines.append(f"plot         {result.plot}")
    if result.report is not None:
        lines.append(f"report       {result.report}")
    return lines


def main() -> None:
    """`python -m launch.runtime [--new-attempt] [--logs] [--verb V] --run-dir DIR -- CONFIG [key=value ...]`."""
    parser = argparse.ArgumentParser(prog="launch.runtime")
    parser.add_argument("--new-attempt", action="store_true")
    parser.add_argument("--logs", action="store_true")
    parser.add_argument("--verb", choices=list(VERBS), default="train")
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    arguments = TaskArguments(
        given.config,
        tuple(given.overrides),
        given.run_dir,
        given.new_attempt,
        given.logs,
        given.verb,
        tuple(given.option),
    )
    sys.exit(run_task(arguments))


if __name__ == "__main__":
    main()
