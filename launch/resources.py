"""What a job asks SLURM for: nodes x tasks x devices x CPUs x time, validated before anything is submitted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpscale.errors import InputError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class Resources:
    """`tasks_per_node`: one process each; by default one for each GPU, and one without GPUs. `time_s`: the job's limit.

    Raises: InputError for numbers that no job can have, or GPUs that cannot be shared among the tasks.
    """

    nodes: int
    time_s: int
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("time_s", 60)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            raise InputError(f"cpus_per_task={self.cpus_per_task}: give at least 1")
        if self.gpus_per_node and self.gpus_per_node % self.tasks_per_node:
            raise InputError(
                f"{self.gpus_per_node} GPUs cannot be shared by {self.tasks_per_node} tasks on a node: the GPUs must "
                "be a multiple of the tasks; one task for each GPU is usual"
            )

    @property
    def num_tasks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.tasks_per_node


def parse_time(text: str) -> int:
    """Seconds of SLURM's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises: InputError for anything else.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--time {text}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, for example 8:00:00")
    parts = [int(match[name]) for name in ("first", "second", "third") if match[name] is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def format_time(seconds: int) -> str:
    """HOURS:MINUTES:SECONDS, which SLURM reads in any number of hours."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
