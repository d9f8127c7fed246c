"""Made-up rows in the shapes of a run's data: what verification runs on, so that it reads no example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dpscale.batching import BatchLayout
from dpscale.data.loader import PhysicalBatch
from dpscale.data.resident import Resident
from dpscale.data.source import LABEL, PRESENT, Batch, SourceMetadata, empty_rows
from dpscale.errors import InputError
from dpscale.feed import place_batch
from dpscale.mesh import local_positions, place_replicated
from dpscale.step import Rows

TYPICAL, LARGE, GARBAGE, BLANK = range(4)
"""An ordinary row; one with extreme values; one that no model can use (NaN where the type has it); zeros."""
KINDS = 4
LARGE_FACTOR = 1e3
CLASSES_AT_LEAST = 2


class MadeUp:
    """Rows of the four kinds, the same on every process, as physical batches of the run's layout.

    `table`: in place of a data set that lives on the devices; {} where rows come from the host. `holds_nan`: whether
    garbage rows have NaN in them, or only extreme integers.

    Raises: InputError where a data set on the devices is too small to hold the four rows.
    """

    def __init__(self, mesh: Mesh, layout: BatchLayout, metadata: SourceMetadata, num_examples: int, resident: bool):
        if resident and num_examples < KINDS:
            raise InputError(
                f"{num_examples} examples with data.residence=device: verification needs room for {KINDS}; set "
                "data.residence=host, or privacy.verify=false"
            )
        self.mesh, self.layout, self.resident = mesh, layout, resident
        self._rows = _made_up_rows(metadata)
        self._num_examples = num_examples
        self.holds_nan = any(array.dtype.kind == "f" for array in self._rows.values())

    def table(self) -> Resident:
        """The four rows and zeros, in the shapes of the whole data set, on every device."""
        if not self.resident:
            return {}
        table = {name: np.zeros((self._num_examples, *x.shape[1:]), x.dtype) for name, x in self._rows.items()}
        for name, array in self._rows.items():
            table[name][:KINDS] = array
        return place_replicated(self.mesh, table)

    def example(self, kind: int) -> dict[str, np.ndarray]:
        """One row, without a batch axis."""
        return {name: array[kind] for name, array in self._rows.items()}

    def batches(self, kinds: Sequence[int], padding: int = BLANK) -> list[Rows]:
        """Physical batches in which every device holds these rows, and masked rows of kind `padding` after them.

        A row's index in the data set is its kind. At least one batch, which may be padding alone.
        """
        size = self.layout.physical_batch_size
        count = max(1, -(-len(kinds) // size)) * size
        padded = np.full(count, padding, np.int64)
        padded[: len(kinds)] = kinds
        mask = np.arange(count) < len(kinds)
        return [self._place(padded[k : k + size], mask[k : k + size]) for k in range(0, count, size)]

    def _place(self, kinds: np.ndarray, mask: np.ndarray) -> Rows:
        devices = len(local_positions(self.mesh))
        kinds, mask = np.tile(kinds, devices), np.tile(mask, devices)
        arrays: Batch = {name: array[kinds] for name, array in self._rows.items()}
        if self.resident:
            arrays = {"index": kinds.astype(np.int32)}
        return place_batch(self.mesh, PhysicalBatch(kinds, mask, arrays))


def _made_up_rows(metadata: SourceMetadata) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)  # public, and nothing depends on which rows these are
    rows = empty_rows(metadata, KINDS)
    for name, array in rows.items():
        bound = metadata.vocabulary_size if name != LABEL else max(metadata.num_classes or 0, CLASSES_AT_LEAST)
        for kind in (TYPICAL, LARGE):
            array[kind] = _values(generator, array.dtype, array.shape[1:], kind, bound)
        array[GARBAGE] = np.nan if array.dtype.kind == "f" else _extreme(array.dtype)
        if name == PRESENT:  # every record of a made-up user counts
            array[:] = True
    return rows


def _values(generator: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...], kind: int, bound: int | None):
    if dtype.kind == "f":
        return generator.standard_normal(shape) * (LARGE_FACTOR if kind == LARGE else 1.0)
    if dtype.kind == "u" and bound is None:  # pixels
        full = np.iinfo(dtype).max
        return full * generator.integers(0, 2, shape) if kind == LARGE else generator.integers(0, full, shape)
    # Class numbers and tokens: outside of their range a model may have no value for them.
    return generator.integers(0, min(bound or CLASSES_AT_LEAST, np.iinfo(np.int32).max), shape)


def _extreme(dtype: np.dtype):
    return True if dtype.kind == "b" else np.iinfo(dtype).max
