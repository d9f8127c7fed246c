"""Is this node, its devices, network, file system and environment fit to train? Every finding with its remedy.

Runs alone, or as the tasks of an srun (`python -m launch.doctor`); jax is imported only to look at the devices.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpscale.errors import DpscaleError
from dpscale.slurm import node_address
from launch import slurm_commands
from launch.attempt import PACKAGES

if TYPE_CHECKING:
    from dpscale.distributed import Membership

SLOW_RENAME_S = 0.1
SLOW_COLLECTIVE_S = 0.05
CLOCK_TOLERANCE_S = 5.0
SHORT_KILL_WAIT_S = 10


@dataclass(frozen=True)
class Finding:
    """`level`: "fail": training would fail or break a promise; "warn": it would be slow or inconvenient."""

    level: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.remedy:
            raise ValueError(f"{self.what}: a finding that is not ok needs a remedy")

    def line(self) -> str:
        return f"{self.level:<5} {self.what}" + (f": {self.remedy}" if self.remedy else "")


def examine(directory: Path, say: Callable[[str], None]) -> int:
    """Make every check, say each finding on process 0, and return the exit code: 0 fit to train, 1 not."""
    from dpscale.distributed import Membership, initialize, is_main

    checks = [check_python(), check_packages(), *check_slurm(), *check_file_system(directory)]
    try:
        membership = Membership.from_environment()
        initialize(membership)
        checks += [*check_processes(membership), *check_devices(membership.num_processes)]
        main = is_main()
    except DpscaleError as error:
        checks.append(Finding("fail", "the processes do not find each other", str(error)))
        main = True
    failed = [check for check in checks if check.level == "fail"]
    for check in checks if main else failed:
        say(check.line())
    if main:
        say("not fit to train" if failed else "fit to train")
    return 1 if failed else 0


def check_python() -> Finding:
    """3.11 or newer."""
    what = f"Python {platform.python_version()} at {sys.executable} on {platform.node()}"
    return Finding("ok", what) if sys.version_info >= (3, 11) else Finding("fail", what, "dpscale needs 3.11 or newer")


def check_packages() -> Finding:
    """All there; the versions in one line."""
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("fail", f"packages missing: {', '.join(missing)}", "pip install -e . in this environment")
    return Finding("ok", ", ".join(found))


def check_slurm() -> list[Finding]:
    """Its commands, and what of its configuration dpscale relies on."""
    if shutil.which("scontrol") is None:
        return [Finding("warn", "SLURM's commands are not here", "fine on a laptop; on a cluster load its module")]
    try:
        shown = slurm_commands.run(["scontrol", "show", "config"])
    except DpscaleError as error:
        reason = str(error).splitlines()[0]
        return [Finding("fail" if "SLURM_JOB_ID" in os.environ else "warn", "SLURM does not answer", reason)]
    settings = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in shown.splitlines())}
    findings = [
        Finding("ok", f"SLURM {settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName', '?')}")
    ]
    if settings.get("JobRequeue") == "0":
        remedy = "dpscale asks with --requeue; where the site forbids that, use dpscale resume"
        findings.append(Finding("warn", "jobs are not requeued by default", remedy))
    if "cgroup" not in settings.get("ProctrackType", ""):
        remedy = "processes that leave their session may outlive a job: look for them after a kill"
        findings.append(Finding("warn", f"processes are tracked by {settings.get('ProctrackType')}", remedy))
    return [*findings, _signals(settings)]


def _signals(settings: Mapping[str, str]) -> Finding:
    """What a job hears before it is ended."""
    first = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    preempted = settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    how = "no preemption" if preempted == "none" else f"preemption by {preempted}, {'USR2' if first else 'TERM'} first"
    wait = re.match(r"\d+", settings.get("KillWait", ""))
    what = f"signals: {how}; KILL comes {wait[0] if wait else '?'} s after TERM"
    if wait and int(wait[0]) < SHORT_KILL_WAIT_S:
        remedy = "a save after TERM may be cut off: keep stop_margin_s (profile) above the time of a step and a save"
        return Finding("warn", what, remedy)
    return Finding("ok", what)


def check_file_system(directory: Path) -> list[Finding]:
    """Where runs will live: writable, atomic rename, its time, file modes, and its clock."""
    from dpscale.durable import write_atomically

    probe = directory / f".doctor.{platform.node()}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        times = []
        for number in range(5):
            start = time.perf_counter()
            write_atomically(probe, str(number))
            times.append(time.perf_counter() - start)
        whole, state = probe.read_text() == "4", probe.stat()
    except OSError as error:
        return [Finding("fail", f"{directory} cannot be written ({error.strerror})", "choose another with --directory")]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    findings = [] if whole else [Finding("fail", f"{directory}: a renamed file shows old content", "choose another")]
    slowest, mode, skew_s = max(times), state.st_mode & 0o777, abs(state.st_mtime - time.time())
    what = f"{directory}: write, sync and rename in {1000 * slowest:.1f} ms"
    slow = slowest > SLOW_RENAME_S
    findings.append(Finding("warn", what, "a busy file system: save less often") if slow else Finding("ok", what))
    if mode != 0o600:
        remedy = "the run's secret could be read by others: choose a file system with modes"
        findings.append(Finding("fail", f"{directory}: a private file has mode {mode:o}", remedy))
    if skew_s > CLOCK_TOLERANCE_S:
        remedy = "leases and STOP files compare times: synchronise the clocks"
        findings.append(Finding("fail", f"{directory}: its clock differs by {skew_s:.0f} s from this node's", remedy))
    return findings


def check_processes(membership: Membership) -> list[Finding]:
    """Who takes part, from where, with which devices; and whether their clocks agree."""
    import jax

    from dpscale.distributed import gathered

    gathered(None)  # a barrier, so that all read their clocks now
    mine = {
        "clock": time.time(),
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "address": _own_address(membership),
        "devices": [f"{device.platform}:{device.local_hardware_id}" for device in jax.local_devices()],
    }
    everyone = gathered(mine)
    findings = []
    for node in dict.fromkeys(one["node"] for one in everyone):
        here = [(rank, one) for rank, one in enumerate(everyone) if one["node"] == node]
        shares = "; ".join(f"{rank} has {' '.join(one['devices'])}" for rank, one in here)
        findings.append(Finding("ok", f"{node} at {here[0][1]['address']}, processes and devices: {shares}"))
    clocks = [one["clock"] for one in everyone]
    apart_s = max(clocks) - min(clocks)
    if apart_s > CLOCK_TOLERANCE_S:
        late, early = (everyone[clocks.index(clock)]["node"] for clock in (min(clocks), max(clocks)))
        what = f"the clocks of {late} and {early} differ by {apart_s:.0f} s"
        findings.append(Finding("fail", what, "leases and STOP files compare times: synchronise the clocks"))
    return findings


def _own_address(membership: Membership) -> str:
    """The address from which this process reaches process 0."""
    if membership.task is not None:
        towards = os.environ.get("DPSCALE_HEAD_ADDRESS") or node_address(membership.task.nodes[0])
    else:
        towards = (membership.coordinator or "127.0.0.1").rpartition(":")[0] or "127.0.0.1"
    try:
        family, kind, _, _, address = socket.getaddrinfo(towards.strip("[]"), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return "an unknown address"


def check_devices(num_processes: int) -> list[Finding]:
    """What jax sees here, and how long a small collective over all of it takes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    local, everyone = jax.local_devices(), jax.devices()
    what = f"{num_processes} processes, {len(everyone)} devices ({everyone[0].device_kind}), {len(local)} of them here"
    findings = [Finding("ok", what)]
    if everyone[0].platform == "cpu" and shutil.which("nvidia-smi"):
        findings.append(Finding("fail", "a GPU is here, but jax uses the CPU", "pip install 'dpscale[cuda]'"))
    if num_processes > 1:
        counts = np.asarray(multihost_utils.process_allgather(np.int32(len(local)))).ravel()
        if len(set(counts.tolist())) > 1:
            findings.append(Finding("fail", f"devices by process: {counts.tolist()}", "ask for as many on each node"))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            multihost_utils.process_allgather(np.float32(1))
            times.append(time.perf_counter() - start)
        took = f"a collective over all processes takes {1000 * min(times):.2f} ms"
        slow = min(times) > SLOW_COLLECTIVE_S
        remedy = "set the network interface in the profile (NCCL_SOCKET_IFNAME)"
        findings.append(Finding("warn", took, remedy) if slow else Finding("ok", took))
    return findings


def main() -> None:
    """`python -m launch.doctor [DIRECTORY]`, in each task."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs").absolute()
    code = examine(directory, lambda line: print(line, flush=True))
    from dpscale.distributed import leave

    leave()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
