"""What a measurement ran on and under: machine, versions, clocks, and the network's variables (by a list of names)."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("dpscale", "numpy", "jax", "jaxlib", "flax", "optax", "dp-accounting")
# Only these leave the process: an environment holds tokens, paths and account names as well.
SHOWN_VARIABLES = (
    "FI_CXI_ATS",
    "FI_MR_CACHE_MONITOR",
    "FI_PROVIDER",
    "JAX_PLATFORMS",
    "NCCL_ALGO",
    "NCCL_BUFFSIZE",
    "NCCL_CROSS_NIC",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NET",
    "NCCL_NET_GDR_LEVEL",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPU_BIND",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
CLOCK_QUERY = "name,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"


def machine() -> dict[str, Any]:
    """CPU model, usable and present cores, memory in GiB, system, Python, package versions, and the UTC time.

    No host or user name, and jax is not started: add devices where a benchmark uses them.
    """
    return {
        "cpu": _cpu_model(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def shown_variables(values: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those variables that decide about network and threads, and no other."""
    return {name: values[name] for name in SHOWN_VARIABLES if name in values}


def clocks() -> list[str] | None:
    """One line for each GPU of this node, as nvidia-smi says it (CLOCK_QUERY); None where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={CLOCK_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; on a shared machine it says whether others were busy."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def share_of_cores(allowed: Sequence[int], cores: int, local_rank: int, local_processes: int) -> tuple[int, ...] | None:
    """The cores of one process of a node, when each is to have `cores`; None when there are too few for all.

    | allowed | own |
    | --- | --- |
    | exactly `cores` | all of them: srun has bound this task already |
    | at least `cores` for each process | the contiguous share of this process |
    | fewer | None |
    """
    if len(allowed) == cores:
        return tuple(sorted(allowed))
    if len(allowed) < cores * local_processes:
        return None
    return tuple(sorted(allowed))[local_rank * cores : (local_rank + 1) * cores]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
