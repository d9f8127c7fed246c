"""What was submitted for a run, and which jobs that made: RUN/attempts/submit-N/submission.json. Light to import."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpscale.errors import InputError, RunDirectoryError

if TYPE_CHECKING:
    from launch.profiles import Profile
    from launch.resources import Resources

Via = Literal["submitit", "sbatch"]
JOB_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Submission:
    """What was asked for, kept in RUN/attempts/submit-N/submission.json so that `dpscale resume` can ask again."""

    nodes: int
    time: str
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    profile: str
    via: Via
    sbatch_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    working_directory: str = ""
    job: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Submission:
        """What was kept as submission.json. Raises: ValueError where it is not one."""
        values = json.loads(text)
        try:
            lists = {name: tuple(values[name]) for name in ("sbatch_args", "srun_args")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no submission: {error}") from error

    def resources(self, profile: Profile) -> Resources:
        """Validated, with the profile's defaults.

        Raises: InputError for what no job or no job of this site can have.
        """
        from launch.resources import Resources, parse_time

        gpus = profile.gpus_per_node if self.gpus_per_node is None else self.gpus_per_node
        time_s = parse_time(self.time)
        if profile.max_time is not None and time_s > parse_time(profile.max_time):
            raise InputError(f"--time {self.time} is longer than this site's {profile.max_time}: jobs are requeued")
        tasks = self.tasks_per_node or profile.tasks_per_node or max(1, gpus)
        return Resources(self.nodes, time_s, gpus, tasks, self.cpus_per_task or profile.cpus_per_task)


def last_submission(run_dir: Path) -> Submission | None:
    """What was last submitted for this run; None when it never was, or by hand.

    Raises: RunDirectoryError where the newest submission.json cannot be read.
    """
    for folder in reversed(_submissions(run_dir)):
        file = folder / "submission.json"
        try:
            return Submission.from_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"{file} cannot be read ({error}): dpscale submit says anew what to ask SLURM for"
            ) from error
    return None


def jobs_of(run_dir: Path) -> list[str]:
    """Ids of the jobs that this run is known to have had, the newest last; job arrays as ARRAY_INDEX.

    A submission that cannot be read is left out: what its job did is in the other files.
    """
    jobs: set[str] = set()
    for entry in (run_dir / "attempts").glob("*"):
        job, dot, restart = entry.name.rpartition(".")
        if dot and restart.isdecimal() and job.isdecimal():
            jobs.add(job)
    for folder in _submissions(run_dir):
        with contextlib.suppress(OSError, ValueError):
            job = Submission.from_json((folder / "submission.json").read_text(encoding="utf-8")).job
            if job and JOB_ID.fullmatch(job):
                jobs.add(job)
    # One element of an array has the array's own number, which SLURM takes for all of them.
    arrays = {job.partition("_")[0] for job in jobs if "_" in job}
    return sorted(jobs - arrays, key=lambda job: [int(part) for part in job.split("_")])


def next_submission(run_dir: Path) -> str:
    """Name of the next submission's folder."""
    return f"submit-{len(_submissions(run_dir)) + 1}"


def _submissions(run_dir: Path) -> list[Path]:
    folders = [path for path in (run_dir / "attempts").glob("submit-*") if path.name[7:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[7:]))
