"""One incarnation of a job: RUN/attempts/JOB.RESTART/{env.json, rank-K.log, crash/rank-K.txt}, from inside a task."""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import socket
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TextIO

PACKAGES = ("dpscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "dp-accounting", "grain", "numpy")
SHOWN_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_ACCOUNT",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "DPSCALE_DEADLINE",
)


@dataclass
class Attempt:
    """Where this task writes. `open` sends stdout and stderr there; `crash` is for tracebacks of all threads."""

    directory: Path
    rank: int
    _job_stderr: int | None = None
    _crash: TextIO | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, run_dir: str | os.PathLike[str]) -> Attempt:
        """The one that SLURM names; outside of SLURM, one named by the time."""
        job = os.environ.get("SLURM_JOB_ID") or f"local.{time.strftime('%Y%m%dT%H%M%S')}"
        name = f"{job}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
        rank = int(os.environ.get("SLURM_PROCID") or 0)
        return cls(Path(run_dir).expanduser().absolute() / "attempts" / name, rank)

    @property
    def crash(self) -> TextIO:
        """Open after `open`."""
        assert self._crash is not None
        return self._crash

    def open(self) -> None:
        """Make the files, and write to them from now on; process 0 also writes env.json."""
        crash = self.directory / "crash"
        run_dir = self.directory.parent.parent
        for directory in (run_dir, self.directory.parent, self.directory, crash):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._job_stderr = os.dup(2)
        log = os.open(self.directory / f"rank-{self.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self._crash = open(self._crash_path, "a")  # noqa: SIM115 it stays open until the process ends
        faulthandler.enable(self._crash)
        if self.rank == 0:
            (self.directory / "env.json").write_text(json.dumps(_environment(), indent=1, sort_keys=True) + "\n")

    def failed(self, message: str) -> None:
        """Also put the reason of the end into crash/ and into the job's own log."""
        host = socket.gethostname()
        node = os.environ.get("SLURMD_NODENAME", host)
        os.write(self._job_stderr or 2, f"rank {self.rank} on {node}: {message}".encode())
        self.crash.write(f"rank {self.rank} on {node}, process {os.getpid()}\n{message}")
        self.crash.flush()

    def close(self) -> None:
        """The task ended well: leave no empty crash file behind."""
        faulthandler.disable()
        self.crash.close()
        if self._crash_path.stat().st_size == 0:
            self._crash_path.unlink()

    @property
    def _crash_path(self) -> Path:
        return self.directory / "crash" / f"rank-{self.rank}.txt"


def _environment() -> dict[str, object]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "started_at": time.time(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": versions,
        "variables": {name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ},
    }
