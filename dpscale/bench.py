"""What privacy costs on this machine: one accumulation of each clipping method, in turn, beside the same one without.

Figures are ratios from one run: methods take turns (A B C A B C ..), after compilation and a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.baseline import summed_grad
from dpscale.clipping import clipped_grad
from dpscale.config import RunConfig
from dpscale.data.source import SourceMetadata
from dpscale.errors import InputError
from dpscale.models.registry import build_model, is_language_model
from dpscale.task import Task, build_task
from dpscale.turns import in_turn

BASELINE = "nonprivate"
METHODS = (BASELINE, "auto", "bookkeeping", "ghost", "materialize")
BYTES = 256  # the vocabulary of a language model that takes its data's


@dataclass(frozen=True)
class Cost:
    """Of one method: seconds a step (median, and the spread), seconds to trace and compile, bytes of temporaries.

    `times_sgd`: its time over the fastest plain step's; `memory_of_sgd`: the same for the temporary bytes.
    """

    time_s: float
    fastest_s: float
    slowest_s: float
    trace_s: float
    compile_s: float
    temp_bytes: int
    times_sgd: float = 1.0
    memory_of_sgd: float = 1.0


def compare(
    steps: Mapping[str, Callable[..., Any]], arguments: Sequence[Any], repeats: int, baselines: Sequence[str]
) -> dict[str, Cost]:
    """The cost of each step function on the same arguments; ratios are to the fastest of `baselines`.

    Methods take `repeats` turns (`in_turn`).
    """
    programs, traced, compiled = {}, {}, {}
    for name, step in steps.items():
        jax.clear_caches()  # no method finds what another one traced
        begin = time.perf_counter()
        lowered = jax.jit(step).lower(*arguments)
        middle = time.perf_counter()
        programs[name] = lowered.compile()
        traced[name], compiled[name] = middle - begin, time.perf_counter() - middle
        jax.block_until_ready(programs[name](*arguments))
    calls = {name: lambda x=program: jax.block_until_ready(x(*arguments)) for name, program in programs.items()}
    seen = in_turn(calls, repeats)
    median = {name: statistics.median(times) for name, times in seen.items()}
    memory = {name: _temporaries(program) for name, program in programs.items()}
    base = min(baselines, key=lambda name: median[name])
    return {
        name: Cost(
            median[name],
            min(seen[name]),
            max(seen[name]),
            traced[name],
            compiled[name],
            memory[name],
            median[name] / median[base],
            memory[name] / max(memory[base], 1),
        )
        for name in steps
    }


def _temporaries(program: Any) -> int:
    return int(getattr(program.memory_analysis(), "temp_size_in_bytes", 0))


def cost_lines(costs: Mapping[str, Cost]) -> list[str]:
    """A table for a terminal."""
    lines = [
        f"{'method':14s} {'ms a step':>11s} {'(spread)':>19s} {'of SGD':>7s} {'temp MB':>9s} {'of SGD':>7s} compile"
    ]
    for name, x in costs.items():
        spread = f"({x.fastest_s * 1e3:.1f} to {x.slowest_s * 1e3:.1f})"
        lines.append(
            f"{name:14s} {x.time_s * 1e3:11.1f} {spread:>19s} {f'x{x.times_sgd:.2f}':>7s} {x.temp_bytes / 1e6:9.1f} "
            f"{f'x{x.memory_of_sgd:.2f}':>7s} {x.trace_s + x.compile_s:.1f} s"
        )
    return lines


def bench_task(config: RunConfig, size: int | None, classes: int) -> tuple[Task, SourceMetadata]:
    """The config's model on made-up rows: images of `size` (default 224) pixels, or `size` (default 128) tokens.

    Raises: InputError where the model takes neither.
    """
    probe = build_model(config.model.name, classes, **config.model.options)
    predicts = is_language_model(probe)
    if predicts or hasattr(probe, "vocabulary"):
        length, vocabulary = size or 128, getattr(probe, "vocabulary", 0) or BYTES
        metadata = SourceMetadata(
            name="made-up tokens",
            feature_shape=(length,),
            feature_dtype=np.dtype(np.int32),
            label_kind="tokens" if predicts else "class",
            num_classes=vocabulary if predicts else classes,
            label_shape=(length,) if predicts else (),
            vocabulary_size=vocabulary,
        )
    else:
        side = size or 224
        metadata = SourceMetadata(
            name="made-up images",
            feature_shape=(side, side, 3),
            feature_dtype=np.dtype(np.uint8),
            label_kind="class",
            num_classes=classes,
            full_scale=255.0,
        )
    return build_task(config, metadata), metadata


def made_up_rows(metadata: SourceMetadata, rows: int) -> dict[str, np.ndarray]:
    """`rows` random examples in the form that `metadata` describes."""
    rng = np.random.default_rng(0)
    high = metadata.vocabulary_size or 256
    outputs = metadata.num_classes or 1
    return {
        "features": rng.integers(0, high, (rows, *metadata.feature_shape)).astype(metadata.feature_dtype),
        "label": rng.integers(0, outputs, (rows, *metadata.label_shape)).astype(metadata.label_dtype),
    }


def bench(
    config: RunConfig, methods: Sequence[str], batch_size: int, size: int | None, classes: int, repeats: int
) -> dict[str, Any]:
    """The costs of `methods` for the config's model; a JSON-ready record.

    Raises: InputError for an unknown method.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is unknown: choose all, or some of {', '.join(METHODS)}")
    task, metadata = bench_task(config, size, classes)
    chosen = [BASELINE, *(name for name in METHODS if name in methods and name != BASELINE)]
    batch = jax.tree.map(jnp.asarray, made_up_rows(metadata, batch_size))
    keys = jax.random.split(jax.random.key(0), batch_size) if task.uses_key else None
    costs = compare(
        {name: summed_step(name, task) for name in chosen}, (values_of(task), batch, keys), repeats, [BASELINE]
    )
    return {
        "model": config.model.name,
        "parameters": task.num_parameters,
        "batch": batch_size,
        "features": list(metadata.feature_shape),
        "compute_dtype": config.performance.compute_dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "repeats": repeats,
        "methods": {name: asdict(cost) for name, cost in costs.items()},
    }


def values_of(task: Task) -> tuple[Any, Any]:
    """(params, frozen) on the device."""
    return jax.tree.map(jnp.asarray, (task.params, task.frozen))


def summed_step(method: str, task: Task) -> Callable[..., Any]:
    """((params, frozen), batch, keys) -> the sum of gradients; frozen weights are arguments, as in a run."""

    def step(values, batch, keys):
        params, frozen = values
        loss = task.bind(frozen).loss
        summed = summed_grad(loss) if method == BASELINE else clipped_grad(loss, 1.0, method)  # type: ignore[arg-type]
        rows = jax.tree.leaves(batch)[0].shape[0]
        return summed(params, batch, jnp.ones(rows, bool), keys).grad_sum

    return step
