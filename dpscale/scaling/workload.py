"""What one device does in a step: from a measured record, or from assumptions that are named as such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from dpscale.batching import BatchLayout
from dpscale.errors import InputError
from dpscale.sampling import PoissonSampler
from dpscale.scaling.network import Network
from dpscale.scaling.point import VARIANTS, Mode, Variant
from dpscale.scaling.record import Record

# Physical batches that cut the share of a device into few equal accumulations, with room for this many deviations.
ROOM_STD = 4.0
CUTS_TRIED = 4
MOST_EXACT = 2**24  # examples: above, the exact table of batch sizes takes too long


@dataclass(frozen=True)
class Workload:
    """One variant of one model on one device. `row_s`: seconds of one row, padding or not; `noise_s`, `update_s`,
    `host_s`: of one logical step, for all parameters. `source`: measured where, or assumed from what. `sharded`:
    noise and update are cut over the devices (performance.update_sharding).
    """

    variant: Variant
    num_parameters: int
    batch: float
    num_examples: int
    physical_batch_size: int
    row_s: float
    noise_s: float
    update_s: float
    host_s: float
    measured: bool
    source: str
    sharded: bool = False

    @property
    def message_bytes(self) -> float:
        """Bytes of the gradient reduction: 4 a parameter."""
        return 4.0 * self.num_parameters


@dataclass(frozen=True)
class Assumed:
    """What the user says instead of a record. `private_ratio`: private over non-private time of a row."""

    examples_per_s: float
    num_parameters: int
    batch: float
    num_examples: int
    physical_batch_size: int
    private_ratio: float
    source: str


@dataclass(frozen=True)
class Draws:
    """Accumulations of a step, in expectation over Poisson's draws, and the rows of each on one device."""

    physical_batch_size: int
    accumulations: float
    rows: float = field(repr=False)


def assumed_workloads(assumed: Assumed, network: Network) -> dict[Variant, Workload]:
    """Both variants, from a stated speed; noise and update from the profile's estimates."""
    row_s = 1 / assumed.examples_per_s
    both: dict[Variant, Workload] = {}
    ratios: tuple[tuple[Variant, float], ...] = (("private", assumed.private_ratio), ("nonprivate", 1.0))
    for variant, ratio in ratios:
        both[variant] = Workload(
            variant=variant,
            num_parameters=assumed.num_parameters,
            batch=assumed.batch,
            num_examples=assumed.num_examples,
            physical_batch_size=assumed.physical_batch_size,
            row_s=row_s * ratio,
            noise_s=1e-9 * network.device.noise_ns * assumed.num_parameters if variant == "private" else 0.0,
            update_s=1e-9 * network.device.update_ns * assumed.num_parameters,
            host_s=0.0,
            measured=False,
            source=f"{assumed.examples_per_s:g} examples/s on one device, ASSUMED ({assumed.source})",
        )
    return both


def measured_workloads(records: Sequence[Record]) -> dict[Variant, Workload]:
    """From the records of the smallest count: medians over their repeats."""
    base = min(record.devices for record in records)
    found: dict[Variant, Workload] = {}
    for record in records:
        group = [r for r in records if (r.devices, r.variant) == (base, record.variant)]
        if record.variant in found or not group:
            continue
        first = group[0]
        rows = [sum(w.rows for w in r.windows) / sum(w.steps for w in r.windows) / r.devices for r in group]
        found[record.variant] = Workload(
            variant=record.variant,
            num_parameters=first.num_parameters,
            batch=first.batch,
            num_examples=first.num_examples,
            physical_batch_size=first.physical_batch_size,
            row_s=_median(r.parts.accumulate / n for r, n in zip(group, rows, strict=True)),
            noise_s=_median(r.parts.noise for r in group),
            update_s=_median(r.parts.update for r in group),
            host_s=max(0.0, _median(r.parts.host for r in group)),
            measured=True,
            sharded=first.performance.get("update_sharding") == "sharded",
            source=f"measured: {len(group)} record{'s' if len(group) > 1 else ''} of {base} x {first.device_kind}",
        )
    found = {variant: found[variant] for variant in VARIANTS if variant in found}
    if not found:
        raise InputError("there is no record to predict from: measure one point with dpscale scaling measure")
    return found


def draws_of(workload: Workload, devices: int, mode: Mode, base: int) -> Draws:
    """The physical batch, at most the workload's, with the fewest expected rows on this many devices.

    Strong: the logical batch stays. Weak: batch and data set grow with the devices, so that the sampling rate stays.
    The time of a row is taken to be the same for smaller physical batches, which flatters small shares.
    """
    growth = devices / base if mode == "weak" else 1.0
    batch, examples = workload.batch * growth, round(workload.num_examples * growth)
    sizes, probabilities = _sizes(examples, batch / examples)
    std = math.sqrt(batch * max(0.0, 1 - batch / examples))
    most = workload.physical_batch_size
    least_cuts = max(1, math.ceil((batch + ROOM_STD * std) / (devices * most)))
    candidates = {most}
    for cuts in range(least_cuts, least_cuts + CUTS_TRIED):
        candidates |= {min(most, max(1, math.ceil((batch + room * std) / (devices * cuts)))) for room in (2, ROOM_STD)}
    found = []
    for physical in candidates:
        per_accumulation = BatchLayout(physical, devices).rows_per_accumulation
        accumulations = float(probabilities @ -(-sizes // per_accumulation))
        found.append(Draws(physical, accumulations, accumulations * physical))
    return min(found, key=lambda draws: (draws.rows, -draws.physical_batch_size))


@lru_cache(maxsize=64)
def _sizes(num_examples: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Distribution of the size of a draw: exact, or for very large data sets the normal one on the integers."""
    if num_examples <= MOST_EXACT:
        return PoissonSampler(num_examples, rate, bytes(32)).size_distribution()
    mean, std = num_examples * rate, math.sqrt(num_examples * rate * (1 - rate))
    sizes = np.arange(max(0, int(mean - 8 * std)), int(mean + 8 * std) + 1)
    weights = np.exp(-0.5 * ((sizes - mean) / std) ** 2)
    return sizes, weights / weights.sum()


def _median(values) -> float:
    return float(np.median(list(values)))
