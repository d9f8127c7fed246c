"""The record of one measured point: JSON with a schema version, read back by value. Imports no jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from dpscale.durable import write_atomically
from dpscale.errors import InputError
from dpscale.scaling.point import Mode, Setting, Variant

SCHEMA_VERSION = 1
SHARED_MODE = 0o644  # nothing in a record derives from private data
PARTS = ("accumulate", "reduction", "noise", "update", "host")
INSIDE = ("finalize", "input_wait", "transfer", "checkpoint")  # of other parts, or hidden, or not in every step
PARTS_METHOD = (
    "loop: wall time of the training loop, the maximum over processes. device: as many accumulations and as many "
    "finalizations on one batch that is already in place. host = loop - device: what input, transfer, sampling and "
    "dispatch could not hide. accumulate, and within finalize reduction, noise and update, are timed as compiled "
    "pieces of their own on whole (replicated) parameters, because the fused programs cannot be split from outside: "
    "their sum may differ from device. "
    "input_wait is measured in the loop (waiting for rows and handing them over), transfer apart (one physical batch "
    "to the device, blocking, times the accumulations). checkpoint: how long one save holds the loop."
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(_Part):
    """Some consecutive logical steps, timed as one. `loop_s`, `device_s`, `input_wait_s`: seconds of all of them."""

    steps: int
    examples: int
    accumulations: int
    rows: int
    loop_s: float
    device_s: float
    input_wait_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a logical step."""
        return self.loop_s / self.steps

    @property
    def examples_per_s(self) -> float:
        """Drawn examples over time; padding does not count."""
        return self.examples / self.loop_s


class Parts(_Part):
    """Seconds of one logical step. `host` may be a little below zero by noise; `checkpoint`: of one save, None where it
    was not measured; `finalize`: the fused reduction, noise and update."""

    accumulate: float
    reduction: float
    noise: float
    update: float
    finalize: float
    host: float
    input_wait: float
    transfer: float
    checkpoint: float | None


class Record(_Part):
    """All that is known about one point. Times in seconds, bytes in bytes."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["scaling record"] = "scaling record"
    config_name: str
    variant: Variant
    modes: tuple[Mode, ...]
    repeat: int
    devices: int
    processes: int
    nodes: tuple[str, ...]
    device_kind: str
    batch: float
    num_examples: int
    sampling_rate: float
    physical_batch_size: int
    num_parameters: int
    model: str
    performance: dict[str, Any]
    data: str
    data_is: Literal["made up", "built in", "declared public"]
    padded_rows_share: float
    compile_s: float
    warm_up_s: float
    windows: tuple[Window, ...]
    parts: Parts
    method: str = PARTS_METHOD
    environment: dict[str, Any]

    @property
    def setting(self) -> Setting:
        """The sweep's setting that this is a variant of."""
        return Setting(self.devices, self.batch, self.modes, self.repeat)

    @property
    def file_name(self) -> str:
        """Where it lives in a sweep's records."""
        return self.setting.record_name(self.variant)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of the one gradient reduction of a step: 4 a parameter."""
        return 4 * self.num_parameters

    def save(self, directory: Path) -> Path:
        """Write it into `directory`, in one move."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.file_name
        write_atomically(path, self.model_dump_json(indent=1) + "\n", SHARED_MODE)
        return path


def read_record(path: Path) -> Record:
    """Read what `save` wrote.

    Raises: InputError when it cannot be read, or is no record of this schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a scaling record ({error}): remove it, or measure again") from error
    seen = values.get("schema_version") if isinstance(values, dict) else None
    if seen != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {seen!r}, and this version of dpscale reads {SCHEMA_VERSION}: use the version "
            "that wrote it, or measure again"
        )
    try:
        return Record.model_validate(values)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise InputError(f"{path} is no whole scaling record ({problems}): remove it, or measure again") from None
