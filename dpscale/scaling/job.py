"""The jobs of a sweep: one for each setting, submitted in random order through submitit or sbatch. Imports no jax."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpscale.config import RunConfig, to_toml
from dpscale.durable import write_atomically
from dpscale.errors import InputError
from dpscale.scaling.options import Effort, MeasureOptions
from dpscale.scaling.point import Mode, Setting, Variant, settings
from dpscale.scaling.sweep import SWEEP_FILE, Sweep, data_kind, logical_batch, shuffled
from launch.profiles import Profile, load_profile
from launch.resources import Resources
from launch.runtime import TaskArguments, run_task
from launch.script import MEETING, SRUN_OPTIONS, Job
from launch.submission import Submission, next_submission
from launch.submit import submit_job


@dataclass(frozen=True)
class SubmittedMeasurement:
    """What submitit pickles. Each task calls it."""

    arguments: TaskArguments

    def __call__(self) -> int:
        return run_task(self.arguments)

    def checkpoint(self) -> Any:
        """After a preemption: the same measurement from the start."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Wanted:
    """What `dpscale scaling submit` was asked for. `per_node`: devices on a node; None: the profile's."""

    devices: tuple[int, ...]
    modes: tuple[Mode, ...]
    variants: tuple[Variant, ...]
    repeats: int
    per_node: int | None = None
    windows: int = 5
    steps: int = 8
    cores: int = 0
    declared_public: bool = False
    one_at_a_time: bool = False
    order_seed: int = 0


@dataclass(frozen=True)
class SubmittedJob:
    """One job of the sweep; `job` is None after a dry run."""

    setting: Setting
    job: str | None
    script: str


def submit_sweep(
    config: RunConfig, directory: Path, wanted: Wanted, submission: Submission, *, dry_run: bool
) -> list[SubmittedJob]:
    """Submit one job for each setting, in random order; with `dry_run` change nothing and give the scripts.

    Settings that have all their records already are left out, so that a second call makes up for what failed.

    Args:
        directory: the sweep's, absolute.
        submission: time limit, profile, and how to submit; its numbers of nodes and tasks are ignored.

    Raises: InputError for private data, a batch beyond the data set, devices that are not whole nodes, or another
        sweep in `directory`; RunDirectoryError while a job of the sweep is still there.
    """
    data_kind(config, declared_public=wanted.declared_public)
    batch, num_examples = logical_batch(config)
    order = shuffled(settings(wanted.devices, wanted.modes, batch, wanted.repeats), wanted.order_seed)
    _check_batches(order, num_examples)
    profile = load_profile(submission.profile)
    to_do = [setting for setting in order if not _is_done(directory, setting, wanted.variants)]
    jobs = [_job(config, directory, setting, wanted, submission, profile) for setting in to_do]
    sweep = Sweep(config.run.name, wanted.variants, tuple(order))
    if not dry_run:
        _prepare(directory, sweep, config, profile)
    done = []
    for setting, job in zip(to_do, jobs, strict=True):
        folder = Path(job.run_dir) / "attempts" / next_submission(Path(job.run_dir))
        task = SubmittedMeasurement(_arguments(directory, setting, wanted))
        number, script = submit_job(job, folder, submission, task, dry_run=dry_run)
        done.append(SubmittedJob(setting, number, script))
    return done


def layout(devices: int, per_node: int, gpus: bool) -> tuple[int, int, int]:
    """(nodes, tasks on each, GPUs on each) for one process a device.

    Raises: InputError when more than one node would be needed and not all were full.
    """
    if devices <= per_node:
        return 1, devices, devices if gpus else 0
    if devices % per_node:
        raise InputError(
            f"{devices} devices are not whole nodes of {per_node}: choose multiples of {per_node}, or give --per-node"
        )
    return devices // per_node, per_node, per_node if gpus else 0


def _job(
    config: RunConfig, directory: Path, setting: Setting, wanted: Wanted, submission: Submission, profile: Profile
) -> Job:
    gpus = profile.gpus_per_node if submission.gpus_per_node is None else submission.gpus_per_node
    per_node = wanted.per_node or gpus or profile.tasks_per_node or 1
    nodes, tasks, gpus_on_each = layout(setting.devices, per_node, gpus > 0)
    time_s = submission.resources(profile).time_s
    cpus = submission.cpus_per_task or profile.cpus_per_task
    # SLURM starts a job of the same name and owner only when the ones before it have ended.
    singleton = ("--dependency=singleton",) if wanted.one_at_a_time else ()
    return Job(
        name=f"scaling-{config.run.name}",
        run_dir=str(directory / "jobs" / setting.name),
        config=str(directory / "config.toml"),
        python=sys.executable,
        working_directory=os.getcwd(),
        resources=Resources(nodes, time_s, gpus_on_each, tasks, cpus),
        profile=profile,
        sbatch_args=(*singleton, *submission.sbatch_args),
        srun_args=submission.srun_args,
        task_words=("-m", "launch.runtime", *_arguments(directory, setting, wanted).command()),
    )


def _is_done(directory: Path, setting: Setting, variants: Sequence[Variant]) -> bool:
    return all((directory / "records" / setting.record_name(variant)).exists() for variant in variants)


def _arguments(directory: Path, setting: Setting, wanted: Wanted) -> TaskArguments:
    options = MeasureOptions(
        sweep=str(directory),
        setting=setting,
        variants=wanted.variants,
        effort=Effort(wanted.windows, wanted.steps),
        cores=wanted.cores,
        declared_public=wanted.declared_public,
    )
    config, job = directory / "config.toml", directory / "jobs" / setting.name
    return TaskArguments(str(config), (), str(job), logs=True, verb="measure", options=options.words())


def _check_batches(order: Sequence[Setting], num_examples: int) -> None:
    largest = max(order, key=lambda setting: setting.batch)
    if largest.batch > num_examples:
        raise InputError(
            f"weak scaling to {largest.devices} devices takes a logical batch of {largest.batch:g}, but the data set "
            f"has {num_examples} examples: choose more made-up examples, a smaller privacy.expected_batch_size, or "
            "--mode strong"
        )


def _prepare(directory: Path, sweep: Sweep, config: RunConfig, profile: Profile) -> None:
    before = Sweep.load(directory)
    if before is not None and (before.variants, set(before.settings)) != (sweep.variants, set(sweep.settings)):
        raise InputError(f"{directory / SWEEP_FILE} asks for other points: choose another --out for another sweep")
    directory.mkdir(parents=True, exist_ok=True, mode=int(profile.run_directory_mode, 8))
    (directory / "jobs").mkdir(exist_ok=True)
    write_atomically(directory / "config.toml", to_toml(config))
    sweep.save(directory)


def by_hand() -> str:
    """slurm/scaling.sbatch: one point without a launcher."""
    return BY_HAND + MEETING + BY_HAND_END


BY_HAND = """\
#!/bin/bash
# Measure one point of a scaling sweep without a launcher:
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/scaling.sbatch CONFIG --out SWEEP [option ...]
# from the directory that the config's relative paths mean; the options are those of `dpscale scaling measure`, and
# records of many such jobs may go into one SWEEP. DPSCALE_PYTHON: the interpreter (default .venv/bin/python, else
# python3). Site set-up (modules, containers, network variables) goes before srun, at the end of this file.
#SBATCH --job-name=dpscale-scaling
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=0:30:00
#SBATCH --output=dpscale-scaling-%j.out

if [[ $# -lt 1 ]]; then echo "usage: sbatch [options] $0 CONFIG --out SWEEP [option ...]"; exit 2; fi
dpscale_python=${DPSCALE_PYTHON:-python3}
if [[ -z ${DPSCALE_PYTHON:-} && -x $PWD/.venv/bin/python ]]; then dpscale_python=$PWD/.venv/bin/python; fi
"""
BY_HAND_END = f'srun {" ".join(SRUN_OPTIONS)} "$dpscale_python" -m dpscale scaling measure "$@"\n'
