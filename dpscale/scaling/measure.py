"""Measuring one point: the real feed, loop and step functions, private and not in turn, on public or made-up rows.

Every process of a job calls `measure` with the same arguments; process 0 writes the records.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpscale.checkpoint import Checkpoints
from dpscale.config import RunConfig
from dpscale.distributed import is_main
from dpscale.errors import InputError
from dpscale.scaling import parts
from dpscale.scaling.bench import Bench
from dpscale.scaling.environment import clocks, load_average, machine, shown_variables
from dpscale.scaling.options import Effort
from dpscale.scaling.point import Setting, Variant
from dpscale.scaling.record import Record, Window
from dpscale.scaling.sweep import data_kind
from dpscale.slurm import SlurmTask


def measure(
    config: RunConfig,
    setting: Setting,
    variants: Sequence[Variant],
    directory: Path,
    effort: Effort,
    *,
    declared_public: bool,
    say: Callable[[str], None],
) -> list[Record]:
    """Measure every variant on the devices at hand and write SWEEP/records/NAME-VARIANT.json (process 0).

    Args:
        setting: `setting.devices` must be the number of devices of all processes together.
        declared_public: the owner says that the config's data are public.
        say: takes one line of text; called on process 0.

    Raises: InputError for private data, or another number of devices than the setting's.
    """
    kind = data_kind(config, declared_public=declared_public)
    if jax.device_count() != setting.devices:
        raise InputError(
            f"{jax.device_count()} devices in {jax.process_count()} processes are here, but the point has "
            f"{setting.devices}: start as many processes as it has devices (srun --ntasks, --local-processes)"
        )
    tell = say if is_main() else lambda line: None
    load_before = load_average()
    benches: dict[Variant, Bench] = {variant: Bench(config, setting, variant, effort) for variant in variants}
    for variant, bench in benches.items():
        tell(f"{setting.name} {variant}: compiled in {bench.compile_s:.1f} s")
        bench.warm_up()
    windows: dict[Variant, list[Window]] = {variant: [] for variant in variants}
    for number in range(effort.windows):
        for variant, bench in benches.items():
            windows[variant].append(bench.window())
            last = windows[variant][-1]
            tell(f"{setting.name} {variant}: window {number + 1}: {1e3 * last.step_s:.1f} ms a step")
    save_s = _checkpoint_seconds(next(iter(benches.values())), directory) if effort.checkpoint else None
    environment = _environment(load_before)
    records = []
    for variant, bench in benches.items():
        record = bench.record(windows[variant], save_s, kind, environment)
        if is_main():
            record.save(directory / "records")
        records.append(record)
        bench.close()
    return records


def _checkpoint_seconds(bench: Bench, directory: Path) -> float:
    """How long one save holds the loop, the maximum over processes; it is written beside the records and removed."""
    folder = directory / f".checkpoint-{bench.setting.name}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    parts.over_processes(np.zeros(1))  # nobody saves before the folder is there
    checkpoints = Checkpoints(folder, keep=1)
    jax.block_until_ready(bench.state)
    start = time.perf_counter()
    checkpoints.save(1, bench.state, {})
    held = time.perf_counter() - start
    checkpoints.wait()
    checkpoints.close()
    slowest = float(parts.over_processes(np.array([held]))[0])
    if is_main():
        shutil.rmtree(folder)
    return slowest


def _environment(load_before: float | None) -> dict[str, Any]:
    """Process 0's, with the names of all nodes where SLURM says them."""
    task = SlurmTask.from_environment(os.environ)
    return machine() | {
        "nodes": task.nodes if task is not None else ("this machine",),
        "clocks": clocks() if is_main() else None,
        "load_average": {"before": load_before, "after": load_average()},
        "variables": shown_variables(),
        "platform": jax.default_backend(),
    }
