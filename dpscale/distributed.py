"""Processes: how they start as one jax program, and how they agree."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpscale.errors import DivergedError, DpscaleError, InputError

COORDINATOR = "DPSCALE_COORDINATOR"
NUM_PROCESSES = "DPSCALE_NUM_PROCESSES"
PROCESS_ID = "DPSCALE_PROCESS_ID"
INITIALIZATION_TIMEOUT_S = 300


@dataclass(frozen=True)
class Membership:
    """This process's place among the processes of a run; `coordinator` is host:port of process 0."""

    process_id: int = 0
    num_processes: int = 1
    coordinator: str | None = None

    @classmethod
    def from_environment(cls, environment: dict[str, str] | None = None) -> Membership:
        """What the launcher said in DPSCALE_COORDINATOR, DPSCALE_NUM_PROCESSES and DPSCALE_PROCESS_ID; alone if none.

        Raises: InputError when only some of them are set, or they are not numbers in range.
        """
        values = os.environ if environment is None else environment
        names = (PROCESS_ID, NUM_PROCESSES, COORDINATOR)
        given = [values.get(name) for name in names]
        if not any(given):
            return cls()
        try:
            process_id, num_processes = int(given[0] or ""), int(given[1] or "")
        except ValueError:
            process_id, num_processes = -1, 0
        if not given[2] or not 0 <= process_id < num_processes:
            seen = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
            raise InputError(f"{seen}: a launcher sets all three, with 0 <= id < number; unset them to run alone")
        return cls(process_id, num_processes, given[2])


def initialize(membership: Membership) -> None:
    """Join the other processes; does nothing for a process alone or a second call.

    Raises: DpscaleError when not all processes arrive in time.
    """
    if membership.num_processes == 1 or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=membership.coordinator,
            num_processes=membership.num_processes,
            process_id=membership.process_id,
            initialization_timeout=INITIALIZATION_TIMEOUT_S,
        )
    except RuntimeError as error:
        raise DpscaleError(
            f"process {membership.process_id} of {membership.num_processes} could not join {membership.coordinator} "
            f"within {INITIALIZATION_TIMEOUT_S} s: every process must start and reach that address ({error})"
        ) from error


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
