"""From the indices of a logical batch to physical batches of one fixed shape, and each process's share of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from dpscale.config import RunConfig
from dpscale.errors import InputError
from dpscale.privacy.plan import PrivacyPlan
from dpscale.sampling import PoissonSampler

PADDING_INDEX = 0  # an index that every data set has; its row is loaded, and masked


@dataclass(frozen=True)
class BatchLayout:
    """How a logical batch is cut into physical batches over all devices.

    physical_batch_size: rows on one device in one accumulation, P >= 1.
    num_devices: devices of the whole mesh, over all processes, D >= 1.
    padded_to: rows that every draw is filled up to with padding; 0: only the last accumulation is filled up.

    Accumulation k holds rows [k P D, (k + 1) P D) of the draw, and the device at position d (in mesh order)
    the d-th P of them. What the draw does not fill is padding: index 0 and mask False.

    Guarantees: over all accumulations and device positions the unmasked indices are exactly the draw, each
    once; the number of accumulations depends on the draw alone, so all processes agree on it; shapes never
    depend on the draw. An empty draw has 0 accumulations, unless `padded_to` asks for some: draws of up to that many
    rows all take the same number, and what is added is masked, so no sum changes.
    Raises: InputError when P or D is below 1.
    """

    physical_batch_size: int
    num_devices: int
    padded_to: int = 0

    def __post_init__(self) -> None:
        for name, value in (
            ("physical_batch_size", self.physical_batch_size),
            ("num_devices", self.num_devices),
        ):
            if value < 1:
                raise InputError(f"{name}={value} is too small: give at least 1")

    @property
    def rows_per_accumulation(self) -> int:
        """P D: rows, padding included, that one accumulation puts through all devices."""
        return self.physical_batch_size * self.num_devices

    def accumulations(self, num_rows: int) -> int:
        """Accumulations that a draw of `num_rows` rows takes: ceil(max(num_rows, padded_to) / (P D))."""
        return -(-max(num_rows, self.padded_to) // self.rows_per_accumulation)

    def rows(
        self, indices: np.ndarray, accumulation: int, device_positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some devices in one accumulation: (indices int64[m P], mask bool[m P]), False = padding.

        indices: the whole draw, int64[n]. device_positions: m distinct positions in [0, D), in the order in
        which their rows are wanted. An accumulation past the last one is all padding.
        """
        if accumulation < 0:
            raise InputError(f"accumulation={accumulation} is negative: count accumulations from 0")
        positions = np.asarray(device_positions, np.int64).reshape(-1)
        if len(np.unique(positions)) < len(positions) or np.any((positions < 0) | (positions >= self.num_devices)):
            raise InputError(
                f"device_positions={list(device_positions)} do not fit {self.num_devices} devices: "
                "give distinct positions from 0 to the number of devices - 1"
            )
        starts = accumulation * self.rows_per_accumulation + positions * self.physical_batch_size
        rows = (starts[:, None] + np.arange(self.physical_batch_size)).reshape(-1)
        mask = rows < len(indices)
        ids = np.full(len(rows), PADDING_INDEX, np.int64)
        ids[mask] = indices[rows[mask]]
        return ids, mask

    def planned_accumulations(self, mean: float, std: float) -> int:
        """Accumulations that all but about 1 draw in 30,000 fit in: room for mean + 4 std rows, at least 1.

        mean, std: of the batch size (`PoissonSampler.expected_batch_size`, `.batch_size_std`). A plan for
        memory and prefetching only: a larger draw takes more accumulations.
        """
        return max(1, self.accumulations(ceil(mean + 4 * std)))

    def expected_padding_waste(self, sampler: PoissonSampler) -> float:
        """Long-run share of the computed rows that are padding: E[padding rows] / E[rows], in [0, 1).

        From the exact distribution of the sampler's batch size. 0 when no row is computed.
        """
        sizes, probabilities = sampler.size_distribution()
        rows = -(-np.maximum(sizes, self.padded_to) // self.rows_per_accumulation) * self.rows_per_accumulation
        computed = float(probabilities @ rows)
        return float(probabilities @ (rows - sizes)) / computed if computed else 0.0


def run_layout(config: RunConfig, plan: PrivacyPlan, physical_batch_size: int, num_devices: int) -> BatchLayout:
    """The layout of a run's draws: padded to the largest one where `privacy.constant_time` asks for it."""
    padded_to = (plan.max_batch_size or 0) if config.privacy.constant_time else 0
    return BatchLayout(physical_batch_size, num_devices, padded_to)
