"""What an audit would show, simulated: the mechanism of a plan with one planted bug, without model and data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpscale.audit.bound import evidence
from dpscale.audit.scores import SCORES, all_scores
from dpscale.privacy.plan import PrivacyPlan

CANARY_NORM = 10.0  # of a canary's gradient before clipping, in clip norms


@dataclass(frozen=True)
class Bug:
    """What differs from a correct step: the length of a clipped canary, the noise, and whether its key changes."""

    contribution: float = 1.0
    noise: float = 1.0
    one_draw: bool = False
    period: int | None = None


BUGS: dict[str, Bug] = {
    "correct": Bug(),
    "noise at 2/3": Bug(noise=2 / 3),
    "noise at 1/10": Bug(noise=0.1),
    "no clip": Bug(contribution=CANARY_NORM),
    "no clip, canaries of norm C": Bug(),
    "one draw for all steps": Bug(one_draw=True),
    "draws repeat after 10 steps": Bug(period=10),
}


def simulate(
    plan: PrivacyPlan, bug: Bug, canaries: int, steps: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One run: (released float64[steps, canaries] in clip norms, included bool[canaries])."""
    included = generator.random(canaries) < 0.5
    sampled = (generator.random((steps, canaries)) < plan.sampling_rate) & included
    period = 1 if bug.one_draw else bug.period or steps
    normals = generator.standard_normal((min(period, steps), canaries))
    noise = normals[np.arange(steps) % period]
    return bug.contribution * sampled + bug.noise * plan.noise_multiplier * noise, included


def power(
    plan: PrivacyPlan, canaries: int, steps: int, *, confidence: float = 0.95, runs: int = 10, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Mean lower bound on epsilon for each bug and each score, over `runs` simulated audits of a plan.

    Every score is used at its share of the significance, as in an audit.
    """
    assert plan.delta is not None
    significance = (1 - confidence) / len(SCORES)
    generator = np.random.default_rng(seed)
    table: dict[str, dict[str, float]] = {}
    for name, bug in BUGS.items():
        bounds: dict[str, list[float]] = {score: [] for score in SCORES}
        for _ in range(runs):
            released, included = simulate(plan, bug, canaries, steps, generator)
            for score, values in all_scores(released, plan.noise_multiplier).items():
                bounds[score].append(evidence(values, included, plan.delta, significance).epsilon)
        table[name] = {score: float(np.mean(values)) for score, values in bounds.items()}
    return table


def power_lines(table: dict[str, dict[str, float]]) -> list[str]:
    """The table as aligned text."""
    head = f"{'':<30}" + "".join(f"{score:>10}" for score in SCORES)
    return [head, *(f"{bug:<30}" + "".join(f"{row[s]:>10.2f}" for s in SCORES) for bug, row in table.items())]
