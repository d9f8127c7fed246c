"""Held-out metrics: any number of examples, split over all devices, padded rows masked out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.batching import BatchLayout
from dpscale.data.loader import EveryExample, Loader
from dpscale.data.source import ExampleSource
from dpscale.mesh import DATA_AXIS, local_positions, place_rows, replicated, split

_COUNT = "number of examples"  # counted along with the metrics


class Evaluator:
    """Means of per-example metrics over all examples of a source.

    Args:
        metrics: `metrics(params, example) -> dict of float scalars` of one example.
        physical_batch_size: rows per device at once.
        num_threads: threads that read ahead.

    Each process reads the rows of its own devices only. Every example counts once; padding never does, nor does an
    unreadable example that the source was told to replace: the means are over those that could be read.
    """

    def __init__(
        self,
        mesh: Mesh,
        metrics: Callable[[Any, Any], dict[str, jax.Array]],
        source: ExampleSource,
        physical_batch_size: int,
        num_threads: int = 4,
    ) -> None:
        per_device = min(physical_batch_size, -(-len(source) // mesh.size))
        self._layout = BatchLayout(per_device, mesh.size)
        self._mesh = mesh
        self._source = source
        self._num_threads = num_threads
        metrics = _counted(metrics)
        self._add = _accumulator(mesh, metrics)
        self._total = jax.jit(lambda sums: jax.tree.map(lambda x: x.sum(0), sums), out_shardings=replicated(mesh))
        self._metrics = metrics
        self._zero_sums: Callable[[], Any] | None = None  # made, and compiled, at the first call

    def __call__(self, params: Any) -> dict[str, float]:
        """Means over all examples, by the metrics' names; blocks until they are known."""
        sums, count = None, len(self._source)
        with Loader(
            self._source,
            EveryExample(count),
            self._layout,
            local_positions(self._mesh),
            planned_accumulations=self._layout.accumulations(count),
            stop_step=1,
            num_threads=self._num_threads,
        ) as loader:
            for rows in (rows for logical in loader for rows in logical):
                batch, mask = place_rows(self._mesh, (rows.arrays, rows.mask))
                if self._zero_sums is None:
                    self._zero_sums = self._build_zero_sums(params, batch)
                sums = self._zero_sums() if sums is None else sums
                sums = self._add(params, sums, batch, mask)
        totals = jax.device_get(self._total(sums))
        counted = float(totals.pop(_COUNT))
        return {name: float(total) / counted if counted else math.nan for name, total in totals.items()}

    def _build_zero_sums(self, params: Any, batch: Any) -> Callable[[], Any]:
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        names = jax.eval_shape(self._metrics, params, example)
        devices = self._mesh.size
        return jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(devices, jnp.float32), names), out_shardings=split(self._mesh)
        )


def _counted(metrics: Callable[[Any, Any], dict[str, jax.Array]]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    return lambda params, example: {**metrics(params, example), _COUNT: jnp.ones((), jnp.float32)}


def _accumulator(mesh: Mesh, metrics: Callable[[Any, Any], dict[str, jax.Array]]):
    def on_one_device(params, sums, batch, mask):
        values = jax.vmap(metrics, (None, 0))(params, batch)
        return jax.tree.map(lambda s, v: s + jnp.sum(jnp.where(mask, v.astype(jnp.float32), 0.0))[None], sums, values)

    mine, everywhere = P(DATA_AXIS), P()
    mapped = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(everywhere, mine, mine, mine), out_specs=mine, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=(1,))
