"""What one record can move the sum of clipped gradients by, per bound and neighbouring relation. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from dpscale.errors import InputError

NeighboringRelation = Literal["zero_out", "add_or_remove", "replace_one"]
NEIGHBORING_RELATIONS: tuple[str, ...] = get_args(NeighboringRelation)

SLACK = 2.0**-16
"""Relative room for float32 rounding, about 1.5e-5: a clipped contribution has norm <= bound * (1 + SLACK).

A clip factor min(1, C / norm) carries three roundings (norm, division, product), each at most eps = 2**-24; the
norm's sum of n squares, taken pairwise or in blocks with an error of at most b * eps, is halved by the square
root: together (3 + b / 2) * eps, which stays below 2**-16 for b <= 500. The noise is scaled to the larger norm,
so that rounding cannot eat into the guarantee; it costs 1.5e-5 of the noise.
"""


def flat_norm_bound(clip_norm: float) -> float:
    """Largest norm of one record's contribution when its whole gradient is clipped to `clip_norm`.

    The same holds for normalised ("automatic") clipping, C * g / (norm(g) + gamma): its norm is below C.

    Raises: InputError for a negative, infinite or undefined norm.
    """
    if not 0 <= clip_norm < math.inf:
        raise InputError(
            f"clip_norm={clip_norm}: without a finite bound >= 0 no noise gives privacy; set privacy.clip_norm"
        )
    return float(clip_norm)


def per_group_norm_bound(clip_norms: Iterable[float]) -> float:
    """Largest norm of one record's contribution when each group of parameters is clipped on its own.

    The groups' parts are orthogonal, so it is sqrt(sum of C_g^2) (McMahan et al. 2018, arXiv 1710.06963).

    Raises: InputError when there is no group, or for a norm that `flat_norm_bound` refuses.
    """
    norms = [flat_norm_bound(norm) for norm in clip_norms]
    if not norms:
        raise InputError("no clip norms: give at least one group of parameters with its norm")
    return math.hypot(*norms)


def noise_unit(norm_bound: float) -> float:
    """What one unit of noise multiplier stands for: the norm bound with room for rounding.

    The noise added to the sum has standard deviation noise_multiplier * noise_unit(norm_bound) under EVERY
    neighbouring relation. The accountant's noise multiplier is in units of one record's norm, and under
    `replace_one` it takes the two records as opposite vectors of that norm (so a distance of 2) by itself;
    a factor of 2 here as well would count it twice, and its absence there would halve the noise.
    """
    return flat_norm_bound(norm_bound) * (1 + SLACK)


def sum_sensitivity(norm_bound: float, neighboring_relation: NeighboringRelation) -> float:
    """Largest distance between the sums over two neighbouring batches, with room for rounding.

    zero_out, add_or_remove: one record's contribution goes or comes, 1 * norm. replace_one: it becomes another,
    in the worst case its opposite, 2 * norm. For reports and checks; the noise is scaled by `noise_unit`.

    Raises: InputError for an unknown relation.
    """
    check_neighboring_relation(neighboring_relation)
    return (2 if neighboring_relation == "replace_one" else 1) * noise_unit(norm_bound)


def check_neighboring_relation(neighboring_relation: str) -> None:
    """Raises: InputError unless it is one of NEIGHBORING_RELATIONS."""
    if neighboring_relation not in NEIGHBORING_RELATIONS:
        raise InputError(
            f"neighboring_relation={neighboring_relation!r} is unknown: "
            f"choose one of {', '.join(NEIGHBORING_RELATIONS)}"
        )
