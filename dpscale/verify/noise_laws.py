"""What draws of noise must look like: variance leaf by leaf, shape, and independence. Pure NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammainc, gammaincc

from dpscale.verify.laws import Laws

# Both tails of all statistical laws of a verification together: correct code is stopped once in a million times.
RARE = 1e-6
TESTS_AT_LEAST = 10
ENOUGH = 4096  # products, for their mean to be nearly normal
WINDOW = 2**18
DISTINCT_SAMPLE = 10**5
MOST_FOR_SHAPE = 2**22
MOST_LEAVES_NAMED = 3


@dataclass
class NoiseSample:
    """Several steps' noise on the sum: `draws` float32[steps, n]; the leaves' names and sizes in flattening order.

    `stddev`: what the plan says. `shard`: elements that one device makes where noise is cut over devices.
    """

    draws: np.ndarray
    stddev: float
    names: list[str]
    sizes: list[int]
    shard: int

    @property
    def seen_stddev(self) -> float:
        """Root mean square of all draws."""
        return math.sqrt(float(np.mean(np.square(self.draws, dtype=np.float64))))


def check_noise(sample: NoiseSample, laws: Laws) -> None:
    """Variance, per leaf and in all; mean and kurtosis; distinct values; no leaf, step or shard like another."""
    if sample.stddev == 0:
        laws.check("without noise nothing is added", not sample.draws.any(), "noise", "none (noise multiplier 0)")
        return
    _check_variance(sample, laws)
    _check_shape(sample, laws)
    _check_distinct(sample, laws)
    _check_independence(sample, laws)


def _check_variance(sample: NoiseSample, laws: Laws) -> None:
    law = "the noise has the plan's variance on every parameter"
    tests, ends = max(TESTS_AT_LEAST, len(sample.sizes) + 1), np.cumsum(sample.sizes)
    wrong, all_squares = [], 0.0
    for name, start, end in zip(sample.names, [0, *ends[:-1]], ends, strict=True):
        draws = sample.draws[:, start:end]
        total, count = float(np.sum(np.square(draws, dtype=np.float64))), draws.size
        all_squares += total
        if _chi_square_tail(total / sample.stddev**2, count) < RARE / tests:
            wrong.append(f"{math.sqrt(total / count):.4g} on {name} ({count} draws)")
    shown = ", ".join(wrong[:MOST_LEAVES_NAMED]) + (f" and {len(wrong) - MOST_LEAVES_NAMED} more" if wrong[3:] else "")
    laws.check(law, not wrong, f"standard deviation {shown}", f"{sample.stddev:.4g}")
    if not wrong:
        tail = _chi_square_tail(all_squares / sample.stddev**2, sample.draws.size)
        seen = math.sqrt(all_squares / sample.draws.size)
        laws.check(law, tail >= RARE / tests, f"standard deviation {seen:.5g}", f"{sample.stddev:.5g}")


def _check_shape(sample: NoiseSample, laws: Laws) -> None:
    some = sample.draws.reshape(-1)[:: max(1, sample.draws.size // MOST_FOR_SHAPE)]
    count, z = some.size, some.astype(np.float64) / sample.stddev
    limit = _normal_limit(RARE / TESTS_AT_LEAST)
    mean = float(z.mean())
    laws.check("the noise has mean zero", abs(mean) < limit / math.sqrt(count), f"{mean:.3g}", "0 (in its own std)")
    if count >= ENOUGH:
        fourth = float(np.mean(np.square(np.square(z))))
        # z^4 has variance 96 and long tails, for which the square root of the count's share of 1 makes room.
        room = limit * math.sqrt(96 / count) * (1 + limit * math.sqrt(24 / count))
        laws.check("the noise is Gaussian", abs(fourth - 3) < room, f"kurtosis {fourth:.3f}", "3")


def _check_distinct(sample: NoiseSample, laws: Laws) -> None:
    few = np.abs(sample.draws.reshape(-1)[:DISTINCT_SAMPLE])
    share = len(np.unique(few)) / len(few)
    laws.check(
        "the noise is float32, and no draw is used twice",
        share > 0.9,
        f"{share:.0%} distinct values among {len(few)}",
        "nearly all distinct",
    )
    # Two leaves that begin alike in every step were made from one key.
    starts = np.cumsum([0, *sample.sizes[:-1]])
    firsts = np.abs(sample.draws[:, starts]).T
    alike = len(firsts) - len(np.unique(firsts, axis=0))
    laws.check("every parameter has noise of its own", alike == 0, f"{alike} begin like another", "none")


def _check_independence(sample: NoiseSample, laws: Laws) -> None:
    """No part of the noise is another part, shifted by any number of elements: between steps, leaves and shards."""
    x = _joined_windows(sample) / sample.stddev
    if len(x) < 2 * ENOUGH:
        return
    size = 1 << (2 * len(x) - 1).bit_length()
    spectrum = np.fft.rfft(x, size)
    products = np.fft.irfft(np.abs(spectrum) ** 2, size)[1 : len(x) - ENOUGH]
    scores = np.abs(products) / np.sqrt(len(x) - np.arange(1, 1 + len(products)))
    worst = int(np.argmax(scores))
    limit = _normal_limit(RARE / TESTS_AT_LEAST / len(products)) * 1.1  # products of normals have longer tails
    laws.check(
        "the noise of steps, parameters and devices is independent",
        scores[worst] < limit,
        f"correlation {products[worst] / (len(x) - 1 - worst):.3f} with itself {worst + 1} elements on",
        "none",
    )


def _joined_windows(sample: NoiseSample) -> np.ndarray:
    """All draws end to end; of large models, the beginnings of two steps and of the first few shards."""
    if sample.draws.size <= 2 * WINDOW:
        return sample.draws.reshape(-1).astype(np.float64)
    count = sample.draws.shape[1]
    if count <= WINDOW:
        return sample.draws[: 2 * WINDOW // count].reshape(-1).astype(np.float64)
    length = min(WINDOW // 4, sample.shard)
    starts = [j * sample.shard for j in range(4) if j * sample.shard + length <= count]
    parts = [sample.draws[0, start : start + length] for start in starts]
    return np.concatenate([*parts, *(row[:length] for row in sample.draws[1:3])]).astype(np.float64)


def _chi_square_tail(statistic: float, count: int) -> float:
    """Probability of a chi-square value at least as far out, both tails."""
    return float(2 * min(gammainc(count / 2, statistic / 2), gammaincc(count / 2, statistic / 2)))


def _normal_limit(probability: float) -> float:
    """An upper bound on the x with P[|N(0, 1)| > x] = probability."""
    return math.sqrt(2 * math.log(2 / probability))
