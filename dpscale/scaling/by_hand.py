"""One point by hand: on the devices of this process, of all tasks of an srun, or of several processes here."""

from __future__ import annotations

import os
from pathlib import Path

from dpscale.config import RunConfig
from dpscale.errors import InputError
from dpscale.scaling.options import Effort, MeasureOptions
from dpscale.scaling.point import Mode, Setting, Variant
from dpscale.scaling.sweep import data_kind, logical_batch
from launch.local import run_locally
from launch.runtime import TaskArguments, run_task


def measure_by_hand(
    config: RunConfig,
    config_path: str,
    overrides: tuple[str, ...],
    directory: Path,
    *,
    modes: tuple[Mode, ...],
    variants: tuple[Variant, ...],
    base: int,
    repeat: int,
    local_processes: int,
    effort: Effort,
    cores: int,
    declared_public: bool,
) -> int:
    """Measure with as many devices as there are; the exit code. Weak: the batch grows from that of `base` devices.

    The number of devices is known only when jax has started, so `Setting.devices` 0 asks for "those that are there",
    and its batch is that of `base` devices.

    Raises: InputError for private data.
    """
    data_kind(config, declared_public=declared_public)
    batch, _ = logical_batch(config)
    options = MeasureOptions(
        sweep=str(directory),
        setting=Setting(0, batch, modes, repeat),
        variants=variants,
        effort=effort,
        cores=cores,
        base=base,
        declared_public=declared_public,
    )
    logs = str(directory / "by-hand")
    arguments = TaskArguments(config_path, overrides, logs, verb="measure", options=options.words())
    if local_processes == 1:
        return run_task(arguments)
    if "SLURM_STEP_ID" in os.environ:
        raise InputError("--local-processes inside of srun: let srun start the processes (--ntasks), or leave it out")
    return run_locally(arguments, local_processes)
