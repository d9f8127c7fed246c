"""Submitting a run: the script, its files in the run directory, submitit or sbatch, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpscale.config import RunConfig, to_toml
from dpscale.durable import write_atomically
from dpscale.errors import InputError, RunDirectoryError
from dpscale.lease import EXPIRES_AFTER_S
from dpscale.run_directory import RunDirectory
from launch import slurm_commands
from launch.profiles import load_profile
from launch.script import PLAIN_PATH, SRUN_OPTIONS, Job, body, header, interpreter, render, sbatch_options
from launch.submission import Submission, Via, jobs_of, next_submission

if TYPE_CHECKING:
    from submitit import SlurmExecutor

LEASE_MARGIN_S = 10  # for clocks that differ a little


@dataclass(frozen=True)
class SubmittedTask:
    """What submitit pickles: paths only. Each task calls it."""

    config: str
    run_dir: str
    new_attempt: bool

    def __call__(self) -> int:
        from launch.runtime import TaskArguments, run_task

        return run_task(TaskArguments(self.config, (), self.run_dir, self.new_attempt, logs=True))

    def checkpoint(self) -> Any:
        """submitit asks this when a job is to go on later: the same call. It does nothing else: no save, no requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_run(
    config: RunConfig, run_dir: Path, submission: Submission, *, new_attempt: bool, dry_run: bool
) -> tuple[str | None, str]:
    """Submit; (job id, script's text), or (None, text) with `dry_run`, which changes nothing.

    Guarantees: the job reads a copy of `config` in the run directory, so that later edits do not change a queued job.

    Raises: InputError for what cannot be submitted; RunDirectoryError while a job of this run is still there, and
        where its secret was destroyed.
    """
    RunDirectory.at(run_dir).refuse_if_ended()
    profile = load_profile(submission.profile)
    wait_s = _lease_wait_s(run_dir)
    begin = (f"--begin=now+{wait_s}",) if wait_s else ()
    job = Job(
        name=config.run.name,
        run_dir=str(run_dir),
        config=str(run_dir / "attempts" / next_submission(run_dir) / "config.toml"),
        python=sys.executable,
        working_directory=submission.working_directory or os.getcwd(),
        resources=submission.resources(profile),
        profile=profile,
        new_attempt=new_attempt,
        sbatch_args=(*begin, *submission.sbatch_args),
        srun_args=submission.srun_args,
    )
    folder = Path(job.config).parent
    task = SubmittedTask(job.config, job.run_dir, job.new_attempt)
    return submit_job(job, folder, submission, task, lambda: _keep_config(config, Path(job.config)), dry_run=dry_run)


def submit_job(
    job: Job,
    folder: Path,
    submission: Submission,
    task: Any,
    prepare: Callable[[], None] = lambda: None,
    *,
    dry_run: bool,
) -> tuple[str | None, str]:
    """Hand one job to SLURM; (its id, the script's text), or (None, text) with `dry_run`, which changes nothing.

    Args:
        folder: RUN/attempts/submit-N, to be made; script and submission are kept there.
        task: what submitit pickles and calls in each task; it must do what the script's srun line does.
        prepare: called when everything was found to be in order, before the job is handed over.

    Raises: InputError for what cannot be submitted; RunDirectoryError while a job of this run is still there.
    """
    run_dir = Path(job.run_dir)
    text = script_text(job, folder, submission.via)
    if dry_run:
        return None, text
    slurm_commands.require("sbatch")
    refuse_while_running(run_dir)
    make_directories(run_dir, folder, int(job.profile.run_directory_mode, 8))
    prepare()
    write_atomically(folder / "job.sbatch", text)
    (run_dir / "STOP").unlink(missing_ok=True)
    if submission.via == "sbatch":
        number = slurm_commands.submit(str(folder / "job.sbatch"))
    else:
        [number] = submit_through_submitit(job, folder, [task])
    kept = replace(submission, job=number, working_directory=job.working_directory)
    write_atomically(folder / "submission.json", json.dumps(asdict(kept), indent=1) + "\n")
    return number, text


def _keep_config(config: RunConfig, path: Path) -> None:
    write_atomically(path, to_toml(config))


def what_next(run_dir: Path, job: str) -> list[str]:
    """Lines for the owner: where it lives, how to follow and stop it."""
    where = shlex.quote(os.path.relpath(run_dir) if run_dir.is_relative_to(Path.cwd()) else str(run_dir))
    return [
        f"job {job}",
        f"run directory  {run_dir}",
        f"follow         dpscale logs {where} -f",
        f"state          dpscale status {where}",
        f"save and stop  dpscale stop {where}",
    ]


def make_directories(run_dir: Path, folder: Path, mode: int) -> None:
    """The run's directory, with `mode` if it is new, and the submission's folder in it.

    Raises: RunDirectoryError where they cannot be made.
    """
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        if not run_dir.exists():
            run_dir.mkdir()
            run_dir.chmod(mode)
        (run_dir / "attempts").mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run_dir} cannot be written ({error.strerror}): choose another --run-dir"
        ) from error


def refuse_while_running(run_dir: Path) -> None:
    """Raises: RunDirectoryError while a job of this run waits or runs."""
    for job, state in slurm_commands.live_jobs(jobs_of(run_dir)).items():
        raise RunDirectoryError(
            f"job {job} of {run_dir} is {state.lower()}: two jobs would use one noise. Wait for it, or stop it with "
            "dpscale stop; or choose another --run-dir"
        )


def _lease_wait_s(run_dir: Path) -> int:
    """How long a new job would be refused because the last one died without giving the directory back."""
    try:
        renewed_at = json.loads((run_dir / "lease").read_text())["renewed_at"]
        left_s = EXPIRES_AFTER_S - (time.time() - float(renewed_at))
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return int(left_s) + LEASE_MARGIN_S if left_s > 0 else 0


def script_text(job: Job, folder: Path, via: Via) -> str:
    """What sbatch will be given.

    Raises: InputError for a run directory whose name submitit cannot quote.
    """
    if via == "sbatch":
        return render(job)
    if PLAIN_PATH.fullmatch(job.run_dir) is None:
        raise InputError(f"the run directory {job.run_dir!r} has characters that submitit cannot quote: --via sbatch")
    executor = _submitit_executor(job, folder)
    if job.points:
        executor.parameters["map_count"] = len(job.points)  # what it does itself when it submits an array
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit_through_submitit(job: Job, folder: Path, tasks: Sequence[Any]) -> list[str]:
    """One job that calls the task, or one array with an element for each; their ids.

    Raises: SlurmError with sbatch's own words when it refuses.
    """
    from submitit.core.utils import FailedJobError

    executor = _submitit_executor(job, folder)
    try:
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        raise slurm_commands.SlurmError(f"sbatch said: {str(error).strip()}") from error
    return [each.job_id for each in submitted]


def _submitit_executor(job: Job, folder: Path) -> SlurmExecutor:
    from submitit import SlurmExecutor

    slurm_commands.require("srun")  # without it submitit makes no script either
    header(sbatch_options(job))  # submitit quotes for the shell, which is not enough for a comment line
    options = {name: True if value is None else value for name, value in sbatch_options(job).items()}
    nodes, tasks = int(str(options.pop("nodes"))), int(str(options.pop("ntasks-per-node")))
    executor = SlurmExecutor(folder=folder / "submitit", python=shlex.join(interpreter(job)))
    executor.update_parameters(
        job_name=options.pop("job-name"),
        nodes=nodes,
        ntasks_per_node=tasks,
        wckey=None,
        stderr_to_stdout=True,
        setup=body(job),
        srun_args=[*SRUN_OPTIONS, *job.profile.srun_args, *job.srun_args],
        additional_parameters=options,
    )
    return executor
