"""epsilon of several runs on the same data taken together, as in a search for hyper-parameters."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dpscale.errors import InputError
from dpscale.privacy import accounting
from dpscale.privacy.accounting import Accountant, Step


def composed_epsilon(parts: Sequence[tuple[Step, int]], delta: float, accountant: Accountant = "pld") -> float:
    """Upper bound on epsilon at `delta` of all `parts`, each so many steps of one mechanism, on the same data.

    Holds when every part's mechanism and number of steps was fixed before results of the others were seen; all else
    (learning rate, model, which run to publish) may have been chosen from them. Edge cases: no parts give 0.

    Raises: InputError for values out of range, parts with different neighbouring relations, and what the accountant
        has no analysis of.
    """
    steps: dict[Step, int] = defaultdict(int)
    for step, count in parts:
        accounting.check(step, count, delta, accountant)
        if count > 0 and step.sampling_rate > 0:
            steps[step] += count
    relations = sorted({step.neighboring_relation for step in steps})
    if len(relations) > 1:
        raise InputError(
            f"the runs have different neighbouring relations ({', '.join(relations)}): no one epsilon says what all of "
            "them spend together. Compose those of one relation"
        )
    if len(steps) <= 1:
        return sum(_alone(step, count, delta, accountant) for step, count in steps.items())
    if any(_alone(step, count, delta, accountant) == float("inf") for step, count in steps.items()):
        return float("inf")
    if accountant == "rdp":
        return _composed_rdp(steps, delta)
    spare = sum(accounting.rounding_of_delta(step, count) for step, count in steps.items())
    if delta < 4 * spare:
        raise InputError(
            f"delta={delta} is too small for the pld accountant over {sum(steps.values())} steps: double precision "
            f'resolves {4 * spare:.1e} and more. Choose a larger delta, or accountant="rdp"'
        )
    grid = accounting.grid_spacing(*steps)
    composed = [accounting.one_step_pld(step, grid).self_compose(count) for step, count in steps.items()]
    total: Any = functools.reduce(lambda one, other: one.compose(other), composed)
    return float(total.get_epsilon_for_delta(delta - spare))


def _alone(step: Step, steps: int, delta: float, accountant: Accountant) -> float:
    return accounting.epsilon(
        noise_multiplier=step.noise_multiplier,
        sampling_rate=step.sampling_rate,
        steps=steps,
        delta=delta,
        accountant=accountant,
        neighboring_relation=step.neighboring_relation,
        num_examples=step.num_examples,
        max_batch_size=step.max_batch_size,
    )


def _composed_rdp(steps: dict[Step, int], delta: float) -> float:
    (first, count), *rest = steps.items()
    accountant = accounting.rdp_accountant(first, count)
    with accounting.without_remarks_on_orders():
        for step, more in rest:
            accountant.compose(step.dp_event(more))
    return float(accountant.get_epsilon(delta))
