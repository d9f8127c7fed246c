"""training_steps(): the loop as a generator. It dispatches and never waits for the step that it has just sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dpscale.chacha import key_words
from dpscale.privacy.secret import RootSecret
from dpscale.state import Statistics, TrainState
from dpscale.step import Rows, StepFunctions

# A step's requests are read before the second next step is dispatched: the device always has work queued.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class StepInfo:
    """One logical step was dispatched.

    `step`: steps done, this one included. `state`: after it; valid until the generator goes on (its buffers are then
    reused). `save`: all processes agreed to save now.
    """

    step: int
    state: TrainState
    save: bool


@dataclass(frozen=True)
class StepKeys:
    """Keys of one attempt: pure functions of (root secret, purpose, attempt, step)."""

    secret: RootSecret
    attempt: int

    def noise(self, step: int) -> np.ndarray:
        """uint32[8]: the ChaCha20 key of the step's one draw of noise."""
        return key_words(self.secret.derive("noise", self.attempt, step))

    def examples(self, step: int) -> np.ndarray:
        """uint32[2]: threefry key data for augmentation and dropout; each example folds in its own index."""
        return np.frombuffer(self.secret.derive("augmentation", self.attempt, step, 8), "<u4").astype(np.uint32)


def training_steps(
    functions: StepFunctions,
    state: TrainState,
    table: Any,
    batches: Callable[[int], Iterable[Rows]],
    keys: StepKeys,
    steps: range,
    charge: Callable[[int], None],
    requests: Callable[[], jax.Array],
    arrived: Callable[[int, Statistics], None],
) -> Iterator[StepInfo]:
    """Run `steps`, yielding after each has been dispatched; ends early, on the same step everywhere, on a stop.

    Args:
        table: the data set on the devices, or {}.
        batches: the physical batches of a step; as many on every process, none for an empty draw.
        charge: called with a step's number before anything of that step is dispatched.
        requests: what this process asks for; it rides in the step's reduction.
        arrived: called with (steps done, statistics) of every step, in order, once its results are here. Sensitive.

    Every process reads the same reduced requests at the same step, so all stop and save together.
    """
    sums = functions.zero_sums()
    in_flight: deque[tuple[int, jax.Array]] = deque()
    for step in steps:
        save = False
        if len(in_flight) == STEPS_IN_FLIGHT:
            statistics = _deliver(in_flight.popleft(), arrived)
            if statistics.stop > 0:
                break
            save = statistics.save > 0
        charge(step)
        for rows in batches(step):
            sums = functions.accumulate(state.params, sums, table, rows, keys.examples(step))
        state, sums, reduced = functions.finalize(state, sums, requests(), keys.noise(step))
        in_flight.append((step + 1, reduced))
        yield StepInfo(step + 1, state, save)
    for last in in_flight:
        _deliver(last, arrived)


def _deliver(sent: tuple[int, jax.Array], arrived: Callable[[int, Statistics], None]) -> Statistics:
    step, reduced = sent
    statistics = Statistics.of(np.asarray(reduced))
    arrived(step, statistics)
    return statistics
