import math

import numpy as np
import pytest

from dpscale.errors import InputError
from dpscale.privacy.sensitivity import (
    NEIGHBORING_RELATIONS,
    SLACK,
    flat_norm_bound,
    noise_unit,
    per_group_norm_bound,
    sum_sensitivity,
)


def test_a_flat_bound_is_the_clip_norm():
    assert flat_norm_bound(0.5) == 0.5
    assert flat_norm_bound(0) == 0


def test_groups_add_as_orthogonal_vectors():
    assert per_group_norm_bound([3, 4]) == pytest.approx(5)
    assert per_group_norm_bound([0.7]) == 0.7
    assert per_group_norm_bound([1.0] * 16) == pytest.approx(4)


def test_one_record_moves_the_sum_by_at_most_the_sensitivity_and_some_record_by_nearly_that():
    generator = np.random.default_rng(0)
    clip_norm = 0.8

    def clipped():
        gradient = generator.normal(size=20)
        return gradient * min(1, clip_norm / np.linalg.norm(gradient))

    rest = sum(clipped() for _ in range(50))
    record = clipped()
    opposite = -record
    moves = {
        "zero_out": [np.linalg.norm((rest + record) - rest)],
        "add_or_remove": [np.linalg.norm((rest + record) - rest)],
        "replace_one": [np.linalg.norm((rest + record) - (rest + opposite))],
    }
    for relation, seen in moves.items():
        bound = sum_sensitivity(clip_norm, relation)
        assert max(seen) <= bound
        assert max(seen) > 0.99 * bound  # so the factor 2 of replace_one is neither missing nor idle


def test_the_noise_unit_knows_no_relation_because_the_accountant_has_the_factor_2():
    # test_accounting ties the accountant to sum_sensitivity relation by relation.
    assert noise_unit(2.0) == 2.0 * (1 + SLACK)
    for relation in NEIGHBORING_RELATIONS:
        factor = 2 if relation == "replace_one" else 1
        assert sum_sensitivity(2.0, relation) == factor * noise_unit(2.0)


def test_the_slack_covers_float32_clipping():
    generator = np.random.default_rng(1)
    worst = 0.0
    for size in (10, 1_000, 30_000):
        for _ in range(20):
            gradient = generator.normal(size=size).astype(np.float32) * np.float32(generator.lognormal(sigma=3))
            norm = np.sqrt(np.sum(gradient * gradient, dtype=np.float32))
            contribution = gradient * np.float32(min(np.float32(1), np.float32(0.3) / norm))
            worst = max(worst, float(np.linalg.norm(contribution.astype(np.float64))) / float(np.float32(0.3)))
    assert 1 < worst <= 1 + SLACK  # rounding does pass the bound, and the slack holds it


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bad):
    for function in (flat_norm_bound, noise_unit, lambda norm: per_group_norm_bound([1.0, norm])):
        with pytest.raises(InputError, match=r"privacy\.clip_norm"):
            function(bad)


def test_no_groups_and_unknown_relations_are_refused():
    with pytest.raises(InputError, match="at least one group"):
        per_group_norm_bound([])
    with pytest.raises(InputError, match="choose one of zero_out"):
        sum_sensitivity(1.0, "substitute")
