"""PrivacyPlan: the one object from which sampler, clipping, noise, divisor and accountant take their numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpscale.errors import InputError, RunDirectoryError
from dpscale.privacy import accounting
from dpscale.privacy.accounting import Accountant
from dpscale.privacy.sensitivity import (
    NeighboringRelation,
    check_neighboring_relation,
    flat_norm_bound,
    noise_unit,
    per_group_norm_bound,
)

if TYPE_CHECKING:
    from dpscale.config import RunConfig
    from dpscale.sections import PrivacySection

SCHEMA_VERSION = 1
# Fields younger than the first plans: a file may lack them, and at these values the digest leaves them out.
ADDED: dict[str, Any] = {"replay_reserve": 0, "max_examples_per_user": None, "clip_groups": None}
# Noise of a much smaller standard deviation would be flushed to zero in float32; squares of larger norms overflow.
MIN_CLIP_NORM, MAX_CLIP_NORM = 1e-12, 1e12


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is promised, fixed before the first step and never changed after it.

    Guarantees: everything is computed once from one config and one number of examples; sampler, noise, divisor
    and accountant read the same fields, so what is accounted is what ran. Nothing here depends on the physical
    batch, the accumulation, the number of processes, or the realised batch sizes.

    Edge cases: with `enabled` False the sampler is the same, `clip_norm` is None (no clipping),
    `noise_multiplier` 0 and epsilon inf.

    Raises: InputError for values out of range, whichever way the plan is made.
    """

    num_examples: int
    """Size of the training set, counted in `unit`; public under zero_out."""
    sampling_rate: float
    """q, each example's probability to be in a logical batch, independently of all else."""
    steps: int
    """Planned logical steps, T."""
    expected_batch_size: float
    """q * N when the plan was made: the public divisor of the noisy sum."""
    noise_multiplier: float
    """Standard deviation of the noise over one record's norm bound."""
    clip_norm: float | None
    """Bound on the norm of one record's contribution to the sum."""
    delta: float | None
    epsilon_target: float | None
    """The epsilon that the noise multiplier was calibrated to; None when the multiplier was given."""
    max_batch_size: int | None = None
    """Larger draws are cut to a uniform subset of this size (truncated Poisson); None: never."""
    replay_reserve: int = 0
    """Steps beyond the planned ones that the calibration leaves room for: new attempts are charged on top."""
    bound: str = "flat"
    """"flat": longer gradients are cut to clip_norm; "normalized": all are scaled to nearly it; "per_group": each group
    is cut to its own norm, and clip_norm is sqrt(sum of their squares). All bound by clip_norm."""
    clip_groups: tuple[tuple[str, float], ...] | None = None
    """per_group: (pattern of parameter paths, norm), in the order in which they are tried."""
    unit: str = "example"
    """What one record is; "user": all that `max_examples_per_user` lets in of one user's records."""
    max_examples_per_user: int | None = None
    neighboring_relation: NeighboringRelation = "zero_out"
    accountant: Accountant = "pld"
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "expected_batch_size", "noise_multiplier"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("clip_norm", "delta", "epsilon_target"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        if self.clip_groups is not None:
            try:
                groups = tuple((str(pattern), float(norm)) for pattern, norm in self.clip_groups)
            except (TypeError, ValueError) as error:
                raise InputError(f"clip_groups={self.clip_groups}: each is a pattern and a norm") from error
            object.__setattr__(self, "clip_groups", groups)
        _check_sizes(self.num_examples, self.steps, self.expected_batch_size, self.sampling_rate)
        check_neighboring_relation(self.neighboring_relation)
        if self.replay_reserve < 0:
            raise InputError(f"replay_reserve={self.replay_reserve}: give 0 steps or more")
        if not self.enabled:
            return
        if self.clip_norm is None or self.delta is None:
            raise InputError("privacy is enabled: it needs privacy.clip_norm and privacy.delta")
        if self.epsilon_target is not None and not self.epsilon_target > 0:
            raise InputError(f"epsilon={self.epsilon_target}: it must be > 0; 1 to 8 are usual values")
        if not MIN_CLIP_NORM <= flat_norm_bound(self.clip_norm) <= MAX_CLIP_NORM:
            raise InputError(
                f"clip_norm={self.clip_norm:g}: float32 noise of that size could vanish or overflow; choose one from "
                f"{MIN_CLIP_NORM:g} to {MAX_CLIP_NORM:g}"
            )
        self._check_groups()
        # Twice the steps: replayed ones must not bring delta below what the accountant can resolve.
        accounting.check(self.accounted_step, 2 * self.chargeable_steps, self.delta, self.accountant)

    @classmethod
    def from_config(cls, config: RunConfig, *, num_examples: int, cached: PrivacyPlan | None = None) -> PrivacyPlan:
        """Make the plan of a config, calibrating the noise multiplier where an epsilon is given.

        `cached` is a plan made before, as from the run directory: its noise multiplier is used again where it was
        calibrated for the same question and still keeps within epsilon.

        Raises: InputError for values out of range, missing, given twice, or that the accountant has no analysis of.
        """
        privacy = config.privacy
        rate, expected = _rate_and_expected_batch_size(privacy, num_examples)
        if privacy.constant_time and privacy.max_batch_size is None:
            raise InputError(
                "privacy.constant_time=true but privacy.max_batch_size is not set: a constant number of accumulations "
                f"needs a largest batch. Set privacy.max_batch_size={suggested_cap(rate, expected)} (4.5 standard "
                "deviations above the mean, which costs nearly no epsilon)"
            )
        common: dict[str, Any] = {
            "num_examples": num_examples,
            "sampling_rate": rate,
            "expected_batch_size": expected,
            "steps": _steps(config.training, rate),
            "max_batch_size": privacy.max_batch_size,
            "replay_reserve": privacy.replay_reserve,
            "bound": privacy.bound,
            "clip_groups": tuple(privacy.clip_groups.items()) if privacy.clip_groups else None,
            "unit": privacy.unit,
            "max_examples_per_user": privacy.max_examples_per_user,
            "neighboring_relation": privacy.neighboring_relation,
            "accountant": privacy.accountant,
            "enabled": privacy.enabled,
        }
        if not privacy.enabled:
            return cls(**common, noise_multiplier=0.0, clip_norm=None, delta=None, epsilon_target=None)
        if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
            seen = "neither is" if privacy.epsilon is None else "both are"
            raise InputError(f"privacy.epsilon or privacy.noise_multiplier: {seen} given; give exactly one")
        plan = cls(
            **common,
            noise_multiplier=privacy.noise_multiplier or 0.0,
            clip_norm=per_group_norm_bound(privacy.clip_groups.values()) if privacy.clip_groups else privacy.clip_norm,
            delta=privacy.delta,
            epsilon_target=privacy.epsilon,
        )
        return plan if privacy.epsilon is None else plan._calibrated(cached)

    def _check_groups(self) -> None:
        """Raise InputError unless the groups' norms are those that clip_norm, and so the noise, was made from."""
        if (self.bound == "per_group") != (self.clip_groups is not None):
            raise InputError(f"bound={self.bound} with clip_groups={self.clip_groups}: per_group needs them, no other")
        if self.clip_groups is None:
            return
        total = per_group_norm_bound(norm for _, norm in self.clip_groups)
        if not math.isclose(total, self.clip_norm or 0.0, rel_tol=1e-12):
            raise InputError(
                f"clip_norm={self.clip_norm} but the groups' norms make {total}: the noise would not fit what is "
                "clipped. Leave clip_norm to the groups"
            )

    def _calibrated(self, cached: PrivacyPlan | None) -> PrivacyPlan:
        assert self.epsilon_target is not None
        if cached is not None:
            # The norm bound scales the noise and the unit names it; neither enters the calibration.
            again = dataclasses.replace(
                cached,
                noise_multiplier=0.0,
                unit=self.unit,
                max_examples_per_user=self.max_examples_per_user,
                clip_norm=self.clip_norm,
                bound=self.bound,
                clip_groups=self.clip_groups,
            )
            reused = dataclasses.replace(self, noise_multiplier=cached.noise_multiplier)
            # Checked, since the file may have been edited; the room is for other machines' last bits.
            if again == self and reused.epsilon_after(reused.chargeable_steps) <= self.epsilon_target * (1 + 1e-9):
                return reused
        sigma = accounting.noise_multiplier(
            epsilon=self.epsilon_target,
            delta=self._delta,
            steps=self.chargeable_steps,
            sampling_rate=self.sampling_rate,
            accountant=self.accountant,
            neighboring_relation=self.neighboring_relation,
            num_examples=self.num_examples,
            max_batch_size=self.max_batch_size,
        )
        return dataclasses.replace(self, noise_multiplier=sigma)

    @property
    def chargeable_steps(self) -> int:
        """Steps, replayed ones included, that keep to `epsilon_target` where there is one: T + replay_reserve."""
        return self.steps + self.replay_reserve

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise added to each coordinate of the SUM of clipped gradients."""
        return 0.0 if self.clip_norm is None else self.noise_multiplier * noise_unit(self.clip_norm)

    def epsilon_after(self, steps: int) -> float:
        """Upper bound on epsilon once `steps` steps were charged, replayed ones included; may exceed the plan's.

        Before the planned end it is the epsilon of a stop decided in advance.
        Edge cases: 0 steps give 0; without privacy or noise, inf.
        """
        if not self.enabled:
            return math.inf if steps > 0 else 0.0
        return accounting.epsilon(
            steps=steps,
            delta=self._delta,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            accountant=self.accountant,
            neighboring_relation=self.neighboring_relation,
            num_examples=self.num_examples,
            max_batch_size=self.max_batch_size,
        )

    def epsilon_curve(self, steps: Sequence[int]) -> list[float]:
        """`epsilon_after` each of several step counts; about 20 ms each at the quickstart's settings."""
        return [self.epsilon_after(count) for count in steps]

    def last_step(self, attempt_start: int, charged_before: int, promised: int | None = None) -> int:
        """Where an attempt from step `attempt_start` ends, when earlier ones were charged `charged_before` steps.

        The planned steps, less what the earlier attempts used up of an allowed epsilon and of `replay_reserve`, and of
        the `promised` steps that the card of a released model covers.
        """
        allowed = [promised, None if self.epsilon_target is None else self.chargeable_steps]
        left = [max(0, steps - charged_before) for steps in allowed if steps is not None]
        return min([self.steps, *(attempt_start + steps for steps in left)])

    def dp_event(self, steps: int) -> Any:
        """The dp-accounting DpEvent of `steps` steps, for any accountant that reads those."""
        if not self.enabled:
            from dp_accounting import dp_event

            return dp_event.NonPrivateDpEvent()
        return self.accounted_step.dp_event(steps)

    @property
    def warnings(self) -> list[str]:
        """What is allowed but should be read once before the run; empty for most plans."""
        if not self.enabled:
            return []
        found = []
        if self._delta > 1 / self.num_examples:
            found.append(
                f"delta={self._delta:g} is above 1/{self.num_examples}: publishing one record outright, chosen at "
                f"random, would satisfy it. Choose privacy.delta below {1 / self.num_examples:.1e}"
            )
        if self.noise_multiplier == 0:
            found.append("noise_multiplier=0: no noise, no guarantee. Set privacy.epsilon or more noise")
        if self.max_batch_size is not None and self.max_batch_size < self.expected_batch_size:
            found.append(
                f"max_batch_size={self.max_batch_size} is below the expected batch size "
                f"({self.expected_batch_size:g}): most draws are cut while the divisor stays. Choose a larger one"
            )
        if self.neighboring_relation == "add_or_remove":
            found.append(
                f"neighboring_relation=add_or_remove, but the plan (q, divisor, steps) was made from the "
                f"{self.num_examples} examples and shows their number: the guarantee holds for the plan as given. "
                "zero_out says so openly"
            )
        return found

    def to_json(self) -> str:
        """The plan as indented JSON with its schema version; `from_json` gives back an equal plan."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrivacyPlan:
        """Read what `to_json` wrote.

        Raises: RunDirectoryError for another schema version, missing or unknown keys, or wrong types; InputError
        for values out of range.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(f"the plan is not valid JSON ({error}): {_RESTORE}") from None
        if not isinstance(values, dict) or values.pop("schema_version", None) != SCHEMA_VERSION:
            raise RunDirectoryError(
                f"the plan does not say schema_version {SCHEMA_VERSION}, the one that this version of dpscale reads: "
                "use the version that wrote it, or start a new run"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        odd = ", ".join(sorted(names - set(values) - set(ADDED) | set(values) - names))
        if odd:
            raise RunDirectoryError(f"the plan lacks keys or has unknown ones ({odd}): {_RESTORE}")
        for name, value in values.items():
            if not _has_type(name, value):
                raise RunDirectoryError(f"the plan has {name}={value!r}, of the wrong type: {_RESTORE}")
        try:
            return cls(**values)
        except OverflowError as error:
            raise RunDirectoryError(f"the plan has a number that is too large ({error}): {_RESTORE}") from error

    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON, 64 hexadecimal digits; equal plans and only they share it."""
        fields = dataclasses.asdict(self).items()
        values = {name: value for name, value in fields if name not in ADDED or value != ADDED[name]}
        values["schema_version"] = SCHEMA_VERSION
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, new: PrivacyPlan) -> list[str]:
        """'key: old -> new' for every field of `new` that is not this plan's; empty when they are equal."""
        pairs = [(f.name, getattr(self, f.name), getattr(new, f.name)) for f in dataclasses.fields(self)]
        return [f"{name}: {old} -> {now}" for name, old, now in pairs if old != now]

    @property
    def accounted_step(self) -> accounting.Step:
        return accounting.Step(
            self.noise_multiplier,
            self.sampling_rate,
            self.neighboring_relation,
            self.num_examples,
            self.max_batch_size,
        )

    @property
    def _delta(self) -> float:
        assert self.delta is not None
        return self.delta


def suggested_cap(sampling_rate: float, expected_batch_size: float) -> int:
    """A batch size that a draw passes about 3 times in a million: 4.5 standard deviations above the mean."""
    return math.ceil(expected_batch_size + 4.5 * math.sqrt(expected_batch_size * (1 - sampling_rate)))


_RESTORE = "restore plan.json from a copy, or start a new run"
_TYPES: dict[str, tuple[type, ...]] = {
    "num_examples": (int,),
    "steps": (int,),
    "max_batch_size": (int, type(None)),
    "replay_reserve": (int,),
    "max_examples_per_user": (int, type(None)),
    "enabled": (bool,),
    "bound": (str,),
    "clip_groups": (list, type(None)),
    "unit": (str,),
    "neighboring_relation": (str,),
    "accountant": (str,),
    "clip_norm": (int, float, type(None)),
    "delta": (int, float, type(None)),
    "epsilon_target": (int, float, type(None)),
}


def _has_type(name: str, value: object) -> bool:
    types = _TYPES.get(name, (int, float))
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _rate_and_expected_batch_size(privacy: PrivacySection, num_examples: int) -> tuple[float, float]:
    if num_examples < 1:
        raise InputError("the training set is empty: private training needs at least one example")
    expected, rate = privacy.expected_batch_size, privacy.sampling_rate
    if (expected is None) == (rate is None):
        seen = "neither is" if rate is None else "both are"
        raise InputError(f"privacy.expected_batch_size or privacy.sampling_rate: {seen} given; give exactly one")
    if expected is None:
        assert rate is not None
        return float(rate), float(rate) * num_examples
    if expected > num_examples:
        raise InputError(
            f"expected_batch_size={expected:g} is larger than the data set ({num_examples} examples): choose at "
            f"most {num_examples}, or set privacy.sampling_rate"
        )
    return expected / num_examples, float(expected)


def _steps(training: Any, sampling_rate: float) -> int:
    if (training.steps is None) == (training.epochs is None):
        seen = "neither is" if training.steps is None else "both are"
        raise InputError(f"training.steps or training.epochs: {seen} given; give exactly one")
    if training.steps is not None:
        return training.steps
    if not 0 < training.epochs < math.inf or not sampling_rate > 0:
        raise InputError(f"epochs={training.epochs}: it must be > 0, and so must the sampling rate")
    # 9 / 0.009 is 1000.0000000000001 in floating point: a last bit must not buy a whole step.
    return max(1, math.ceil(training.epochs / sampling_rate * (1 - 1e-12)))


def _check_sizes(num_examples: int, steps: int, expected_batch_size: float, sampling_rate: float) -> None:
    if num_examples < 1:
        raise InputError("the training set is empty: private training needs at least one example")
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate={sampling_rate}: it must lie above 0 and at most at 1")
    if not 0 < expected_batch_size < math.inf:
        raise InputError(f"expected_batch_size={expected_batch_size}: it must be above 0; it divides the sum")
    if steps < 1:
        raise InputError(f"steps={steps}: a run makes at least one step; set training.steps or training.epochs")
