#!/usr/bin/env python3
"""A real SLURM on one machine, for tests and for trying out `dpscale submit`; it leaves nothing behind.

    python slurm/local-cluster/cluster.py start [DIR] [--nodes 2] [--gpus 0]    prints how to submit and how to stop
    python slurm/local-cluster/cluster.py stop DIR

Needs Debian's packages slurm-wlm and munge, and Python's standard library only. One munged, one slurmctld and one
slurmd a node, all with their own sockets, ports and files under DIR; nothing in /etc is read or changed. Partition
"low" (the default) is preempted by partition "high". Node names do not resolve, which is what a start-up must cope
with on some real sites.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
INSTALL = "apt-get install -y slurm-wlm munge"
IDLE_WITHIN_S = 30.0
MOST_FIRST_JOBS = 60_000_000  # SLURM's own numbers end at 67 million
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmdSpoolDir={dir}/spool/%n
StateSaveLocation={dir}/state
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=5
JobRequeue=1
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
SlurmdTimeout=10
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/log/jobs.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{gpus}{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


class ClusterError(Exception):
    """The cluster cannot be had; the message says why, with the ends of its logs."""


def missing_programs() -> list[str]:
    """Programs that have to be installed first."""
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


def start(
    directory: Path, nodes: int = 2, gpus: int = 0, cpus: int = 2, grace_s: int = 30, first_job: int | None = None
) -> dict[str, str]:
    """Start all daemons and wait until every node is idle; the environment that SLURM's commands need.

    Args:
        nodes, gpus, cpus: nodes t1, t2, .. and what each of them claims to have. GPUs are fakes (device files).
        grace_s: time that a preempted job gets.
        first_job: number of the first job; default: from the clock, so that no later cluster gives a number again.

    Raises: ClusterError, after everything was stopped and removed again.
    """
    if missing_programs():
        raise ClusterError(f"{', '.join(missing_programs())} not found: {INSTALL}")
    if len(str(directory)) > 80:
        raise ClusterError(f"{directory} is too long for the path of a socket: choose a shorter one")
    if directory.exists() and any(directory.iterdir()):
        raise ClusterError(f"{directory} is not empty: a cluster may run there already. Stop it, or choose another")
    if first_job is None:
        first_job = int(time.time()) % MOST_FIRST_JOBS + 1
    for name in ("run", "log", "state", "spool", "munge"):
        (directory / name).mkdir(parents=True)
    directory.chmod(0o755)  # munge refuses a socket that not everyone can reach
    (directory / "munge").chmod(0o700)
    environment = {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": SYSTEM_PATH}
    try:
        _start_munge(directory)
        _configure(directory, nodes, gpus, cpus, grace_s, first_job)
        _run(["slurmctld", "-f", environment["SLURM_CONF"]], environment)
        for node in range(1, nodes + 1):
            (directory / "spool" / f"t{node}").mkdir()
            start_node(directory, f"t{node}")
        _wait_until_idle(environment, nodes)
    except (ClusterError, OSError) as error:
        stop(directory)
        tails = log_tails(directory)
        shutil.rmtree(directory)
        raise ClusterError(f"the cluster did not start: {error}\n{tails}") from error
    return environment


def start_node(directory: Path, node: str) -> None:
    """Start a node's slurmd, at first or after it died."""
    _run(["slurmd", "-f", str(directory / "slurm.conf"), "-N", node], {"SLURM_CONF": str(directory / "slurm.conf")})


def stop(directory: Path) -> None:
    """End its jobs, its daemons, and steps that outlived their slurmd; recognised by pid files and SLURM_CONF."""
    environment = {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": SYSTEM_PATH}
    if (directory / "slurm.conf").exists():
        _cancel_all_jobs(environment)
    daemons = [int(file.read_text()) for file in (directory / "run").glob("*.pid") if file.read_text().strip()]
    _end(daemons)
    _end(_processes_of(environment["SLURM_CONF"]))


def log_tails(directory: Path, lines: int = 8) -> str:
    """The ends of the daemons' logs, for an error message."""
    parts = []
    for file in sorted((directory / "log").glob("*.log")):
        tail = file.read_text(errors="replace").splitlines()[-lines:]
        parts.append("\n".join([f"--- {file.name}", *tail]))
    return "\n".join(parts)


def _start_munge(directory: Path) -> None:
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {
        "--key-file": key,
        "--socket": directory / "munge.sock",
        "--pid-file": directory / "run" / "munged.pid",
        "--log-file": directory / "log" / "munged.log",
        "--seed-file": directory / "munge" / "seed",
    }
    _run(["munged", "--force", *(f"{option}={path}" for option, path in files.items())], {"PATH": SYSTEM_PATH})


def _configure(directory: Path, nodes: int, gpus: int, cpus: int, grace_s: int, first_job: int) -> None:
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(nodes + 1)
    have = f"CPUs={cpus} RealMemory=4000" + (f" Gres=gpu:{gpus}" if gpus else "")
    lines = [
        f"NodeName=t{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} {have} State=UNKNOWN"
        for node in range(1, nodes + 1)
    ]
    if gpus:
        for gpu in range(gpus):
            os.mknod(directory / f"fakegpu{gpu}", 0o600 | 0o020000, os.makedev(1, 3))
        (directory / "gres.conf").write_text(f"Name=gpu File={directory}/fakegpu[0-{gpus - 1}]\n")
    text = CONFIGURATION.format(
        host=host,
        user=getpass.getuser(),
        dir=directory,
        port=ports[0],
        gpus="GresTypes=gpu\n" if gpus else "",
        nodes="\n".join(lines),
        grace_s=grace_s,
        first_job=first_job,
    )
    (directory / "slurm.conf").write_text(text)


def _wait_until_idle(environment: dict[str, str], nodes: int) -> None:
    deadline = time.monotonic() + IDLE_WITHIN_S
    seen = ""
    while time.monotonic() < deadline:
        seen = _output(["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"], environment)
        if seen == str(nodes):
            return
        time.sleep(0.1)
    raise ClusterError(f"{seen or 'no'} of {nodes} nodes were idle after {IDLE_WITHIN_S:.0f} s")


def _cancel_all_jobs(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        jobs = _output(["squeue", "-h", "-o", "%A"], environment).split()
        if not jobs:
            return
        _output(["scancel", "--signal=KILL", "--full", *jobs], environment)
        _output(["scancel", *jobs], environment)
        time.sleep(0.3)


def _processes_of(configuration: str) -> list[int]:
    """Steps and tasks of this cluster that are still alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            is_step = (process / "comm").read_text().strip() == "slurmstepd"
        except OSError:
            continue
        ours = f"SLURM_CONF={configuration}".encode() in variables
        if ours and (is_step or any(name.startswith(b"SLURM_JOB_ID=") for name in variables)):
            found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def _end(pids: list[int]) -> None:
    """TERM, five seconds, KILL."""
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 1.0)):
        for pid in pids:
            _signal(pid, number)
        deadline = time.monotonic() + patience_s
        while any(_signal(pid, 0) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def _run(command: list[str], environment: dict[str, str]) -> None:
    program = shutil.which(command[0], path=SYSTEM_PATH) or command[0]
    done = subprocess.run(
        [program, *command[1:]], env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise ClusterError(f"{command[0]} ended with code {done.returncode}: {done.stderr.strip()}")


def _output(command: list[str], environment: dict[str, str]) -> str:
    """What a SLURM command prints; "" when it fails, which it does while the controller is not up."""
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=5, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def how_to_use(directory: Path, nodes: int) -> list[str]:
    """Lines for a terminal in this repository, each command as it can be pasted there."""
    python = _shown(sys.executable)
    beside = Path(sys.executable).parent / "dpscale"
    dpscale = _shown(str(beside)) if beside.exists() else f"{python} -m dpscale"
    return [
        f"a SLURM of {nodes} nodes runs on this machine (partitions low and high; low is preempted). Use it:",
        f"  export SLURM_CONF={shlex.quote(str(directory / 'slurm.conf'))}",
        f"  {dpscale} submit configs/quickstart.toml --nodes {nodes} --time 0:20:00",
        f"  {dpscale} status runs/quickstart",
        f"  {dpscale} logs runs/quickstart -f",
        f"  {dpscale} stop runs/quickstart",
        "end it, with its jobs, and remove its files:",
        f"  {python} {_shown(__file__)} stop {shlex.quote(str(directory))}",
    ]


def _shown(path: str) -> str:
    """For a shell in the current directory."""
    return shlex.quote(os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path)


def main() -> int:
    parser = argparse.ArgumentParser(description="A throw-away SLURM on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    starting = verbs.add_parser("start")
    starting.add_argument("directory", type=Path, nargs="?", help="empty or new; default: a new one under /tmp")
    starting.add_argument("--nodes", type=int, default=2)
    starting.add_argument("--gpus", type=int, default=0, help="fake GPUs a node (needs root)")
    starting.add_argument("--cpus", type=int, default=2, help="CPUs that each node claims to have")
    starting.add_argument("--grace-s", type=int, default=30, help="what a preempted job gets")
    verbs.add_parser("stop").add_argument("directory", type=Path)
    given = parser.parse_args()
    directory = (given.directory or Path(tempfile.mkdtemp(prefix="slurm-"))).absolute()
    try:
        if given.verb == "stop":
            if not (directory / "slurm.conf").exists():
                raise ClusterError(f"{directory} is no local cluster: it has no slurm.conf")
            stop(directory)
            shutil.rmtree(directory)
            return 0
        start(directory, given.nodes, given.gpus, given.cpus, given.grace_s)
    except (ClusterError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in how_to_use(directory, given.nodes):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
