"""From guesses about canaries to a lower bound on epsilon: auditing in one training run.

Source: Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc, expit

from dpscale.errors import InputError

GRID = 0.05  # first in steps of this, then by bisection
LARGEST = 60.0  # an epsilon beyond it says nothing that this one does not


@dataclass(frozen=True)
class Evidence:
    """`correct` of `guesses` about who of `canaries` was included were right; `epsilon` is the lower bound from it."""

    canaries: int
    guesses: int
    correct: int
    epsilon: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest probability that a mechanism which is (epsilon, delta)-private lets `correct` guesses be right.

    Each of `canaries` examples was included by a fair coin of its own; an adversary who saw the outcome guessed
    `guesses` of the coins, a number fixed beforehand, and abstained on the others. Under delta = 0 the number of right
    guesses is below a binomial one with probability e^epsilon / (1 + e^epsilon).

    Raises: InputError unless 0 <= correct <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not 0 <= correct <= guesses <= canaries or not epsilon >= 0 or not 0 <= delta <= 1:
        raise InputError(
            f"{correct} right of {guesses} guesses about {canaries} canaries at epsilon={epsilon}, delta={delta}: "
            "0 <= right <= guesses <= canaries, epsilon >= 0 and delta in [0, 1] are needed"
        )
    right = float(expit(epsilon))
    at_least = _at_least(correct, guesses, right)
    fewer = np.arange(1, correct + 1)
    slack = np.max((_at_least(correct - fewer, guesses, right) - at_least) / fewer, initial=0.0) if delta else 0.0
    return float(min(1.0, at_least + 2 * canaries * delta * slack))


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> Evidence:
    """The largest epsilon up to which every (epsilon, delta) is refuted at this significance; 0 where none is.

    For a mechanism that is (epsilon, delta)-private the result is above epsilon with probability at most
    `significance` (of the coins, the sampling and the noise together).
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= significance

    if not refuted(0.0):
        return Evidence(canaries, guesses, correct, 0.0)
    low = 0.0
    while low < LARGEST and refuted(low + GRID):
        low += GRID
    high = low + GRID
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return Evidence(canaries, guesses, correct, low)


def guess_counts(canaries: int) -> tuple[int, ...]:
    """How many coins are guessed, fixed before anything is seen: few are surer (a weak signal), many refute more."""
    return tuple(sorted({max(1, canaries // 8), max(1, canaries // 2)}))


def evidence(scores: np.ndarray, included: np.ndarray, delta: float, significance: float, seed: int = 0) -> Evidence:
    """The best of the bounds from one score, float[canaries]; the higher, the likelier included (bool[canaries]).

    Of each number of guesses half are "included", for the highest scores, and half "not", for the lowest. The numbers
    share the significance, so the best may be taken. Ties are broken by a shuffle that does not know the coins.
    """
    canaries = len(scores)
    shuffled = np.random.default_rng(seed).permutation(canaries)
    order = shuffled[np.argsort(scores[shuffled], kind="stable")]
    counts = guess_counts(canaries)
    found = []
    for guesses in counts:
        low, high = order[: guesses // 2], order[canaries - (guesses - guesses // 2) :]
        correct = int(np.sum(~included[low]) + np.sum(included[high]))
        found.append(lower_bound(canaries, guesses, correct, delta, significance / len(counts)))
    return max(found, key=lambda x: x.epsilon)


def reach(canaries: int, delta: float, significance: float) -> float:
    """The bound where every guess is right: more than this no run with so many canaries can show."""
    counts = guess_counts(canaries)
    return max(lower_bound(canaries, n, n, delta, significance / len(counts)).epsilon for n in counts)


def _at_least(successes: np.ndarray | int, trials: int, probability: float) -> np.ndarray | float:
    """P[Binomial(trials, probability) >= successes], also for successes <= 0."""
    below = np.asarray(successes, float) - 1
    return np.where(below < 0, 1.0, bdtrc(np.maximum(below, 0), trials, probability))[()]
