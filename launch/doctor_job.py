"""`dpscale doctor --nodes N`: the same examination from every task of a short srun."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dpscale.errors import InputError
from launch.profiles import load_profile
from launch.resources import format_time
from launch.script import Job, body_of_tasks, interpreter, sbatch_options
from launch.submission import Submission

LIMIT = "0:10:00"
# Options of sbatch that srun does not have.
BATCH_ONLY = {"requeue", "open-mode", "output", "signal"}


def run_on_nodes(directory: Path, nodes: int, gpus: int | None, tasks: int | None, profile_name: str) -> int:
    """Run srun in the foreground; the worst exit code of its tasks.

    Raises: InputError without SLURM, or for resources that no job of this site can have.
    """
    if shutil.which("srun") is None:
        raise InputError("srun not found: run this on a login node of the cluster, or without --nodes")
    profile = load_profile(profile_name)
    asked = Submission(nodes, LIMIT, gpus, tasks, None, profile_name, "sbatch")
    resources = asked.resources(profile)
    job = Job("doctor", str(directory), "", sys.executable, os.getcwd(), resources, profile)
    options = {name: value for name, value in sbatch_options(job).items() if name not in BATCH_ONLY}
    options["time"] = format_time(resources.time_s)
    words = [f"--{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    command = shlex.join([*interpreter(job), "-m", "launch.doctor", str(directory)])
    inner = "\n".join([*body_of_tasks(job), f"exec {command}"])
    return subprocess.run(["srun", *words, *profile.srun_args, "bash", "-c", inner], check=False).returncode
