"""What the scenarios share: a small config, submitting it in every way, watching it, and reading its parameters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.loop import StepKeys
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIRED = os.environ.get("DPSCALE_REQUIRE_SLURM") == "1"
KILLS = int(os.environ.get("DPSCALE_SOAK_KILLS", "5" if REQUIRED else "0"))
STEPS = max(120, 20 * KILLS)  # of each run; in the soak about six for each kill, and at most 20
CLEAR_UP_S = 4.0
CONFIG = f"""
[run]
name = "scenario"
[data]
train = "digits/train"
[model]
name = "mlp"
[optimizer]
learning_rate = 0.5
[training]
steps = {STEPS}
[privacy]
noise_multiplier = 1.0
delta = 1e-4
accountant = "rdp"
expected_batch_size = 100
insecure_seed = 5
verify = false
[checkpoint]
every_steps = 10
"""

# Orbax restores onto the devices that saved, which one process does not have: hence NumPy arrays.
READ_PARAMETERS = """
import sys, jax, numpy, orbax.checkpoint as ocp
reader = ocp.PyTreeCheckpointer()
tree = reader.metadata(sys.argv[1]).item_metadata.tree
as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=numpy.ndarray), tree)
params = reader.restore(sys.argv[1], restore_args=as_numpy)["params"]
numpy.save(sys.argv[2], numpy.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]))
"""


class Cluster:
    """SLURM's commands on the test's cluster, and dpscale's on top of them."""

    def __init__(self, environment: dict[str, str], directory: Path, python: str, local_cluster: Any) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.environment = kept | environment | {"JAX_PLATFORMS": "cpu"}
        self.directory, self.python, self.local_cluster = directory, python, local_cluster
        self.files = Path(environment["SLURM_CONF"]).parent
        self.drawn = directory / "drawn"
        self.waiting_since: dict[str, float] = {}
        self.config = directory / "config.toml"
        self.config.write_text(CONFIG)

    def command(self, *words: str, check: bool = True, **variables: str) -> str:
        done = subprocess.run(
            words,
            env=self.environment | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if not check else "")

    def dpscale(self, *words: str) -> str:
        return self.command(self.python, "-m", "dpscale", *words)

    def profile(self, pace_s: float = 0.0, faults: list[dict] | None = None, **keys: object) -> str:
        """A site profile whose "container" plants these faults, and notes every draw and every key of noise."""
        plan = self.directory / "faults.json"
        self.drawn.mkdir(exist_ok=True)
        plan.write_text(json.dumps({"pace_s": pace_s, "faults": faults or [], "notes": str(self.drawn)}))
        words = [self.python, str(Path(__file__).parent / "with_fault.py"), str(plan)]
        path = self.directory / "site.toml"
        lines = [f"container = {json.dumps(words)}", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        path.write_text("\n".join(lines))
        return str(path)

    def submit(self, run_dir: Path, *words: str) -> str:
        printed = self.dpscale(
            "submit", str(self.config), "--run-dir", str(run_dir), "--time", "0:30:00", *(words or ())
        )
        return printed.split()[1]

    def state(self, job: str) -> dict[str, str]:
        line = self.command("scontrol", "show", "job", job, "-o")
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, what: str, condition: Callable[[], object], run_dir: Path, timeout_s: float = 120) -> None:
        """Wait for a condition; when it does not come, fail with all that the run has written."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {timeout_s} s\n{self.everything(run_dir)}"
            time.sleep(0.2)

    def wait_for_end(self, job: str, run_dir: Path, timeout_s: float = 150) -> None:
        """Until the job has left; a requeued one is started at once instead of after SLURM's two minutes."""

        def ended() -> bool:
            facts = self.state(job)
            self.start_at_once(job, facts)
            return facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

        self.wait(f"the end of job {job}", ended, run_dir, timeout_s)

    def wait_for_step(self, step: int, run_dir: Path, timeout_s: float = 120) -> None:
        self.wait(f"step {step}", lambda: durable_step(run_dir) >= step, run_dir, timeout_s)

    def wait_for_restart(self, job: str, restart: int, run_dir: Path) -> None:
        """Until the job runs its `restart`-th time."""

        def back() -> bool:
            facts = self.state(job)
            self.start_at_once(job, facts)
            return facts["JobState"] == "RUNNING" and int(facts["Restarts"]) >= restart

        self.wait(f"restart {restart} of job {job}", back, run_dir)

    def start_at_once(self, job: str, facts: dict[str, str]) -> None:
        """Spare a requeued job most of SLURM's two minutes.

        Not all of it: a job that starts again while its node still clears up the last incarnation fails at once.
        """
        if facts["JobState"] != "PENDING" or facts["Reason"] != "BeginTime":
            self.waiting_since.pop(job, None)
        elif time.monotonic() - self.waiting_since.setdefault(job, time.monotonic()) > CLEAR_UP_S:
            self.command("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def processes(self, *wanted: str) -> dict[int, str]:
        """Number -> command line and environment of every process of this cluster with these variables."""
        ours = {f"SLURM_CONF={self.environment['SLURM_CONF']}", *wanted}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().decode(errors="replace")
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if ours <= set(variables.split("\0")):
                found[int(process.name)] = command + variables
        return found

    def pid_of_rank(self, job: str, rank: int) -> int:
        """The process of a task of this job."""
        tasks = self.processes(f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0")
        [found] = [pid for pid, text in tasks.items() if "launch.runtime" in text]
        return found

    def lose_node(self, node: str) -> float:
        """End all that runs on a node in one moment, as a power cut does; when that was, in seconds since the epoch."""
        tasks = list(self.processes(f"SLURMD_NODENAME={node}"))
        steps = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        daemon = int((self.files / "run" / f"slurmd-{node}.pid").read_text())
        stepds = {pid for pid in steps if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"}
        for pid in (daemon, *stepds, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return time.time()

    def cancel_all(self) -> None:
        for job in self.command("squeue", "-h", "-o", "%A").split():
            self.command("scancel", job, check=False)
        deadline = time.monotonic() + 20
        while self.command("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)

    def everything(self, run_dir: Path) -> str:
        """What there is to read about a run that went wrong."""
        files = [*run_dir.glob("attempts/*.log"), *run_dir.glob("attempts/*.ends"), *run_dir.glob("attempts/*/*.log")]
        files += [*run_dir.glob("attempts/*/crash/*"), *run_dir.glob("attempts/submit-*/submitit/*.out")]
        parts = [self.command("scontrol", "show", "job", "-o", check=False)]
        return "\n".join(parts + [f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files])


def durable_step(run_dir: Path) -> int:
    return max((int(file.parent.name) for file in run_dir.glob("ckpt/[0-9]*/manifest.json")), default=0)


def ends(run_dir: Path, job: str) -> list[dict]:
    """How each incarnation of a job ended."""
    file = run_dir / "attempts" / f"{job}.ends"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def newest_log(run_dir: Path, job: str) -> str:
    """What process 0 wrote in the newest incarnation of a job."""
    files = (run_dir / "attempts").glob(f"{job}.*/rank-0.log")
    return max(files, key=lambda file: int(file.parent.name.rpartition(".")[2])).read_text()


def planted_at(cluster: Cluster, job: str, restart: int) -> float:
    """When a fault came, in seconds since the epoch."""
    return float((cluster.drawn / f"fault-{job}.{restart}").read_text())


def check_draws_and_noise(cluster: Cluster, run_dir: Path, jobs: Iterable[str]) -> None:
    """Every process of every incarnation drew the run's own examples, with its own key of noise, in every step."""
    plan = PrivacyPlan.from_json((run_dir / "plan.json").read_text())
    secret = RootSecret.from_insecure_seed(5)
    sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, secret.derive("sampling"), plan.max_batch_size)
    drawn = [("draw", step, sampler.digest(step).hex()) for step in range(STEPS)]
    noise = [("noise", step, StepKeys(secret, 0).noise(step).tobytes().hex()) for step in range(STEPS)]
    noted = set()
    for job in jobs:
        files = list(cluster.drawn.glob(f"{job}.*"))
        assert files
        for line in (line for file in files for line in file.read_text().splitlines()):
            what, step, value = line.split()
            noted.add((what, int(step), value))
    assert noted == {*drawn, *noise}


def parameters(run_dir: Path) -> np.ndarray:
    """All parameters of the finished run, as one vector."""
    assert (run_dir / "finished").exists()
    out = run_dir.parent / f"{run_dir.name}-parameters.npy"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "ignore", "-c", READ_PARAMETERS, str(run_dir / "ckpt" / str(STEPS)), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out)
