"""The plan of a run as lines of text: what `dpscale plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpscale.batching import BatchLayout, run_layout
from dpscale.config import RunConfig
from dpscale.errors import InputError
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.shown import shown_epsilon
from dpscale.sampling import PoissonSampler

CURVE_POINTS = 5


def plan_lines(config: RunConfig, *, measure: bool) -> Iterator[str]:
    """Yield the plan line by line, as it becomes known.

    Args:
        measure: also compile the step functions and time them on rows of zeros; reads no training example.
    """
    source = training_source(config)
    plan = PrivacyPlan.from_config(config, num_examples=len(source))
    yield from _privacy_lines(plan)
    physical = config.performance.physical_batch_size
    if measure:
        yield from _measured_lines(config, plan, source)
    elif physical != "auto":
        waste = run_layout(config, plan, physical, 1).expected_padding_waste(_any_sampler(plan))
        yield f"padding           {waste:.1%} of all rows on one device, expected"
        yield from _constant_time_lines(config, plan, physical, 1)


def training_source(config: RunConfig) -> Any:
    """The ExampleSource that data.train names; of it only the size and the metadata are for showing.

    Raises: InputError where none is named, or it cannot be opened.
    """
    from dpscale.data.open import open_source
    from dpscale.data.options import SourceOptions
    from dpscale.data.users import by_user

    data = config.data
    if not data.train:
        raise InputError("data.train is not set: name a data set in the config")
    return by_user(config, open_source(data.train, SourceOptions.from_config(data)))


def _groups(plan: PrivacyPlan) -> str:
    if plan.clip_groups is None:
        return ""
    return " in all; per group: " + ", ".join(f"{pattern} {norm:g}" for pattern, norm in plan.clip_groups)


def _privacy_lines(plan: PrivacyPlan) -> Iterator[str]:
    if plan.max_examples_per_user is None:
        yield f"examples          {plan.num_examples}, unit of privacy: one {plan.unit}"
    else:
        most = plan.max_examples_per_user
        yield f"users             {plan.num_examples}, unit of privacy: one user, with at most {most} records"
    yield f"sampling rate q   {plan.sampling_rate:.6g} (Poisson; expected batch {plan.expected_batch_size:g})"
    epochs = plan.steps * plan.sampling_rate
    yield f"steps             {plan.steps} ({epochs:.1f} epochs expected)"
    if not plan.enabled:
        yield "privacy           none (privacy.enabled = false)"
        return
    yield f"clip norm         {plan.clip_norm:g}{_groups(plan)}"
    yield f"noise multiplier  {plan.noise_multiplier:.4f} (std {plan.noise_stddev:.4g} on the sum)"
    assert plan.delta is not None
    points = sorted({max(1, round(plan.steps * k / CURVE_POINTS)) for k in range(1, CURVE_POINTS + 1)})
    curve = zip(points, plan.epsilon_curve(points), strict=True)
    yield f"epsilon           at delta {plan.delta:g}, {plan.neighboring_relation}, {plan.accountant}"
    yield from (f"  after step {step:<6} {shown_epsilon(epsilon)}" for step, epsilon in curve)
    if plan.replay_reserve:
        spent = plan.epsilon_after(plan.chargeable_steps)
        yield f"replay reserve    {plan.replay_reserve} steps on top: {shown_epsilon(spent)} if all are charged,"
        yield "                  which is what a release before the planned end states"
    yield from (f"warning           {warning}" for warning in plan.warnings)


def _measured_lines(config: RunConfig, plan: PrivacyPlan, source) -> Iterator[str]:
    from dpscale.estimate import estimate

    found = estimate(config, plan, source)
    yield f"model             {found.num_parameters:,} parameters"
    yield f"devices           {found.num_devices} x {found.device_kind}"
    rows = f"{found.physical_batch_size} rows on each device"
    yield f"accumulations     {found.accumulations:.2f} a step expected, of {rows}"
    yield f"padding           {found.padding_waste:.1%} of all rows, expected"
    yield from _constant_time_lines(config, plan, found.physical_batch_size, found.num_devices)
    mebibytes = [f"{n / 2**20:.1f}" for n in (found.state_bytes, found.temporary_bytes, found.data_bytes)]
    yield "memory per device {} MiB state, {} MiB temporary, {} MiB data".format(*mebibytes)
    total = plan.steps * found.step_s
    yield f"time              {found.step_s:.3g} s a step, {total:.0f} s in all here (measured on made-up rows)"


def _constant_time_lines(config: RunConfig, plan: PrivacyPlan, physical: int, num_devices: int) -> Iterator[str]:
    """What privacy.constant_time costs; nothing without it."""
    if not config.privacy.constant_time:
        return
    sampler = _any_sampler(plan)
    padded, plain = run_layout(config, plan, physical, num_devices), BatchLayout(physical, num_devices)
    with_it, without = padded.expected_padding_waste(sampler), plain.expected_padding_waste(sampler)
    more = (1 - without) / (1 - with_it) - 1
    yield (
        f"constant time     {padded.accumulations(0)} accumulations every step: {more:.1%} more rows than without "
        f"privacy.constant_time (padding {with_it:.1%} instead of {without:.1%})"
    )


def _any_sampler(plan: PrivacyPlan) -> PoissonSampler:
    """The key enters no figure here: any sampler of this size and rate draws as many examples."""
    return PoissonSampler(plan.num_examples, plan.sampling_rate, bytes(32), plan.max_batch_size)
