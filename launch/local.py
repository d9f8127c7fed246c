"""Several processes on this machine, joined by jax.distributed: what SLURM does on many."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.runtime import TaskArguments

POLL_S = 0.1
GRACE_S = 10.0  # between asking the others to end and killing them
LOG_TAIL_LINES = 25


def run_locally(arguments: TaskArguments, num_processes: int) -> int:
    """Run `num_processes` tasks here and wait; the exit code of the first that failed, else process 0's.

    Process 0 writes to this terminal; the others to RUN/attempts/local.TIME/rank-K.log. When one process fails the
    others are ended, and the tail of its log is shown. Stop signals are passed on to all.
    """
    logs = Path(arguments.run_dir).expanduser().absolute() / "attempts" / f"local.{time.strftime('%Y%m%dT%H%M%S')}"
    for directory in (logs.parent.parent, logs.parent, logs):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    coordinator = f"127.0.0.1:{_free_port()}"
    processes = [_start(arguments, rank, num_processes, coordinator, logs) for rank in range(num_processes)]
    with _signals_passed_on(processes):
        failed = _wait(processes)
    if failed is None:
        return processes[0].returncode
    log = logs / f"rank-{failed}.log"
    if failed != 0 and log.exists():
        tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print(f"process {failed} ended with code {processes[failed].returncode}; the end of {log}:", file=sys.stderr)
        print("\n".join(tail), file=sys.stderr)
    return processes[failed].returncode if processes[failed].returncode > 0 else 1


def _start(
    arguments: TaskArguments, rank: int, num_processes: int, coordinator: str, logs: Path
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "DPSCALE_COORDINATOR": coordinator,
        "DPSCALE_NUM_PROCESSES": str(num_processes),
        "DPSCALE_PROCESS_ID": str(rank),
    }
    command = [sys.executable, "-m", "launch.runtime", *arguments.command()]
    if rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with open(logs / f"rank-{rank}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; on the first failure end the others and return its rank."""
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll() not in (None, 0, 75):
                _end(processes)
                return rank
        time.sleep(POLL_S)
    return next((rank for rank, process in enumerate(processes) if process.returncode not in (0, 75)), None)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _signals_passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
