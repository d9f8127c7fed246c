"""Processes: how they start as one jax program, and how they agree."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpscale.errors import DivergedError, DpscaleError, InputError
from dpscale.rollcall import call_the_roll
from dpscale.slurm import SlurmTask, local_device_ids, node_address, visible_devices

COORDINATOR = "DPSCALE_COORDINATOR"
NUM_PROCESSES = "DPSCALE_NUM_PROCESSES"
PROCESS_ID = "DPSCALE_PROCESS_ID"


@dataclass(frozen=True)
class Membership:
    """This process's place among the processes of a run.

    `coordinator`: host:port of process 0, where it is known beforehand; None where the processes agree on it by a roll
    call, which needs `task`. `local_device_ids`: this process's share of the devices that it sees; None: all of them.
    """

    process_id: int = 0
    num_processes: int = 1
    coordinator: str | None = None
    local_device_ids: tuple[int, ...] | None = None
    task: SlurmTask | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Membership:
        """What a launcher said in DPSCALE_COORDINATOR, DPSCALE_NUM_PROCESSES and DPSCALE_PROCESS_ID; else what srun
        says; else alone.

        Raises: InputError when only some of them are set, they are not numbers in range, or the devices cannot be
        shared among the tasks of a node.
        """
        values = os.environ if environment is None else environment
        names = (PROCESS_ID, NUM_PROCESSES, COORDINATOR)
        given = [values.get(name) for name in names]
        if not any(given):
            return cls._of_task(SlurmTask.from_environment(values), values)
        try:
            process_id, num_processes = int(given[0] or ""), int(given[1] or "")
        except ValueError:
            process_id, num_processes = -1, 0
        if not given[2] or not 0 <= process_id < num_processes:
            seen = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
            raise InputError(f"{seen}: a launcher sets all three, with 0 <= id < number; unset them to run alone")
        return cls(process_id, num_processes, given[2])

    @classmethod
    def _of_task(cls, task: SlurmTask | None, values: Mapping[str, str]) -> Membership:
        if task is None or task.num_tasks == 1:
            return cls()
        own = local_device_ids(visible_devices(values), task.local_tasks, task.local_id)
        return cls(task.rank, task.num_tasks, None, own, task)


@dataclass(frozen=True)
class StartupLimits:
    """Seconds: for all processes to come, without a sign of life, and for all to leave. A site's profile sets them."""

    init_s: float = 900.0
    heartbeat_s: float = 30.0
    shutdown_s: float = 30.0

    @classmethod
    def from_environment(cls, values: Mapping[str, str] = os.environ) -> StartupLimits:
        """DPSCALE_INIT_TIMEOUT_S, DPSCALE_HEARTBEAT_TIMEOUT_S and DPSCALE_SHUTDOWN_TIMEOUT_S, or the defaults.

        Raises: InputError when one is not a positive number.
        """
        limits = {}
        for field in fields(cls):
            name = f"DPSCALE_{field.name.removesuffix('_s').upper()}_TIMEOUT_S"
            try:
                limits[field.name] = float(values.get(name, field.default))  # type: ignore[arg-type]
            except ValueError:
                limits[field.name] = 0.0
            if not limits[field.name] > 0:
                raise InputError(f"{name}={values[name]}: give seconds above 0")
        return cls(**limits)


def initialize(membership: Membership, limits: StartupLimits | None = None) -> None:
    """Join the other processes; does nothing for a process alone or a second call.

    Raises: DpscaleError when not all processes arrive in time; after a roll call it names who is missing, and where.
    """
    if membership.num_processes == 1 or jax.distributed.is_initialized():
        return
    limits = limits or StartupLimits.from_environment()
    coordinator = membership.coordinator or _agreed_coordinator(membership, limits)
    own = membership.local_device_ids
    # jax's own listener for SIGTERM would take the signal away from dpscale.stopping.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=membership.num_processes,
            process_id=membership.process_id,
            local_device_ids=None if own is None else list(own),
            cluster_detection_method="deactivate",
            initialization_timeout=int(limits.init_s),
            heartbeat_timeout_seconds=int(limits.heartbeat_s),
            shutdown_timeout_seconds=int(limits.shutdown_s),
        )
    except RuntimeError as error:
        raise DpscaleError(
            f"process {membership.process_id} of {membership.num_processes} could not join {coordinator} "
            f"within {limits.init_s:.0f} s: every process must start and reach that address ({error})"
        ) from error


def leave() -> None:
    """Wait for the other processes, then leave them; does nothing for a process alone."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _agreed_coordinator(membership: Membership, limits: StartupLimits) -> str:
    task = membership.task
    assert task is not None
    # The job script has asked for its own node's address already, which spares the controller one question a task.
    known = os.environ.get("DPSCALE_HEAD_ADDRESS") if os.environ.get("DPSCALE_HEAD_NODE") == task.nodes[0] else None
    host = known or node_address(task.nodes[0])
    port = call_the_roll(
        task.identity, task.rank, task.num_tasks, host, task.ports, limits.init_s, rank_nodes=task.rank_nodes
    )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def decided_by_process_zero(decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `decide` on process 0 and give its JSON-like result to every process.

    Bytes may be passed as hex text. The result travels over the processes' own network and touches no file or log.

    Raises: on every process, what `decide` raised, when that is a DpscaleError.
    """
    if jax.process_count() == 1:
        return decide()
    error: DpscaleError | None = None
    message: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            message = {"value": decide()}
        except DpscaleError as caught:
            error = caught
            message = {"error": str(caught), "exit_code": caught.exit_code}
    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = data if len(data) == size else np.zeros(size, np.uint8)
    received = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))
    if "error" in received:
        raise error or _same_kind(received["exit_code"])(received["error"])
    return received["value"]


def gathered(value: Any) -> list[Any]:
    """The JSON-like value of every process, in the order of their numbers, on every process; all must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(jax.process_count(), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def check_agreement(what: str, value: bytes, remedy: str) -> None:
    """Compare a value, by its SHA-256, over all processes.

    Raises: DivergedError on every process when any two differ.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)
    different = [rank for rank, digest in enumerate(everyone) if not np.array_equal(digest, everyone[0])]
    if different:
        raise DivergedError(
            f"{what} of process(es) {different} differs from process 0's: all must be equal, or the noise and the "
            f"sampling are not what is accounted. {remedy}"
        )


def is_main() -> bool:
    """Whether this is process 0, the only one that writes the run's files."""
    return jax.process_index() == 0


def _same_kind(exit_code: int) -> type[DpscaleError]:
    return InputError if exit_code == InputError.exit_code else DpscaleError
