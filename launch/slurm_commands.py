"""SLURM's commands, as far as the login side needs them: each with a time limit, each failure with its reason."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from dpscale.errors import DpscaleError, InputError

TIMEOUT_S = 30.0
# States of a job that may still run or come back.
LIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT"}


class SlurmError(DpscaleError):
    """SLURM refused, or its controller does not answer."""


def run(command: Sequence[str]) -> str:
    """What a SLURM command prints.

    Raises: InputError where it is not installed; SlurmError with its own words when it fails.
    """
    require(command[0])
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT_S:.0f} s: try again later") from error
    if done.returncode:
        raise SlurmError(f"{command[0]} said: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def require(program: str) -> None:
    """Raises: InputError where a SLURM command is not installed."""
    if shutil.which(program) is None:
        raise InputError(f"{program} not found: run this on a login node of the cluster, or load its SLURM module")


def submit(script: str, arguments: Sequence[str] = ()) -> str:
    """Hand a script's file to sbatch; the job's id."""
    return run(["sbatch", "--parsable", script, *arguments]).strip().partition(";")[0]


def job_states(jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Job id -> {job, state, restarts, reason, nodes, partition}: from scontrol, else from sacct, for jobs they know.

    `job`: what SLURM's other commands take it by.
    {} where SLURM cannot be asked at all, so that a run's own files can still be shown.
    """
    known: dict[str, dict[str, str]] = {}
    for job in jobs:
        try:
            known[job] = {"job": job} | parse_scontrol(run(["scontrol", "show", "job", job, "-o"]))
        except SlurmError:
            ended = _accounted(job)
            if ended:
                known[job] = ended
        except InputError:
            return {}
    return known


def live_jobs(jobs: Sequence[str]) -> dict[str, str]:
    """Those of `jobs` that may still run, with their state; elements of arrays by their index."""
    return {facts["job"]: facts["state"] for facts in job_states(jobs).values() if facts["state"] in LIVE}


def parse_scontrol(line: str) -> dict[str, str]:
    """The parts of one line of `scontrol show job -o` that `dpscale status` shows.

    An element of an array that has come into being is named ARRAY_INDEX: once it was requeued, scancel takes it by its
    own number no more, without a word (seen in SLURM 22.05).
    """
    names = {"state": "JobState", "restarts": "Restarts", "reason": "Reason", "nodes": "NodeList"}
    names |= {"partition": "Partition", "start": "StartTime", "end": "EndTime"}
    names |= {"array": "ArrayJobId", "index": "ArrayTaskId"}
    found = {key: re.search(rf"(?:^|\s){name}=(\S*)", line) for key, name in names.items()}
    facts = {key: match[1] for key, match in found.items() if match}
    array, index = facts.pop("array", None), facts.pop("index", "")
    return facts | ({"job": f"{array}_{index}"} if index.isdecimal() else {})


def _accounted(job: str) -> dict[str, str]:
    try:
        lines = run(["sacct", "-n", "-X", "-P", "-j", job, "-o", "State,NodeList,Partition"]).splitlines()
    except DpscaleError:
        return {}
    if not lines:
        return {}
    state, nodes, partition = (*lines[-1].split("|"), "", "")[:3]
    nodes = "" if nodes == "None assigned" else nodes
    return {"job": job, "state": state.split(" ")[0], "nodes": nodes, "partition": partition}
