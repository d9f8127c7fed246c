"""Sweeps: one job array, one element and one run directory for each combination of values."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dpscale.config import load_config, to_toml
from dpscale.durable import write_atomically
from dpscale.errors import InputError
from launch import slurm_commands
from launch.profiles import load_profile
from launch.script import Job
from launch.submission import Submission, next_submission
from launch.submit import (
    SubmittedTask,
    make_directories,
    refuse_while_running,
    script_text,
    submit_through_submitit,
)


def points(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of every combination: "a.b=1,2" and "c.d=x,y" give four.

    Raises: InputError for text in another form, the same key twice, or values that make one run only.
    """
    axes = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        if not equals or not text.strip() or "." not in key:
            raise InputError(
                f"--sweep {sweep!r}: write section.key=value,value, for example optimizer.learning_rate=0.1,1"
            )
        axes.append([f"{key.strip()}={value}" for value in _values(text)])
    keys = [axis[0].partition("=")[0] for axis in axes]
    if len(set(keys)) < len(keys):
        raise InputError(f"--sweep {', '.join(keys)}: give each key once, with all its values")
    chosen = list(itertools.product(*axes))
    if len(chosen) == 1:
        raise InputError(f"--sweep {sweeps[0]}: one value is no sweep. Give it as an override: {' '.join(chosen[0])}")
    return chosen


def submit_sweep(
    config: str,
    overrides: Sequence[str],
    base: Path | None,
    submission: Submission,
    sweeps: Sequence[str],
    *,
    dry_run: bool,
) -> tuple[str | None, str, list[Path]]:
    """Submit a job array: (its id, the script's text, the run directories, in the array's order).

    Each point lives in BASE/KEY=VALUE,..; BASE is runs/NAME by default.

    Raises: InputError for a point whose config is wrong, before anything is submitted; RunDirectoryError while a job
    of one of them is still there.
    """
    chosen = points(sweeps)
    configs = [load_config(config, [*overrides, *point]) for point in chosen]
    base = base or Path("runs").absolute() / configs[0].run.name
    runs = [base / point_name(point) for point in chosen]
    if len(set(runs)) < len(runs):
        raise InputError("two points of the sweep have one name: give each value once")
    folders = [run / "attempts" / next_submission(run) for run in runs]
    profile = load_profile(submission.profile)
    job = Job(
        name=configs[0].run.name,
        run_dir=str(base),
        config="",
        python=sys.executable,
        working_directory=os.getcwd(),
        resources=submission.resources(profile),
        profile=profile,
        sbatch_args=submission.sbatch_args,
        srun_args=submission.srun_args,
        points=tuple((str(run), str(folder / "config.toml")) for run, folder in zip(runs, folders, strict=True)),
    )
    text = script_text(job, folders[0], submission.via)
    if dry_run:
        return None, text, runs
    slurm_commands.require("sbatch")
    for run, folder, values in zip(runs, folders, configs, strict=True):
        refuse_while_running(run)
        make_directories(run, folder, int(profile.run_directory_mode, 8))
        write_atomically(folder / "config.toml", to_toml(values))
        write_atomically(folder / "job.sbatch", text)
        (run / "STOP").unlink(missing_ok=True)
    if submission.via == "sbatch":
        number = slurm_commands.submit(str(folders[0] / "job.sbatch"))
    else:
        tasks = [SubmittedTask(config, run, new_attempt=False) for run, config in job.points]
        number = submit_through_submitit(job, folders[0], tasks)[0].partition("_")[0]
    for index, folder in enumerate(folders):
        kept = replace(submission, job=f"{number}_{index}", working_directory=job.working_directory)
        write_atomically(folder / "submission.json", json.dumps(asdict(kept), indent=1) + "\n")
    return number, text, runs


def point_name(point: Sequence[str]) -> str:
    """A directory's name for a combination: letters, digits and a few signs."""
    return re.sub(r"[^A-Za-z0-9_.=+,-]+", "-", ",".join(override.partition(".")[2] for override in point))


def _values(text: str) -> list[str]:
    """Values between commas, as TOML where they all are TOML, so that a list may be a value."""
    try:
        return [json.dumps(value) for value in tomllib.loads(f"values = [{text}]")["values"]]
    except tomllib.TOMLDecodeError:
        return [value.strip() for value in text.split(",")]
