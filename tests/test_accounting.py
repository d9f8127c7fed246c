import math
import time

import numpy as np
import pytest
from scipy import optimize, special, stats

from dpscale.errors import InputError
from dpscale.privacy import accounting
from dpscale.privacy.accounting import delta, epsilon, epsilon_curve, noise_multiplier
from dpscale.privacy.sensitivity import SLACK, sum_sensitivity

QUICKSTART = {"sampling_rate": 1024 / 4500, "steps": 150, "delta": 1e-5}


def gaussian_delta(eps, mu):
    """delta of the Gaussian mechanism at sensitivity / sigma = mu (Balle & Wang 2018, arXiv 1805.06530, theorem 8)."""
    return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + special.log_ndtr(-mu / 2 - eps / mu))


def gaussian_epsilon(target, mu):
    return optimize.brentq(lambda eps: gaussian_delta(eps, mu) - target, 0, 200, xtol=1e-13)


def mixture(q, centre, sigma, x):
    return ((1 - q) * np.exp(-0.5 * (x / sigma) ** 2) + q * np.exp(-0.5 * ((x - centre) / sigma) ** 2)) / (
        sigma * math.sqrt(2 * math.pi)
    )


def pairs(q, sigma, relation, x):
    """Output densities of one step on neighbouring data (Zhu, Dong & Wang 2022, arXiv 2106.08567, section 5)."""
    zero, up, down = (mixture(q, centre, sigma, x) for centre in (0, 1, -1))
    return [(up, down)] if relation == "replace_one" else [(up, zero), (zero, up)]


def test_at_the_quickstart_pld_spends_3_where_rdp_spends_3_27():
    # PRIVACY.md row 43, where the two figures were taken with another search and Opacus' PRV agreed with PLD.
    sigma = noise_multiplier(epsilon=3, **QUICKSTART)
    assert sigma == pytest.approx(4.03, abs=0.005)
    assert epsilon(noise_multiplier=sigma, **QUICKSTART) == pytest.approx(3.0, abs=1e-4)
    assert epsilon(noise_multiplier=sigma, accountant="rdp", **QUICKSTART) == pytest.approx(3.27, abs=0.005)


@pytest.mark.parametrize("steps", [1, 100, 10_000])
@pytest.mark.parametrize("target", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("relation", ["zero_out", "add_or_remove", "replace_one"])
def test_without_sampling_epsilon_is_the_analytic_gaussian_mechanisms(steps, target, relation):
    # The sensitivity that `sum_sensitivity` states (2 under replace_one) is the one that the accountant charges.
    sensitivity = sum_sensitivity(1.0, relation) / (1 + SLACK)
    sigma = 1.3 * math.sqrt(steps)
    exact = gaussian_epsilon(target, sensitivity * math.sqrt(steps) / sigma)
    got = epsilon(noise_multiplier=sigma, sampling_rate=1, steps=steps, delta=target, neighboring_relation=relation)
    assert exact <= got <= exact * (1 + 2e-4)  # an upper bound, within the grid's error


@pytest.mark.parametrize("relation", ["zero_out", "add_or_remove", "replace_one"])
@pytest.mark.parametrize(("q", "sigma"), [(0.05, 0.9), (0.7, 2.0)])
def test_one_step_is_the_hockey_stick_divergence_integrated_by_hand(relation, q, sigma):
    # Midpoint rule; the kinks of max(0, .) leave an error of spacing^2 * slope, below 1e-7.
    x = np.linspace(-12 * sigma - 1, 12 * sigma + 1, 100_001)
    for eps in (0.0, 0.05, 0.3, 1.0):
        excesses = [np.maximum(0, upper - math.exp(eps) * lower) for upper, lower in pairs(q, sigma, relation, x)]
        by_hand = max(excess.sum() * (x[1] - x[0]) for excess in excesses)
        got = delta(epsilon=eps, noise_multiplier=sigma, sampling_rate=q, steps=1, neighboring_relation=relation)
        assert by_hand - 1e-7 <= got <= by_hand * (1 + 1e-3) + 1e-7, (eps, by_hand, got)


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_two_steps_are_the_hockey_stick_divergence_over_the_plane(relation):
    q, sigma, eps = 0.2, 1.0, 0.5
    x = np.linspace(-8, 9, 1701)
    # Spacing 0.01: the kink of max(0, .) leaves a relative error near spacing^2, 1e-4.
    by_hand = 0.0
    for upper, lower in pairs(q, sigma, relation, x):
        excess = np.maximum(0, np.outer(upper, upper) - math.exp(eps) * np.outer(lower, lower))
        by_hand = max(by_hand, excess.sum() * (x[1] - x[0]) ** 2)
    got = delta(epsilon=eps, noise_multiplier=sigma, sampling_rate=q, steps=2, neighboring_relation=relation)
    assert by_hand * (1 - 1e-4) <= got <= by_hand * (1 + 1e-3)


@pytest.mark.parametrize(
    ("relation", "cap"), [("zero_out", None), ("add_or_remove", None), ("replace_one", None), ("zero_out", 120)]
)
def test_the_dp_event_means_what_epsilon_accounts(relation, cap):
    import dp_accounting

    names = {
        "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        "add_or_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }
    step = accounting.Step(1.1, 0.1, relation, 1000, cap)
    theirs = dp_accounting.pld.PLDAccountant(names[relation], value_discretization_interval=5e-4)
    theirs.compose(step.dp_event(200))
    ours = epsilon(
        noise_multiplier=1.1,
        sampling_rate=0.1,
        steps=200,
        delta=1e-6,
        neighboring_relation=relation,
        num_examples=1000,
        max_batch_size=cap,
    )
    assert ours == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-3)


def test_truncation_costs_what_its_analysis_says_and_a_cap_out_of_reach_costs_nothing():
    plain = epsilon(noise_multiplier=4.0, **QUICKSTART)
    costs = [
        epsilon(noise_multiplier=4.0, num_examples=4500, max_batch_size=cap, **QUICKSTART) for cap in (1024, 1150, 4500)
    ]
    assert costs[0] > costs[1] > plain
    assert costs[1] == pytest.approx(plain, rel=1e-3)  # 4.5 standard deviations above the mean
    assert costs[2] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(("steps", "target"), [(1_000, 1e-6), (1_000, 2.1e-12), (10_000, 1e-9), (10_000, 2.1e-11)])
@pytest.mark.parametrize("mu", [1.0, 3.0])
def test_rounding_in_the_fourier_transform_never_lowers_epsilon(steps, target, mu):
    # A sampling rate one bit below 1 goes through the transform, and has the exact formula all the same.
    almost_one = math.nextafter(1, 0)
    exact = gaussian_epsilon(target, mu)
    got = epsilon(noise_multiplier=math.sqrt(steps) / mu, sampling_rate=almost_one, steps=steps, delta=target)
    assert exact <= got <= exact * 1.03


@pytest.mark.parametrize(
    "case",
    [
        {"epsilon": 3, **QUICKSTART},
        {"epsilon": 3, "accountant": "rdp", **QUICKSTART},
        {"epsilon": 3, "neighboring_relation": "replace_one", **QUICKSTART},
        {"epsilon": 3, "num_examples": 4500, "max_batch_size": 1150, **QUICKSTART},
        {"epsilon": 0.05, "delta": 1e-5, "sampling_rate": 0.01, "steps": 1000},
        {"epsilon": 1, "delta": 1e-6, "sampling_rate": 1, "steps": 50},
        {"epsilon": 1, "delta": 1e-5, "sampling_rate": 0.3, "steps": 1},
    ],
    ids=str,
)
def test_calibration_never_overshoots_and_wastes_at_most_1e_4_of_the_noise(case):
    sigma = noise_multiplier(**case)
    target = case["epsilon"]
    rest = {key: value for key, value in case.items() if key != "epsilon"}
    accounting._epsilon.cache_clear()
    assert epsilon(noise_multiplier=sigma, **rest) <= target
    assert epsilon(noise_multiplier=sigma * (1 - 1e-4), **rest) > target


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"epsilon": 8, "delta": 8e-7, "sampling_rate": 0.0256, "steps": 18_000},
        {"epsilon": 1, "delta": 1e-9, "sampling_rate": 2.5e-5, "steps": 40_000},
        {"epsilon": 2, "delta": 1e-8, "sampling_rate": 1e-6, "steps": 1_000_000},
        {"epsilon": 20, "delta": 1e-5, "sampling_rate": 0.1, "steps": 20},
        {"epsilon": 500, "delta": 1e-5, "sampling_rate": 0.5, "steps": 100},
        {"epsilon": 1e5, "delta": 1e-5, "sampling_rate": 0.5, "steps": 100},
    ],
    ids=str,
)
def test_calibration_holds_at_the_edges_too(case):
    sigma = noise_multiplier(**case)
    rest = {key: value for key, value in case.items() if key != "epsilon"}
    accounting._epsilon.cache_clear()
    assert epsilon(noise_multiplier=sigma, **rest) <= case["epsilon"]
    if sigma > accounting.MIN_NOISE_MULTIPLIER:
        assert epsilon(noise_multiplier=sigma * 0.999, **rest) > case["epsilon"]


def test_calibrating_the_quickstart_takes_less_than_10_seconds():
    accounting._epsilon.cache_clear()
    start = time.process_time()
    noise_multiplier(epsilon=3, **QUICKSTART)
    assert time.process_time() - start < 10


def test_rdp_is_never_below_pld():
    for q, sigma, steps in ((0.01, 1.0, 1000), (0.2, 4.0, 150), (1.0, 10.0, 10)):
        case = {"noise_multiplier": sigma, "sampling_rate": q, "steps": steps, "delta": 1e-5}
        assert epsilon(**case, accountant="rdp") >= epsilon(**case)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta():
    base = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "steps": 100, "delta": 1e-5}
    here = epsilon(**base)
    assert epsilon(**{**base, "steps": 101}) > here
    assert epsilon(**{**base, "sampling_rate": 0.051}) > here
    assert epsilon(**{**base, "noise_multiplier": 1.01}) < here
    assert epsilon(**{**base, "delta": 1.1e-5}) < here


def test_the_curve_is_epsilon_at_each_count():
    mechanism = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "delta": 1e-5}
    curve = epsilon_curve(steps=[0, 1, 50, 200], **mechanism)
    assert curve == [epsilon(steps=count, **mechanism) for count in (0, 1, 50, 200)]
    assert curve[0] == 0
    assert curve == sorted(curve)


def test_delta_and_epsilon_are_inverse():
    for accountant in ("pld", "rdp"):
        case = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "steps": 100, "accountant": accountant}
        assert delta(epsilon=epsilon(delta=1e-5, **case), **case) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_edge_cases(accountant):
    base = {
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "steps": 10,
        "delta": 1e-5,
        "accountant": accountant,
    }
    assert epsilon(**{**base, "noise_multiplier": 0}) == math.inf
    assert epsilon(**{**base, "noise_multiplier": 1e-9}) == math.inf
    assert epsilon(**{**base, "noise_multiplier": math.inf}) == 0
    assert epsilon(**{**base, "sampling_rate": 0}) == 0
    assert epsilon(**{**base, "sampling_rate": 0, "noise_multiplier": 0}) == 0
    assert epsilon(**{**base, "steps": 0}) == 0
    assert 0 < epsilon(**{**base, "sampling_rate": 1}) < math.inf
    without = {key: value for key, value in base.items() if key not in ("delta", "noise_multiplier")}
    assert delta(epsilon=1, noise_multiplier=0, **without) == 1
    assert delta(epsilon=1, noise_multiplier=1, **{**without, "steps": 0}) == 0
    assert noise_multiplier(epsilon=1, delta=1e-5, **{**without, "steps": 0}) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1}, "noise_multiplier=-1"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"sampling_rate": 1.1}, "no probability"),
        ({"sampling_rate": math.nan}, "no probability"),
        ({"steps": -1}, "whole number"),
        ({"steps": 1.5}, "whole number"),
        ({"delta": 0}, "strictly between 0 and 1"),
        ({"delta": 1}, "strictly between 0 and 1"),
        ({"delta": 1e-15}, "too small for the pld accountant"),
        ({"delta": 1e-12, "steps": 10_000}, "double precision"),
        ({"accountant": "prv"}, "choose one of pld, rdp"),
        ({"neighboring_relation": "replace_special"}, "choose one of zero_out"),
        ({"accountant": "rdp", "neighboring_relation": "replace_one"}, 'choose accountant="pld"'),
        ({"accountant": "rdp", "sampling_rate": 1, "neighboring_relation": "replace_one"}, 'choose accountant="pld"'),
        ({"accountant": "rdp", "num_examples": 100, "max_batch_size": 20}, "truncated sampling"),
        ({"max_batch_size": 20}, "depends on the number of examples"),
        ({"max_batch_size": 0, "num_examples": 100}, "at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_the_remedy(change, message):
    base = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(InputError, match=message):
        epsilon(**{**base, **change})


def test_a_target_out_of_reach_is_refused():
    for bad in (0, -1, math.nan):
        with pytest.raises(InputError, match="must be > 0"):
            noise_multiplier(epsilon=bad, **QUICKSTART)
    with pytest.raises(InputError, match="allow a larger epsilon"):
        noise_multiplier(epsilon=1e-7, sampling_rate=1, steps=100, delta=1e-9)


def test_rdp_writes_nothing_to_the_terminal(capfd):
    epsilon(noise_multiplier=1.0, sampling_rate=0.1, steps=10, delta=1e-5, accountant="rdp")
    assert capfd.readouterr() == ("", "")
