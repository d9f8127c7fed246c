"""Made-up scaling records whose step times follow a known law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpscale.scaling.point import Setting, Variant, settings
from dpscale.scaling.record import Parts, Record, Window

PHYSICAL = 50


def record(setting: Setting, variant: Variant, step_s: float, *, jitter: float = 0.0, **changes) -> Record:
    """One record of `setting`, three windows of two steps; the windows' times are 1 and 1 +- jitter times `step_s`."""
    rows = PHYSICAL * setting.devices
    accumulations = -(-round(setting.batch) // rows)
    windows = [
        Window(
            steps=2,
            examples=2 * round(setting.batch),
            accumulations=2 * accumulations,
            rows=2 * accumulations * rows,
            loop_s=2 * step_s * factor,
            device_s=1.9 * step_s * factor,
            input_wait_s=0.0,
        )
        for factor in (1.0, 1 + jitter, 1 - jitter)
    ]
    parts = Parts(
        accumulate=0.8 * step_s,
        reduction=0.05 * step_s,
        noise=0.04 * step_s if variant == "private" else 0.0,
        update=0.01 * step_s,
        finalize=0.1 * step_s,
        host=0.05 * step_s,
        input_wait=0.0,
        transfer=0.0,
        checkpoint=None,
    )
    values: dict = {
        "config_name": "planted",
        "variant": variant,
        "modes": setting.modes,
        "repeat": setting.repeat,
        "devices": setting.devices,
        "processes": setting.devices,
        "nodes": ("n1",),
        "device_kind": "cpu",
        "batch": setting.batch,
        "num_examples": 100_000,
        "sampling_rate": setting.batch / 100_000,
        "physical_batch_size": PHYSICAL,
        "num_parameters": 1_000_000,
        "model": "mlp",
        "performance": {},
        "data": "made_up:vectors:100000:8:2",
        "data_is": "made up",
        "padded_rows_share": 0.01,
        "compile_s": 1.0,
        "warm_up_s": 0.1,
        "windows": windows,
        "parts": parts,
        "environment": {"cpu": "a processor", "cores": 2, "packages": {"jax": "0"}},
    }
    return Record(**{**values, **changes})


def planted(
    directory: Path, counts: list[int], step_s: Callable[[Setting, Variant], float], repeats: int = 2, **options
) -> list[Record]:
    """Records of a whole sweep of both modes and variants, saved in `directory`."""
    made = []
    for setting in settings(counts, ("strong", "weak"), 1000.0, repeats):
        for variant in ("private", "nonprivate"):
            made.append(record(setting, variant, step_s(setting, variant), **options))
            made[-1].save(directory / "records")
    return made
