"""What SLURM tells a task about itself: its place, the other nodes, an address and ports to meet at, its devices.

Pure functions of the environment, but for `node_address`, which asks scontrol. Imports no jax.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpscale.errors import InputError

# Above the range from which Linux hands out ports by itself (32768 to 60999).
FIRST_PORT, LAST_PORT = 61000, 65535
PORTS_PER_JOB = 8
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True)
class SlurmTask:
    """One task of one srun. `nodes`: the step's node names in order; `rank_nodes`: the node of every rank, or () when
    it is not known.
    """

    job: str
    step: int
    restart: int
    rank: int
    num_tasks: int
    local_id: int
    local_tasks: int
    nodes: tuple[str, ...]
    rank_nodes: tuple[str, ...]

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> SlurmTask | None:
        """This task; None outside of srun (a batch script alone is no task: its SLURM_PROCID means nothing).

        Raises: InputError when srun's variables contradict each other.
        """
        if "SLURM_STEP_ID" not in values or "SLURM_STEP_NUM_TASKS" not in values:
            return None
        try:
            nodes = expand_node_list(values["SLURM_STEP_NODELIST"])
            per_node = expand_counts(values["SLURM_STEP_TASKS_PER_NODE"])
            rank, local_id = int(values["SLURM_PROCID"]), int(values["SLURM_LOCALID"])
            num_tasks, step = int(values["SLURM_STEP_NUM_TASKS"]), int(values["SLURM_STEP_ID"])
            restart = int(values.get("SLURM_RESTART_COUNT", "0"))
            job, node_id = values["SLURM_JOB_ID"], int(values["SLURM_NODEID"])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"srun's variables cannot be read ({type(error).__name__}: {error}): start the tasks with srun, and "
                "do not set SLURM_* yourself"
            ) from error
        if len(nodes) != len(per_node) or sum(per_node) != num_tasks or not 0 <= node_id < len(nodes):
            raise InputError(
                f"srun's variables contradict each other ({len(nodes)} nodes, tasks {per_node}, {num_tasks} in all): "
                "start the tasks with srun, and do not set SLURM_* yourself"
            )
        placed = nodes_of_ranks(nodes, per_node, values.get("SLURM_DISTRIBUTION", "block"))
        return cls(job, step, restart, rank, num_tasks, local_id, per_node[node_id], nodes, placed)

    @property
    def identity(self) -> str:
        """Differs between any two sets of processes that could meet by mistake."""
        return f"{self.job}.{self.step}.{self.restart}"

    @property
    def ports(self) -> tuple[int, ...]:
        """Where this set of processes may meet. Jobs whose ids are less than 567 apart share none of them."""
        groups = (LAST_PORT + 1 - FIRST_PORT) // PORTS_PER_JOB
        number = int(re.match(r"\d*", self.job)[0] or 0)  # type: ignore[index]
        first = FIRST_PORT + (number % groups) * PORTS_PER_JOB
        return tuple(first + (self.step + self.restart + k) % PORTS_PER_JOB for k in range(4))


def nodes_of_ranks(nodes: Sequence[str], per_node: Sequence[int], distribution: str) -> tuple[str, ...]:
    """The node of every rank for SLURM's "block" and "cyclic" distributions; () for any other: it is not known."""
    method = re.split(r"[:,]", distribution)[0]
    if method == "block":
        return tuple(node for node, count in zip(nodes, per_node, strict=True) for _ in range(count))
    if method == "cyclic":
        rounds = range(max(per_node))
        return tuple(node for turn in rounds for node, count in zip(nodes, per_node, strict=True) if count > turn)
    return ()


def expand_node_list(text: str) -> tuple[str, ...]:
    """SLURM's short form of node names: "t[1-2,05-06],gpu3" is t1 t2 t05 t06 gpu3.

    Raises: ValueError when it is not in that form.
    """
    names: list[str] = []
    for prefix, bracket, suffix in re.findall(r"([^\[\],]+)(?:\[([^\]]*)\])?([^\[\],]*)", text):
        if not bracket:
            names.append(prefix + suffix)
            continue
        for part in bracket.split(","):
            first, _, last = part.partition("-")
            names += [f"{prefix}{n:0{len(first)}d}{suffix}" for n in range(int(first), int(last or first) + 1)]
    if not names:
        raise ValueError(f"{text!r} is no list of nodes")
    return tuple(names)


def expand_counts(text: str) -> tuple[int, ...]:
    """SLURM's short form of numbers per node: "2(x3),1" is 2 2 2 1.

    Raises: ValueError when it is not in that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * (int(times.rstrip(")")) if times else 1)
    return tuple(counts)


def node_address(node: str, timeout_s: float = 30.0) -> str:
    """The NodeAddr of a node, which resolves where its name may not; the name itself where scontrol cannot be asked."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", node, "-o"], capture_output=True, text=True, timeout=timeout_s, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return node
    found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return found[1] if found else node


def visible_devices(values: Mapping[str, str]) -> int | None:
    """How many accelerators the environment lets this task see; None when it does not say, or jax runs on the CPU."""
    if values.get("JAX_PLATFORMS") == "cpu":
        return None
    for name in VISIBLE_DEVICES:
        if values.get(name) is not None:
            listed = [device for device in values[name].split(",") if device.strip()]
            return len(listed) if listed != ["NoDevFiles"] else 0
    return None


def local_device_ids(visible: int | None, local_tasks: int, local_id: int) -> tuple[int, ...] | None:
    """Which of the devices that a task sees are its own.

    | visible | own |
    | --- | --- |
    | not known, or none | None: what jax finds (a CPU run, or a site without GPU binding) |
    | 1 | (0,): SLURM gave every task its own (`--gpus-per-task=1`) |
    | n x local tasks | the contiguous share local_id * n to (local_id + 1) * n - 1 |
    | anything else | InputError |

    Two tasks on a node that see one and the same device cannot be told from two that see one each.
    """
    if not visible:
        return None
    if visible == 1:
        return (0,)
    share, rest = divmod(visible, local_tasks)
    if rest or share == 0:
        raise InputError(
            f"a task sees {visible} devices, and {local_tasks} tasks run on its node: the devices must be a multiple "
            "of the tasks, or one for each task. Ask for --gpus-per-node equal to the tasks per node"
        )
    return tuple(range(local_id * share, (local_id + 1) * share))
