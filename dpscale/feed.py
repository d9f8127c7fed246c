"""Feed: the physical batches of each step, on the devices, read ahead while the devices work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from dpscale.batching import BatchLayout
from dpscale.data.loader import Loader, PhysicalBatch
from dpscale.data.resident import Resident, load_resident
from dpscale.data.source import ExampleSource, empty_rows
from dpscale.data.transforms import id_words
from dpscale.mesh import local_positions, place_rows, replicated
from dpscale.sampling import PoissonSampler
from dpscale.sections import DataSection
from dpscale.step import Rows


class Feed:
    """What `training_steps` draws from: `batches(step)`, for consecutive steps from `start_step` on.

    `table`: the whole data set on the devices (`data.residence = "device"`), or {} when rows come from the host.
    """

    def __init__(
        self,
        mesh: Mesh,
        source: ExampleSource,
        sampler: PoissonSampler,
        layout: BatchLayout,
        *,
        attempt: int,
        start_step: int,
        stop_step: int,
        data: DataSection,
    ) -> None:
        self._mesh, self._sampler, self._attempt = mesh, sampler, attempt
        resident = data.residence == "device"
        self.table: Resident = {}
        readable = None
        if resident:
            self.table, readable = load_resident(source, replicated(mesh))
        self._loader = Loader(
            source,
            sampler,
            layout,
            local_positions(mesh),
            planned_accumulations=layout.planned_accumulations(sampler.expected_batch_size, sampler.batch_size_std),
            start_step=start_step,
            stop_step=stop_step,
            attempt=attempt,
            num_threads=data.num_threads,
            resident=resident,
            readable=readable,
        )
        self._steps = iter(self._loader)

    def batches(self, step: int) -> Iterator[Rows]:
        """The physical batches of `step`, the next one in order; none for an empty draw that is not padded."""
        logical = next(self._steps)
        assert logical.step == step, f"asked for step {step}, the loader is at {logical.step}"
        for batch in logical:
            yield place_batch(self._mesh, batch)

    def draw_digest(self, step: int) -> bytes:
        """16 bytes that tell one draw of a step from another; sensitive."""
        return self._sampler.digest(step, self._attempt)

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.close()


def blank_rows(mesh: Mesh, source: ExampleSource, layout: BatchLayout, data: DataSection) -> Rows:
    """A physical batch of padding, to compile for and to time: all that matters is its shapes."""
    count = len(local_positions(mesh)) * layout.physical_batch_size
    resident = data.residence == "device"
    arrays = {"index": np.zeros(count, np.int32)} if resident else empty_rows(source.metadata, count)
    return place_batch(mesh, PhysicalBatch(np.zeros(count, np.int64), np.zeros(count, bool), arrays))


def place_batch(mesh: Mesh, batch: PhysicalBatch) -> Rows:
    """A physical batch on the devices; each process gives the rows of its own, in mesh order."""
    return Rows(*place_rows(mesh, (batch.arrays, id_words(batch.ids), batch.mask)))
