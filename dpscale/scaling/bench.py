"""One variant of one point, ready to be timed: everything that a run builds, and a clock around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dpscale.batching import run_layout
from dpscale.config import RunConfig
from dpscale.feed import Feed, blank_rows
from dpscale.gradients import compiled_steps, make_placement
from dpscale.loop import StepKeys, training_steps
from dpscale.mesh import data_mesh
from dpscale.optimizer import make_optimizer
from dpscale.physical_batch import agreed_physical_batch_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler
from dpscale.scaling import parts
from dpscale.scaling.options import Effort
from dpscale.scaling.point import Setting, Variant
from dpscale.scaling.record import Parts, Record, Window
from dpscale.step import Rows, Sums, requests_array
from dpscale.task import build_task
from dpscale.train import find_source

SECRET = RootSecret.from_insecure_seed(0)  # the same draws for every variant; nothing here is private
NOISE_MULTIPLIER = 4.0  # its size does not change the time: no calibration
WARM_UP_STEPS = 2
LEAD_IN_STEPS = 1  # of each window, untimed: rows read ahead while others were measured do not count


class Bench:
    """One variant of one setting: everything that a run builds, and a clock around it."""

    def __init__(self, config: RunConfig, setting: Setting, variant: Variant, effort: Effort) -> None:
        self.variant: Variant = variant
        changes = {"epsilon": None, "noise_multiplier": NOISE_MULTIPLIER, "enabled": variant == "private"}
        changes |= {"expected_batch_size": setting.batch, "sampling_rate": None, "delta": config.privacy.delta or 1e-5}
        privacy = config.privacy.model_copy(update=changes)
        self.config = config.model_copy(update={"privacy": privacy})
        self.setting, self.effort = setting, effort
        self.source = find_source(self.config, None, config.data.train, "train")
        self.plan = PrivacyPlan.from_config(self.config, num_examples=len(self.source))
        self.mesh = data_mesh()
        self.task = build_task(self.config, self.source.metadata)
        physical = agreed_physical_batch_size(self.config, self.plan, self.task, self.source, self.mesh.size)
        self.layout = run_layout(self.config, self.plan, physical, self.mesh.size)
        self.sampler = PoissonSampler(
            self.plan.num_examples, self.plan.sampling_rate, SECRET.derive("sampling"), self.plan.max_batch_size
        )
        self.feed = Feed(
            self.mesh,
            self.source,
            self.sampler,
            self.layout,
            attempt=0,
            start_step=0,
            stop_step=WARM_UP_STEPS + effort.windows * (LEAD_IN_STEPS + effort.steps),
            data=config.data,
        )
        placement = make_placement(self.config, self.plan, self.mesh, self.task.params)
        self.state = placement.create(self.task.params)
        self.blank = blank_rows(self.mesh, self.source, self.layout, config.data)
        self.requests = requests_array(self.mesh, stop=False, save=False)
        self.keys = StepKeys(SECRET, 0)
        self.next_step, self.waited_s, self.warm_up_s = 0, 0.0, 0.0
        self.sums: Sums | None = None  # of the pieces that are timed alone
        start = time.perf_counter()
        self.functions = compiled_steps(
            self.config, self.plan, self.task, placement, self.state, self.feed.table, self.blank
        )
        self.compile_s = time.perf_counter() - start

    def warm_up(self) -> None:
        """The first steps, left out of every figure but `warm_up_s`."""
        start = time.perf_counter()
        self._loop(WARM_UP_STEPS)
        self._replay(1, 1)
        self.warm_up_s = time.perf_counter() - start

    def window(self) -> Window:
        """Time the next steps through the real loop, then the same work with everything at hand."""
        self._loop(LEAD_IN_STEPS)
        first, steps = self.next_step, self.effort.steps
        self.waited_s = 0.0
        loop_s = self._loop(steps)
        waited_s = self.waited_s
        sizes = [len(self.sampler.indices(step)) for step in range(first, first + steps)]
        accumulations = sum(self.layout.accumulations(size) for size in sizes)
        slowest = parts.over_processes(np.array([loop_s, self._replay(accumulations, steps), waited_s]))
        return Window(
            steps=steps,
            examples=sum(sizes),
            accumulations=accumulations,
            rows=accumulations * self.layout.rows_per_accumulation,
            loop_s=float(slowest[0]),
            device_s=float(slowest[1]),
            input_wait_s=float(slowest[2]),
        )

    def record(self, windows: Sequence[Window], save_s: float | None, kind: Any, environment: dict) -> Record:
        """Everything about this variant; times its pieces first."""
        count = self.task.num_parameters
        data, performance = self.config.data, self.config.performance
        return Record(
            config_name=self.config.run.name,
            variant=self.variant,
            modes=self.setting.modes,
            repeat=self.setting.repeat,
            devices=self.mesh.size,
            processes=jax.process_count(),
            nodes=tuple(environment["nodes"]),
            device_kind=self.mesh.devices.flat[0].device_kind,
            batch=self.plan.expected_batch_size,
            num_examples=self.plan.num_examples,
            sampling_rate=self.plan.sampling_rate,
            physical_batch_size=self.layout.physical_batch_size,
            num_parameters=count,
            model=self.config.model.name,
            performance=performance.model_dump(exclude={"compilation_cache"}),
            data=data.train if kind != "declared public" else "declared public",
            data_is=kind,
            padded_rows_share=self.layout.expected_padding_waste(self.sampler),
            compile_s=self.compile_s,
            warm_up_s=self.warm_up_s,
            windows=tuple(windows),
            parts=self._parts(windows, save_s),
            environment={key: value for key, value in environment.items() if key != "nodes"},
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self.feed.close()

    def _parts(self, windows: Sequence[Window], save_s: float | None) -> Parts:
        steps = sum(window.steps for window in windows)
        accumulations = sum(window.accumulations for window in windows) / steps
        count, mesh = self.task.num_parameters, self.mesh
        noise = parts.noise_seconds(mesh, count, self.plan.noise_stddev) if self.plan.enabled else 0.0
        found = np.array(
            [
                parts.seconds_each(self._accumulate) * accumulations,
                parts.reduction_seconds(mesh, count),
                noise,
                parts.update_seconds(mesh, make_optimizer(self.config.optimizer, self.plan.steps), self.task.params),
                parts.seconds_each(self._finalize),
                parts.seconds_each(self._transfer) * accumulations,
            ]
        )
        accumulate, reduction, noise, update, finalize, transfer = map(float, parts.over_processes(found))
        return Parts(
            accumulate=accumulate,
            reduction=reduction,
            noise=noise,
            update=update,
            finalize=finalize,
            host=statistics.median((window.loop_s - window.device_s) / window.steps for window in windows),
            input_wait=statistics.median(window.input_wait_s / window.steps for window in windows),
            transfer=transfer,
            checkpoint=save_s,
        )

    def _loop(self, steps: int) -> float:
        """Seconds of the next `steps` steps, from an idle device to an idle device."""
        chosen = range(self.next_step, self.next_step + steps)
        self.next_step = chosen.stop
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for info in training_steps(
            self.functions,
            self.state,
            self.feed.table,
            self._batches,
            self.keys,
            chosen,
            lambda step: None,
            lambda: self.requests,
            lambda step, statistics: None,
        ):
            self.state = info.state
        jax.block_until_ready(self.state)
        return time.perf_counter() - start

    def _batches(self, step: int) -> Iterator[Rows]:
        batches = self.feed.batches(step)
        while True:
            start = time.perf_counter()
            rows = next(batches, None)
            self.waited_s += time.perf_counter() - start
            if rows is None:
                return
            yield rows

    def _replay(self, accumulations: int, steps: int) -> float:
        """Seconds of that many accumulations and finalizations on one batch in place, dispatched at once."""
        sums, done = self.functions.zero_sums(), 0
        example_key, noise_key = self.keys.examples(0), self.keys.noise(0)
        jax.block_until_ready((sums, self.state))
        start = time.perf_counter()
        for step in range(1, steps + 1):
            while done < accumulations * step // steps:
                sums = self.functions.accumulate(self.state.params, sums, self.feed.table, self.blank, example_key)
                done += 1
            self.state, sums, _ = self.functions.finalize(self.state, sums, self.requests, noise_key)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start

    def _accumulate(self) -> Any:
        sums = self.sums or self.functions.zero_sums()
        self.sums = self.functions.accumulate(
            self.state.params, sums, self.feed.table, self.blank, self.keys.examples(0)
        )
        return self.sums

    def _finalize(self) -> Any:
        sums = self.sums or self.functions.zero_sums()
        self.state, self.sums, _ = self.functions.finalize(self.state, sums, self.requests, self.keys.noise(0))
        return self.state

    def _transfer(self) -> Any:
        return jax.block_until_ready(blank_rows(self.mesh, self.source, self.layout, self.config.data))
