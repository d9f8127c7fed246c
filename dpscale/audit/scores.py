"""One score for each kind of bug, from what every step released along each canary's direction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Two releases this close, in standard deviations of the noise, were made with one draw: by chance that is rare.
SAME_DRAW = 1e-5

Score = Callable[[np.ndarray, float], np.ndarray]


def total(released: np.ndarray, noise: float) -> np.ndarray:
    """Sum over the steps. Sees too little noise, a missing clip, and canaries sampled far too often."""
    return released.sum(axis=0)


def spread(released: np.ndarray, noise: float) -> np.ndarray:
    """Largest minus smallest over the steps. Sees one draw of noise used in all steps: only a canary then differs."""
    return released.max(axis=0) - released.min(axis=0)


def repeats(released: np.ndarray, noise: float) -> np.ndarray:
    """Less the number of steps that released what another did. Sees draws that come back, as with a short period.

    Where a draw comes back, an absent canary's releases are equal; a present one's differ in the steps that took it.
    """
    gaps = np.diff(np.sort(released, axis=0), axis=0)
    return -(gaps < SAME_DRAW * noise).sum(axis=0).astype(np.float64)


SCORES: dict[str, Score] = {"total": total, "spread": spread, "repeats": repeats}
"""Each takes (released float64[steps, canaries] in units of the clip norm, standard deviation of the noise in those
units) and gives float64[canaries]: the higher, the likelier the canary was included."""


def all_scores(released: np.ndarray, noise: float) -> dict[str, np.ndarray]:
    """Every score of every canary."""
    return {name: score(released, noise) for name, score in SCORES.items()}
