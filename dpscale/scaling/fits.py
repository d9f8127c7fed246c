"""Bootstrap intervals, and the laws of Amdahl and Gustafson fitted by least squares. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its bootstrap percentile interval (95 %). Both ends equal the value where nothing varied."""

    value: float
    low: float
    high: float


def resampled(groups: Sequence[Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    """float64[DRAWS]: the median over repeats of the medians over windows, repeats and windows drawn anew each time.

    groups: the windows' values of each repeat. Windows of one repeat share a job, so whole repeats are drawn first.
    """
    drawn = np.empty((DRAWS, len(groups)))
    chosen = rng.integers(len(groups), size=(DRAWS, len(groups)))
    for index, values in enumerate(groups):
        places = np.nonzero(chosen == index)
        windows = rng.integers(len(values), size=(len(places[0]), len(values)))
        drawn[places] = np.median(np.asarray(values, float)[windows], axis=1)
    return np.median(drawn, axis=1)


def centre(groups: Sequence[Sequence[float]]) -> float:
    """The median over repeats of the medians over windows."""
    return float(np.median([np.median(values) for values in groups]))


def interval(value: float, draws: np.ndarray) -> Interval:
    """The value, with the percentiles of its bootstrap draws."""
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(value), float(low), float(high))


def amdahl(devices: Sequence[int], step_s: np.ndarray) -> np.ndarray:
    """Serial part s of T(n) = T(b) (s + (1 - s) b / n), b the first count; for each row of float64[.., points].

    Least squares of the relative errors. Below 0: better than linear. Needs a count above the first.
    Source: Amdahl 1967, with the base count in place of one processor.
    """
    time = step_s / step_s[..., :1]
    share = devices[0] / np.asarray(devices, float)
    weight = 1 / time**2
    return np.sum(weight * (1 - share) * (time - share), -1) / np.sum(weight * (1 - share) ** 2, -1)


def gustafson(devices: Sequence[int], examples_per_s: np.ndarray) -> np.ndarray:
    """Serial part s of the scaled speed-up S(r) = s + (1 - s) r, r = n / b; of each row, float64[.., points].

    Least squares of the relative errors. Source: Gustafson 1988, with the base count in place of one processor.
    """
    speed_up = examples_per_s / examples_per_s[..., :1]
    ratio = np.asarray(devices, float) / devices[0]
    weight = 1 / ratio**2
    return np.sum(weight * (ratio - 1) * (ratio - speed_up), -1) / np.sum(weight * (ratio - 1) ** 2, -1)
