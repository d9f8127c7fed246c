"""epsilon, delta and noise multiplier of Poisson-subsampled Gaussian steps, through dp-accounting.

Every figure is an upper bound: "pld" composes pessimistic privacy loss distributions (Koskela et al. 2020;
Doroshenko et al. 2022, "Connect the Dots"), "rdp" composes Renyi divergences (Mironov et al. 2019). The noise
multiplier is the noise's standard deviation over one record's norm bound, whatever the neighbouring relation.
dp-accounting takes seconds to import, so that happens inside the functions.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpscale.errors import InputError
from dpscale.privacy.sensitivity import NeighboringRelation, check_neighboring_relation

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[str, ...] = get_args(Accountant)

MIN_NOISE_MULTIPLIER = 0.01
MAX_NOISE_MULTIPLIER = 1e4
_HOPELESS_NOISE_MULTIPLIER = 1e-3  # epsilon would pass a million, and the arithmetic its range

# The Fourier transform behind PLD composition leaves rounding errors in delta that grow with the number of steps
# and can be negative: down to -4e-17 * steps was seen against the exact formula at sampling rate 1. Twelve times
# that is taken off delta before epsilon is read, and where delta is not a few times larger there is no figure.
_ROUNDING_OF_DELTA_PER_STEP = 5e-16
_TAIL_OF_DELTA = 1e-15


@dataclass(frozen=True)
class Step:
    """One logical step as the accountant sees it: Poisson sampling, perhaps truncated, then Gaussian noise.

    `max_batch_size` truncates a larger draw to a uniform subset; the analysis (arXiv 2508.15089) then needs
    `num_examples`, which is otherwise unused.

    Raises: InputError for values out of range.
    """

    noise_multiplier: float
    sampling_rate: float
    neighboring_relation: NeighboringRelation = "zero_out"
    num_examples: int | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise InputError(f"noise_multiplier={self.noise_multiplier}: it must be >= 0; 1 is a usual value")
        if not 0 <= self.sampling_rate <= 1:
            raise InputError(
                f"sampling_rate={self.sampling_rate} is no probability: give expected batch size / examples"
            )
        check_neighboring_relation(self.neighboring_relation)
        if self.max_batch_size is None:
            # Equal mechanisms compare equal, whether or not somebody mentioned the size of the data set.
            object.__setattr__(self, "num_examples", None)
        elif self.max_batch_size < 1:
            raise InputError(f"max_batch_size={self.max_batch_size}: it must be at least 1; leave it out for none")
        elif self.num_examples is None or self.num_examples < 1:
            raise InputError(
                f"max_batch_size={self.max_batch_size} but num_examples={self.num_examples}: the price of "
                "truncation depends on the number of examples; give it (at least 1)"
            )

    def dp_event(self, steps: int) -> Any:
        """The dp-accounting DpEvent of `steps` such steps."""
        from dp_accounting import dp_event

        if self.max_batch_size is None:
            gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
            one = dp_event.PoissonSampledDpEvent(self.sampling_rate, gaussian)
        else:
            assert self.num_examples is not None
            one = dp_event.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.num_examples,
                sampling_probability=self.sampling_rate,
                truncated_batch_size=self.max_batch_size,
                noise_multiplier=self.noise_multiplier,
            )
        return dp_event.SelfComposedDpEvent(one, steps)


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "zero_out",
    num_examples: int | None = None,
    max_batch_size: int | None = None,
) -> float:
    """Upper bound on epsilon at `delta` after `steps` steps of DP-SGD with Poisson sampling.

    | noise_multiplier | sampling_rate | steps | epsilon |
    | --- | --- | --- | --- |
    | any | 0 | any | 0 |
    | any | any | 0 | 0 |
    | < 0.001 | > 0 | > 0 | inf |
    | inf | any | any | 0 |

    Raises: InputError for values out of range; for what the accountant has no analysis of (RDP: replace_one and
    truncated sampling); for a delta below what double precision resolves after so many steps (PLD).
    """
    step = Step(noise_multiplier, sampling_rate, neighboring_relation, num_examples, max_batch_size)
    return _epsilon(step, steps, delta, accountant)


def epsilon_curve(*, steps: Sequence[int], **mechanism: Any) -> list[float]:
    """`epsilon` at each of several step counts, sharing what does not depend on them.

    Takes the other keywords of `epsilon`. At the quickstart's settings: some 20 ms a step count.
    """
    return [epsilon(steps=count, **mechanism) for count in steps]


def delta(
    *,
    epsilon: float,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "zero_out",
    num_examples: int | None = None,
    max_batch_size: int | None = None,
) -> float:
    """Upper bound on delta at `epsilon` (>= 0) after `steps` steps; edge cases as for `epsilon`.

    Raises: InputError as `epsilon` does. PLD: values near 5e-16 * steps are that bound on the rounding.
    """
    step = Step(noise_multiplier, sampling_rate, neighboring_relation, num_examples, max_batch_size)
    check(step, steps, None, accountant)
    if not epsilon >= 0:
        raise InputError(f"epsilon={epsilon}: it must be >= 0; 1 to 8 are usual values")
    certain = _certain_epsilon(step, steps)
    if certain is not None:
        return 0.0 if certain <= epsilon else 1.0
    if accountant == "rdp":
        return min(1.0, float(rdp_accountant(step, steps).get_delta(epsilon)))
    composed = _composed_pld(step, steps, 1)
    return min(1.0, float(composed.get_delta_for_epsilon(epsilon)) + rounding_of_delta(step, steps))


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "zero_out",
    num_examples: int | None = None,
    max_batch_size: int | None = None,
) -> float:
    """The smallest noise multiplier, to 1e-5 of it, that keeps `steps` steps within (epsilon, delta).

    Guarantees: `dpscale.epsilon` of the result, with the same arguments, is <= `epsilon`: it was evaluated.
    Edge cases: sampling rate 0 or 0 steps gives 0; never below MIN_NOISE_MULTIPLIER otherwise.

    Raises: InputError as `epsilon` does, and where even MAX_NOISE_MULTIPLIER is not enough.
    """
    if not epsilon > 0:
        raise InputError(f"epsilon={epsilon}: it must be > 0; 1 to 8 are usual values")
    place = (sampling_rate, neighboring_relation, num_examples, max_batch_size)
    if sampling_rate == 0 or steps == 0 or epsilon == math.inf:
        _epsilon(Step(1.0, *place), steps, delta, accountant)  # the other arguments are checked all the same
        return 0.0

    def spent(sigma: float, coarsening: int = 1) -> float:
        return _epsilon(Step(sigma, *place), steps, delta, accountant, coarsening)

    # A rule of thumb to start from: the moments bound of Abadi et al. 2016, theorem 1.
    guess = sampling_rate * math.sqrt(2 * steps * math.log(1 / delta)) / epsilon if 0 < delta < 1 else 1.0
    width = 2.0
    if accountant == "pld":
        # A coarse grid overstates epsilon a little, so its answer is a start and not yet the result.
        guess, width = _smallest(functools.partial(spent, coarsening=8), epsilon, max(guess, 0.3), 2.0, 1e-3), 1.002
    sigma = _smallest(spent, epsilon, guess, width, 3e-6)
    rounded = _round_up(sigma)
    return rounded if spent(rounded) <= epsilon else sigma


def _smallest(spent: Callable[[float], float], target: float, guess: float, width: float, tolerance: float) -> float:
    """A sigma with spent(sigma) <= target, at most (1 + tolerance) times one that has not; spent falls."""
    high = min(max(guess, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)
    value_high = spent(high)
    low, value_low = high, value_high
    while value_high > target:
        if high >= MAX_NOISE_MULTIPLIER:
            raise InputError(
                f"epsilon={target} would need a noise multiplier above {MAX_NOISE_MULTIPLIER:g}, which leaves "
                "nothing to learn from: allow a larger epsilon or delta, or fewer steps"
            )
        low, value_low = high, value_high
        high = min(high * width, MAX_NOISE_MULTIPLIER)
        value_high, width = spent(high), width**2
    while value_low <= target:
        if low <= MIN_NOISE_MULTIPLIER:
            return low
        high, value_high = low, value_low
        low = max(low / width, MIN_NOISE_MULTIPLIER)
        value_low, width = spent(low), width**2
    while high > low * (1 + tolerance):
        middle = _between(low, value_low, high, value_high, target)
        value = spent(middle)
        if value <= target:
            high, value_high = middle, value
        else:
            low, value_low = middle, value
    return high


def _between(low: float, value_low: float, high: float, value_high: float, target: float) -> float:
    """A point inside (low, high): where a straight line in logarithms meets the target, but never too near an end."""
    share = 0.5
    if 0 < value_high < value_low < math.inf:
        share = math.log(value_low / target) / math.log(value_low / value_high)
    # Aiming a little past the root from either end makes both ends move; 1/100 of the interval keeps it moving.
    share += 0.01 if share < 0.5 else -0.01
    share = min(max(share, 0.01), 0.99)
    return low * (high / low) ** share


def _round_up(value: float, digits: int = 6) -> float:
    """`value` at `digits` significant digits, never below it."""
    scale = digits - 1 - math.floor(math.log10(value))
    rounded = round(value, scale)
    return rounded if rounded >= value else round(rounded + 10.0**-scale, scale)


@functools.lru_cache(maxsize=4096)
def _epsilon(step: Step, steps: int, delta: float, accountant: str, coarsening: int = 1) -> float:
    check(step, steps, delta, accountant)
    certain = _certain_epsilon(step, steps)
    if certain is not None:
        return certain
    if accountant == "rdp":
        return float(rdp_accountant(step, steps).get_epsilon(delta))
    composed = _composed_pld(step, steps, coarsening)
    return float(composed.get_epsilon_for_delta(delta - rounding_of_delta(step, steps)))


def _certain_epsilon(step: Step, steps: int) -> float | None:
    """epsilon where no accountant is needed, else None."""
    if steps == 0 or step.sampling_rate == 0 or step.noise_multiplier == math.inf:
        return 0.0
    return math.inf if step.noise_multiplier < _HOPELESS_NOISE_MULTIPLIER else None


def check(step: Step, steps: int, delta: float | None, accountant: str) -> None:
    """Refuse what has no answer, without importing dp-accounting. `delta` is None where it is what is asked for.

    Raises: InputError as `epsilon` says.
    """
    if not steps >= 0 or steps != int(steps):
        raise InputError(f"steps={steps}: it must be a whole number >= 0")
    if delta is not None and not 0 < delta < 1:
        raise InputError(f"delta={delta}: it must lie strictly between 0 and 1; below 1 / examples is usual")
    if accountant not in ACCOUNTANTS:
        raise InputError(f"accountant={accountant!r} is unknown: choose one of {', '.join(ACCOUNTANTS)}")
    if accountant == "rdp":
        _check_rdp(step)
    elif delta is not None and delta < 4 * rounding_of_delta(step, steps):
        raise InputError(
            f"delta={delta} is too small for the pld accountant over {steps} steps: double precision resolves "
            f'{4 * rounding_of_delta(step, steps):.1e} and more. Choose a larger delta, or accountant="rdp"'
        )


def _check_rdp(step: Step) -> None:
    if step.neighboring_relation == "replace_one":
        raise InputError(
            'accountant="rdp" has no analysis of Poisson sampling under neighboring_relation="replace_one": '
            'choose accountant="pld", or another relation'
        )
    if step.max_batch_size is not None:
        raise InputError(
            f'accountant="rdp" has no analysis of truncated sampling (max_batch_size={step.max_batch_size}): '
            'choose accountant="pld", or leave max_batch_size out'
        )


def _relation(step: Step) -> Any:
    from dp_accounting import NeighboringRelation as Relation

    return {
        "zero_out": Relation.REPLACE_SPECIAL,
        "add_or_remove": Relation.ADD_OR_REMOVE_ONE,
        "replace_one": Relation.REPLACE_ONE,
    }[step.neighboring_relation]


def rdp_accountant(step: Step, steps: int) -> Any:
    """dp-accounting's RDP accountant with `steps` steps in it."""
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=_relation(step))
    with without_remarks_on_orders():
        return accountant.compose(step.dp_event(steps))


@contextlib.contextmanager
def without_remarks_on_orders() -> Iterator[None]:
    """Keep the terminal free of dp-accounting's remark that an order was left out, which only loosens the bound."""
    logger = logging.getLogger("absl")

    def is_news(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in str(record.msg)

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _is_plain_gaussian(step: Step) -> bool:
    return step.sampling_rate == 1 and step.max_batch_size is None


def rounding_of_delta(step: Step, steps: int) -> float:
    """What the transforms of `steps` steps may have taken off delta, or added to it."""
    transforms = 0 if _is_plain_gaussian(step) else steps
    return _TAIL_OF_DELTA + _ROUNDING_OF_DELTA_PER_STEP * transforms


def _composed_pld(step: Step, steps: int, coarsening: int) -> Any:
    if _is_plain_gaussian(step):
        # T Gaussian steps are one with sigma / sqrt(T), exactly: nothing to transform.
        alone = Step(step.noise_multiplier / math.sqrt(steps), 1.0, step.neighboring_relation)
        return one_step_pld(alone, grid_spacing(alone) * coarsening)
    return one_step_pld(step, grid_spacing(step) * coarsening).self_compose(steps)


@functools.lru_cache(maxsize=4)
def one_step_pld(step: Step, grid: float) -> Any:
    """Pessimistic privacy loss distribution of one step, on a grid of that spacing."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    if step.max_batch_size is None:
        return pld.from_gaussian_mechanism(
            standard_deviation=step.noise_multiplier,
            sampling_prob=step.sampling_rate,
            value_discretization_interval=grid,
            neighboring_relation=_relation(step),
        )
    assert step.num_examples is not None
    return pld.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=step.num_examples,
        sampling_probability=step.sampling_rate,
        truncated_batch_size=step.max_batch_size,
        noise_multiplier=step.noise_multiplier,
        value_discretization_interval=grid,
        neighboring_relation=_relation(step),
    )


def grid_spacing(*steps: Step) -> float:
    """Spacing of the grid of privacy losses: any spacing gives an upper bound, a finer one a tighter bound.

    A fiftieth of one step's standard deviation (near q * sqrt(exp(1 / sigma^2) - 1)) puts epsilon within about
    1e-4 of its limit; at most 1e-3; and coarse enough that one step spans at most 100,000 points (a second or
    two), which binds for small noise, where epsilon is large, and for extremely small sampling rates.
    Powers of two, so that epsilon falls smoothly with the noise and no last bit of a logarithm can move it. Several
    steps that are to be composed share one grid: fine enough for each of them, as far as none gets too many points.
    """
    finest, coarsest = 1e-3, 2e-8
    for step in steps:
        sigma, q = step.noise_multiplier, step.sampling_rate
        deviation = q * math.sqrt(math.expm1(min(1 / sigma**2, 50.0)))
        shift = (1.0 if step.max_batch_size is None else 4.0) / sigma
        largest = 10 * shift + shift**2 / 2  # the loss without sampling where dp-accounting cuts the tail
        top = max(largest + math.log(q), math.log1p(q * math.expm1(min(largest, 50.0))))
        finest, coarsest = min(finest, deviation / 50), max(coarsest, 2 * top / 50_000)
    return 2.0 ** math.floor(math.log2(max(finest, coarsest)))
