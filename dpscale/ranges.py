"""Ranges: which steps one record of the ledger charges, and the check before it, sent early so that none waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dpscale.loop import STEPS_IN_FLIGHT
from dpscale.replicas import SentCheck

# A process that sends a step has read the results of the step STEPS_IN_FLIGHT earlier, in which process 0 took part. So
# a range that process 0 opens before it sends that earlier step is open before any process begins it.
OPENED_AHEAD = STEPS_IN_FLIGHT
# By then process 0 has read the results of the step another STEPS_IN_FLIGHT earlier: a check that was sent before that
# one is there.
STEPS_AHEAD = OPENED_AHEAD + STEPS_IN_FLIGHT


@dataclass(frozen=True)
class Opening:
    """The steps [start, end) may be charged: all devices and processes agree.

    `checksum`: 4 bytes, of the state after `state_step` steps; sensitive without a key. `state_step`: at most `start`,
    and at least start - STEPS_AHEAD.
    """

    start: int
    end: int
    state_step: int
    checksum: bytes


@dataclass
class Ranges:
    """The ranges of steps `first` to `last`: they end at multiples of `length`, and at `last`.

    When a check is sent follows from these three numbers and the step alone, so all processes send theirs at the same
    place among the steps, as collectives must be.
    """

    first: int
    last: int
    length: int
    _sent: dict[int, tuple[int, SentCheck]] = field(default_factory=dict, init=False, repr=False)

    def before(self, step: int, send: Callable[[int], SentCheck]) -> list[Opening]:
        """Send the checks that are due before `step`; the ranges to open before it is sent, none of them late.

        Call it for every step in order, before anything of the step is sent. Waits only before the first step, when the
        devices have nothing else to do.

        Args:
            send: sends the check of the range that begins at a given step, with the state that `step` starts from.

        Raises: DivergedError on every process where devices or processes differ.
        """
        for start in self.due(step):
            check = send(start)
            if step == self.first:
                # Nothing is queued yet, so this wait costs nothing. Later checks are kept in order by the steps between
                # them; several at once, of which none needs another, could meet in another order on each process.
                check.agreed()
            self._sent[start] = (step, check)
        opened = []
        for start in [start for start in self._sent if start <= step + OPENED_AHEAD]:
            state_step, check = self._sent.pop(start)
            opened.append(Opening(start, self.end(start), state_step, check.agreed()))
        return opened

    def due(self, step: int) -> list[int]:
        """First steps of the ranges whose check is sent before `step`; at the very first step, of all that are near."""
        ahead = step + STEPS_AHEAD
        return [start for start in range(step if step == self.first else ahead, ahead + 1) if self._begins(start)]

    def end(self, step: int) -> int:
        """Where the range of `step` ends."""
        return min((step // self.length + 1) * self.length, self.last)

    def _begins(self, step: int) -> bool:
        return step < self.last and (step == self.first or step % self.length == 0)
