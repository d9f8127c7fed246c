"""Step time, private and not, and the host's share of it: `python benchmarks/step.py`, some minutes on two cores.

The host's share is what the loop takes more than its device work alone. Where the device is the same CPU, that is the
host's work itself, competing for the cores; whether the device ever waited for it is counted apart: `idle_dispatches`
are calls after the first that found all earlier work done, which means that the device had nothing to do.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import machine

from dpscale.batching import BatchLayout
from dpscale.config import RunConfig, load_config
from dpscale.data.open import open_source
from dpscale.feed import Feed
from dpscale.gradients import compiled_steps, make_placement
from dpscale.loop import StepKeys, training_steps
from dpscale.mesh import data_mesh
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler
from dpscale.state import TrainState
from dpscale.step import Rows, StepFunctions, requests_array
from dpscale.task import build_task

ROOT = Path(__file__).resolve().parent.parent
SECRET = RootSecret.from_insecure_seed(0)
# name, overrides of the quickstart; the first is what the others are compared with
CASES: list[tuple[str, list[str]]] = [
    ("non-private, data on the device", ["privacy.enabled=false"]),
    ("private, data on the device", []),
    ("private, data on the host", ["data.residence=host"]),
]


class Watched:
    """The step functions, counting the calls (after the first) that find the device without work."""

    def __init__(self, functions: StepFunctions) -> None:
        self.dispatches = self.idle = 0
        self.functions = replace(
            functions,
            accumulate=lambda params, sums, *rest: functions.accumulate(params, self._seen(sums), *rest),
            finalize=lambda state, sums, *rest: functions.finalize(state, self._seen(sums), *rest),
        )

    def _seen(self, sums: Any) -> Any:
        self.idle += self.dispatches > 0 and sums.statistics.is_ready()
        self.dispatches += 1
        return sums


class Case:
    """One way of training the quickstart: `window()` runs a few logical steps and gives seconds."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        source = open_source(config.data.train, num_classes=config.data.num_classes)
        # The noise's size does not change its time: no calibration here.
        private = config.privacy.model_copy(update={"epsilon": None, "noise_multiplier": 4.0})
        self.plan = PrivacyPlan.from_config(config.model_copy(update={"privacy": private}), num_examples=len(source))
        self.mesh = data_mesh()
        self.source = source
        assert isinstance(config.performance.physical_batch_size, int)
        self.layout = BatchLayout(config.performance.physical_batch_size, self.mesh.size)
        self.sampler = PoissonSampler(self.plan.num_examples, self.plan.sampling_rate, SECRET.derive("sampling"))
        self.task = build_task(config, source.metadata)
        self.placement = make_placement(config, self.plan, self.mesh, self.task.params)
        self.functions: StepFunctions | None = None

    def window(self, steps: int) -> dict[str, float]:
        """Seconds a step of the whole loop, and of the same accumulations and finalizes with all data at hand."""
        feed = Feed(
            self.mesh,
            self.source,
            self.sampler,
            self.layout,
            attempt=0,
            start_step=0,
            stop_step=steps + 1,
            data=self.config.data,
        )
        state = self.placement.create(self.task.params)
        rows = list(feed.batches(0))
        if self.functions is None:
            compile_for = (self.placement, state, feed.table, rows[0])
            self.functions = compiled_steps(self.config, self.plan, self.task, *compile_for)
        watched = Watched(self.functions)
        requests = requests_array(self.mesh, stop=False, save=False)
        loop = training_steps(
            watched.functions,
            state,
            feed.table,
            feed.batches,
            StepKeys(SECRET, 0),
            range(1, steps + 1),
            lambda step: None,
            lambda: requests,
            lambda step, statistics: None,
        )
        start = time.perf_counter()
        for info in loop:
            state = info.state
        jax.block_until_ready(state)
        whole = time.perf_counter() - start
        batches = sum(self.layout.accumulations(len(self.sampler.indices(step))) for step in range(1, steps + 1))
        device = self._device_seconds(self.functions, state, feed.table, rows[0], batches, steps)
        feed.close()
        return {
            "loop_s": whole / steps,
            "device_s": device / steps,
            "accumulations": batches / steps,
            "dispatches": watched.dispatches,
            "idle_dispatches": watched.idle,
        }

    def _device_seconds(
        self, functions: StepFunctions, state: TrainState, table: Any, rows: Rows, batches: int, steps: int
    ) -> float:
        """The same number of accumulations and finalizes on one batch that is already in place, dispatched at once."""
        keys = StepKeys(SECRET, 0)
        requests = requests_array(self.mesh, stop=False, save=False)
        sums, example_key, noise_key = functions.zero_sums(), keys.examples(0), keys.noise(0)
        jax.block_until_ready(sums)
        start = time.perf_counter()
        done = 0
        for step in range(steps):
            goal = batches * (step + 1) // steps
            for _ in range(goal - done):
                sums = functions.accumulate(state.params, sums, table, rows, example_key)
            done = goal
            state, sums, _ = functions.finalize(state, sums, requests, noise_key)
        jax.block_until_ready(state)
        return time.perf_counter() - start


def main() -> None:
    """Measure the cases in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="logical steps in a window (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="windows of each case, in turn (default 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "step.json")
    arguments = parser.parse_args()
    cases = {name: Case(load_config(ROOT / "configs" / "quickstart.toml", extra)) for name, extra in CASES}
    for case in cases.values():
        case.window(1)  # compiles, and warms up
    windows: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, case in cases.items():
            windows[name].append(case.window(arguments.steps))
    baseline = statistics.median(window["loop_s"] for window in windows[CASES[0][0]])
    rows = [_row(name, found, baseline) for name, found in windows.items()]
    print(f"{'case':<34}{'ms a step':>10}{'spread':>16}{'x non-private':>15}{'host share':>12}{'device idle':>13}")
    for row in rows:
        spread = f"{row['loop_ms_min']:.0f} to {row['loop_ms_max']:.0f}"
        ratio, idle = row["ratio_to_non_private"], f"{row['idle_dispatches']} of {row['dispatches']}"
        print(f"{row['case']:<34}{row['loop_ms']:>10.0f}{spread:>16}{ratio:>15.2f}{row['host_share']:>12.1%}{idle:>13}")
    device = jax.devices()[0].device_kind
    result = {
        "benchmark": "step",
        "machine": machine() | {"device": device, "devices": jax.device_count()},
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.out}")


def _row(name: str, windows: list[dict[str, float]], baseline_s: float) -> dict[str, Any]:
    loop = [1e3 * window["loop_s"] for window in windows]
    shares = [1 - window["device_s"] / window["loop_s"] for window in windows]
    return {
        "case": name,
        "loop_ms": statistics.median(loop),
        "loop_ms_min": min(loop),
        "loop_ms_max": max(loop),
        "ratio_to_non_private": statistics.median(loop) / 1e3 / baseline_s,
        "host_share": statistics.median(shares),
        "dispatches": sum(int(window["dispatches"]) for window in windows),
        "idle_dispatches": sum(int(window["idle_dispatches"]) for window in windows),
        "accumulations": float(np.mean([window["accumulations"] for window in windows])),
    }


if __name__ == "__main__":
    main()
