"""What a run does right now: from squeue and scontrol, then sacct, then the run's own files. Imports no jax."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpscale.errors import InputError
from dpscale.metrics.status import read_status
from dpscale.privacy.shown import shown_epsilon
from launch import slurm_commands
from launch.submission import jobs_of

LOST = "lost"
END_KEYS = {"restart": int, "code": int, "durable_step": int, "decision": str, "at": int | float}
WHY = {
    "requeue": "saved its state and was queued again",
    "requeue-after-crash": "crashed after new checkpoints, queued again",
    "gave-up": "not queued again: no progress, or too many crashes",
    "slurm-decides": "ended by SLURM (cancelled, preempted or requeued)",
    "final": "final",
    LOST: "its script had no time to say why (lost node, preemption or requeue from outside), queued again by SLURM",
}


def require_run(run_dir: Path) -> None:
    """Raises: InputError when there is no run in that directory."""
    if not (run_dir / "run.json").exists() and not (run_dir / "attempts").exists():
        raise InputError(f"{run_dir} is no run's directory: give what `dpscale submit` or `dpscale train` printed")


def status_lines(run_dir: Path) -> list[str]:
    """State, progress, privacy spent, checkpoint, restarts and why; one line each."""
    require_run(run_dir)
    jobs = jobs_of(run_dir)
    newest = jobs[-1:]
    facts = slurm_commands.job_states(newest).get(newest[0], {}) if newest else {}
    own = read_status(run_dir) or {}
    lines = [f"run            {run_dir}", f"state          {_state(run_dir, own, facts)}"]
    if newest:
        lines.append(f"job            {_job(facts.get('job', newest[0]), facts)}")
    if own:
        lines.append(f"step           {own.get('step')} of {own.get('steps')}")
        rate = examples_per_s(run_dir)
        if rate is not None:
            lines.append(f"examples/s     about {rate:.3g} (planned examples between the last two checkpoints)")
        if own.get("epsilon") is not None:
            if own.get("guarantee", True):
                lines.append(f"privacy        epsilon {shown_epsilon(own['epsilon'])} at delta {own['delta']:g}")
            else:
                lines.append("privacy        NONE: a fixed seed stands in place of the secret")
        if own.get("verified_laws") is not None:
            lines.append(f"verified       {own['verified_laws']} laws, before the first step of this start")
        lines.append(f"checkpoint     {_checkpoint(own)}")
        lines.append(f"written        {_age(own.get('updated_at'))}")
    lines += _restarts(run_dir, newest, facts)
    crashes = sorted((run_dir / "attempts").glob("*/crash/*.txt"), key=lambda path: path.stat().st_mtime)
    lines += [f"  crash file   {path}" for path in crashes[-3:] if path.stat().st_size]
    return lines


def read_ends(run_dir: Path) -> list[dict[str, Any]]:
    """How each incarnation of each job ended, oldest first, as their scripts wrote it; half a line is left out."""
    ends = []
    for file in (run_dir / "attempts").glob("*.ends"):
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                end = json.loads(line)
                if isinstance(end, dict) and all(isinstance(end.get(key), kind) for key, kind in END_KEYS.items()):
                    ends.append({"job": file.stem, **end})
    return sorted(ends, key=lambda end: end["at"])


def _restarts(run_dir: Path, newest: list[str], facts: dict[str, str]) -> list[str]:
    """How often a job came back, and how its last incarnations ended."""
    ends = read_ends(run_dir)
    came_back = _came_back(run_dir)
    restarts = int(facts["restarts"]) if facts.get("restarts", "").isdecimal() else 0
    if restarts:  # SLURM counts the one that waits to begin again, too; files bear the element's own number
        came_back.setdefault((newest[0].partition("_")[0], restarts - 1), time.time())
    said = {(end["job"], end["restart"]) for end in ends}
    lost = [{"job": job, "restart": restart, "decision": LOST, "at": at} for (job, restart), at in came_back.items()]
    ends = sorted(ends + [end for end in lost if (end["job"], end["restart"]) not in said], key=lambda end: end["at"])
    queued = {(end["job"], end["restart"]) for end in ends if end["decision"].startswith("requeue")}
    lines = [f"restarts       {len(queued | set(came_back))}"]
    for end in ends[-5:]:
        reason = WHY.get(end["decision"], end["decision"])
        if "code" in end:
            reason = f"exit code {end['code']} at durable step {end['durable_step']}: {reason}"
        lines.append(f"  job {end['job']}, restart {end['restart']}: {reason}")
    return lines


def _came_back(run_dir: Path) -> dict[tuple[str, int], float]:
    """(job, restart) of the incarnations that a later one followed -> when that began, in seconds since the epoch."""
    began = {}
    for path in (run_dir / "attempts").glob("*.*/env.json"):
        job, _, restart = path.parent.name.rpartition(".")
        if job.isdecimal() and restart.isdecimal() and int(restart) > 0:
            began[job, int(restart) - 1] = path.stat().st_mtime
    return began


def examples_per_s(run_dir: Path) -> float | None:
    """Planned examples per second between the last two checkpoints; None before there are two, or across a restart."""
    manifests = sorted((run_dir / "ckpt").glob("[0-9]*/manifest.json"), key=lambda path: path.stat().st_mtime)[-2:]
    try:
        batch = json.loads((run_dir / "plan.json").read_text())["expected_batch_size"]
        (old, new), times = (int(path.parent.name) for path in manifests), [path.stat().st_mtime for path in manifests]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    starts = [path.stat().st_mtime for path in (run_dir / "attempts").glob("*/env.json")]
    if new <= old or times[1] <= times[0] or any(times[0] < start < times[1] for start in starts):
        return None
    return (new - old) * batch / (times[1] - times[0])


def log_files(run_dir: Path, rank: int | None) -> list[Path]:
    """The newest incarnation's log: of `rank`, else of rank 0, and the job's own where no task has written yet.

    Raises: InputError when there is none.
    """
    require_run(run_dir)
    attempts = run_dir / "attempts"
    logs = list(attempts.glob(f"*/rank-{rank or 0}.log"))
    if not logs and rank is None:
        logs = list(attempts.glob("job-*.log"))
    if not logs:
        ranks = {int(path.stem[5:]) for path in attempts.glob("*/rank-*.log") if path.stem[5:].isdecimal()}
        if rank is not None and ranks:
            raise InputError(f"there is no log of rank {rank} in {attempts}: its processes are 0 to {max(ranks)}")
        which = f"of rank {rank} " if rank is not None else ""
        raise InputError(f"there is no log {which}in {attempts} yet: look at `dpscale status`, or try again later")
    return sorted(logs, key=lambda path: path.stat().st_mtime)


def _state(run_dir: Path, own: dict[str, Any], facts: dict[str, str]) -> str:
    if (run_dir / "finished").exists():
        return "finished"
    state = facts.get("state")
    if state in slurm_commands.LIVE:
        waits = state == "PENDING" and facts.get("reason") not in (None, "None")
        stopping = ", asked to stop" if (run_dir / "STOP").exists() else ""
        return state.lower() + (f" ({facts['reason']})" if waits else "") + stopping
    if own.get("state") == "running":
        ended = f"its job is {state.lower()}" if state else "SLURM does not know its job"
        return f"not running ({ended}): go on with `dpscale resume`"
    return own.get("state") or (state.lower() if state else "not started")


def _job(job: str, facts: dict[str, str]) -> str:
    parts = [job]
    if facts.get("nodes") not in (None, "", "(null)"):
        parts.append(f"on {facts['nodes']}")
    if facts.get("partition"):
        parts.append(f"in partition {facts['partition']}")
    return " ".join(parts)


def _checkpoint(own: dict[str, Any]) -> str:
    step = own.get("checkpoint_step")
    return "none yet" if step is None else f"step {step}"


def _age(written: Any) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(str(written))).total_seconds()
    except ValueError:
        return "at an unknown time"
    return f"{max(0.0, seconds):.0f} s ago"
