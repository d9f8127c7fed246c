"""What a run would take on this machine: memory from the compiler, time from made-up rows; nothing private is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dpscale.batching import run_layout
from dpscale.chacha import key_words
from dpscale.config import RunConfig
from dpscale.data.resident import Resident
from dpscale.data.source import ExampleSource, empty_rows
from dpscale.feed import blank_rows
from dpscale.gradients import compiled_steps, make_placement
from dpscale.mesh import data_mesh, place_replicated
from dpscale.physical_batch import physical_batch_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.sampling import PoissonSampler
from dpscale.state import TrainState
from dpscale.step import Rows, StepFunctions, requests_array
from dpscale.task import build_task

REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """`padding_waste`: expected padded rows over all rows. `state_bytes`, `temporary_bytes`, `data_bytes`: per device.

    `step_s`: expected seconds of a logical step, compilation, input and evaluation left out.
    """

    num_parameters: int
    num_devices: int
    physical_batch_size: int
    device_kind: str
    accumulations: float
    padding_waste: float
    state_bytes: int
    temporary_bytes: int
    data_bytes: int
    step_s: float


def estimate(config: RunConfig, plan: PrivacyPlan, source: ExampleSource) -> Estimate:
    """Compile the run's two step functions for the devices at hand and time them on rows of zeros."""
    mesh = data_mesh()
    task = build_task(config, source.metadata)
    physical = physical_batch_size(config, plan, task, source, mesh.size)
    layout = run_layout(config, plan, physical, mesh.size)
    placement = make_placement(config, plan, mesh, task.params)
    state = placement.create(task.params)
    rows = blank_rows(mesh, source, layout, config.data)
    table, data_bytes = _stand_in(config, source)
    table = place_replicated(mesh, table)
    functions = compiled_steps(config, plan, task, placement, state, table, rows)
    # The key enters no figure here: any sampler of this size and rate draws as many examples.
    sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, bytes(32), plan.max_batch_size)
    sizes, probabilities = sampler.size_distribution()
    accumulations = float(np.dot([layout.accumulations(int(size)) for size in sizes], probabilities))
    # Of one device, which also keeps a partial sum of the gradient.
    state_bytes = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state)) + 4 * task.num_parameters
    memory = [function.memory_analysis().temp_size_in_bytes for function in (functions.accumulate, functions.finalize)]
    return Estimate(
        num_parameters=task.num_parameters,
        num_devices=mesh.size,
        physical_batch_size=physical,
        device_kind=mesh.devices.flat[0].device_kind,
        accumulations=accumulations,
        padding_waste=layout.expected_padding_waste(sampler),
        state_bytes=state_bytes,
        temporary_bytes=max(memory),
        data_bytes=data_bytes,
        step_s=_step_seconds(functions, mesh, state, table, rows, accumulations),
    )


def _stand_in(config: RunConfig, source: ExampleSource) -> tuple[dict[str, np.ndarray], int]:
    """A table of zeros in place of device-resident data, and its bytes; {} and 0 where rows come from the host."""
    if config.data.residence != "device":
        return {}, 0
    table = empty_rows(source.metadata, len(source))
    return table, sum(array.nbytes for array in table.values())


def _step_seconds(
    functions: StepFunctions, mesh: Any, state: TrainState, table: Resident, rows: Rows, accumulations: float
) -> float:
    key = np.zeros(2, np.uint32)
    sums = functions.zero_sums()

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    def accumulate() -> Any:
        nonlocal sums
        sums = functions.accumulate(state.params, sums, table, rows, key)
        return sums

    def finalize() -> Any:
        nonlocal sums, state
        requests = requests_array(mesh, stop=False, save=False)
        state, sums, _ = functions.finalize(state, sums, requests, key_words(bytes(32)))
        return state

    for warm_up in (accumulate, finalize):
        seconds(warm_up)
    one = statistics.median(seconds(accumulate) for _ in range(REPEATS))
    return accumulations * one + statistics.median(seconds(finalize) for _ in range(REPEATS))
