"""What a task of a measurement does: keep to its cores, join the others, measure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from dpscale.config import load_config
from dpscale.distributed import Membership, initialize
from dpscale.errors import InputError
from dpscale.scaling.environment import share_of_cores
from dpscale.scaling.measure import measure
from dpscale.scaling.options import MeasureOptions
from dpscale.scaling.point import Setting, settings
from dpscale.slurm import SlurmTask
from dpscale.train import configure_jax


def measure_in_task(config_path: str, overrides: Sequence[str], options: Sequence[str]) -> None:
    """Measure as one of the processes of the job; `options` as `MeasureOptions.words` made them.

    Raises: InputError for what cannot be measured, or cores that do not suffice.
    """
    asked = MeasureOptions.parse(options)
    if asked.cores:
        _keep_to(asked.cores, os.environ)  # before jax starts its threads
    config = load_config(config_path, overrides)
    configure_jax(config)
    initialize(Membership.from_environment())
    for setting in _settings(asked):
        measure(
            config,
            setting,
            asked.variants,
            Path(asked.sweep),
            asked.effort,
            declared_public=asked.declared_public,
            say=lambda line: print(line, flush=True),
        )


def _settings(asked: MeasureOptions) -> list[Setting]:
    """By hand the number of devices is not said, and strong and weak scaling may be two points: one after the other."""
    if asked.setting.devices:
        return [asked.setting]
    count = jax.device_count()
    if count < asked.base:
        raise InputError(
            f"--base {asked.base}, but only {count} devices are here: the base is the smallest count of the sweep"
        )
    found = settings(sorted({asked.base, count}), asked.setting.modes, asked.setting.batch, 1)
    return [replace(one, repeat=asked.setting.repeat) for one in found if one.devices == count]


def _keep_to(cores: int, environment: Mapping[str, str]) -> None:
    local_rank, local_processes = _place_on_node(environment)
    allowed = sorted(os.sched_getaffinity(0))
    own = share_of_cores(allowed, cores, local_rank, local_processes)
    if own is None:
        raise InputError(
            f"{local_processes} processes on this node cannot have {cores} cores each of the {len(allowed)} that are "
            "allowed here: give fewer --cores-per-process, or start fewer processes on a node"
        )
    os.sched_setaffinity(0, own)


def _place_on_node(environment: Mapping[str, str]) -> tuple[int, int]:
    if environment.get("DPSCALE_NUM_PROCESSES"):
        return int(environment["DPSCALE_PROCESS_ID"]), int(environment["DPSCALE_NUM_PROCESSES"])
    task = SlurmTask.from_environment(environment)
    return (task.local_id, task.local_tasks) if task is not None else (0, 1)
