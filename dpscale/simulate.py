"""A cheap run with the dynamics of an expensive one: the same noise for each example of the batch, a smaller batch.

What training sees of the noise is its standard deviation over the batch size, sigma C / B. Kept constant, with the same
steps and learning rate, a small batch trains nearly as a large one does, at a fraction of the work; its privacy is far
worse. So hyper-parameters can be searched at the small batch, on data that need no protection. Source: Sander, Stock
and Sablayrolles 2023, "TAN Without a Burn: Scaling Laws of DP-SGD", arXiv 2210.03403, sections 4 and 5.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence

from dpscale.config import UNSET, RunConfig
from dpscale.errors import InputError
from dpscale.plan_text import training_source
from dpscale.privacy.plan import PrivacyPlan, suggested_cap


def simulation_lines(config: RunConfig, at: str, given: Sequence[str]) -> Iterator[str]:
    """Yield what `dpscale plan CONFIG --simulate-at batch=N` prints.

    Args:
        at: "batch=N", the expected batch size of the cheap run.
        given: the config's file and the overrides that it was read with, for the command line that is printed.

    Raises: InputError for another form of `at`, a batch that is not below the config's, or a run without noise.
    """
    plan = PrivacyPlan.from_config(config, num_examples=len(training_source(config)))
    batch = batch_of(at, plan)
    small = simulated(plan, batch)
    overrides = simulation_overrides(config, small)
    yield f"noise-to-batch    {plan.noise_multiplier / plan.expected_batch_size:.4g}, kept (sigma / B)"
    less = plan.expected_batch_size / batch
    yield f"batch             {plan.expected_batch_size:g} -> {batch:g}, {less:.1f} x less work"
    yield f"noise multiplier  {plan.noise_multiplier:.4g} -> {small.noise_multiplier:.4g}"
    yield f"steps             {plan.steps}, kept"
    yield f"learning rate     {config.optimizer.learning_rate:g}, kept, as are schedule, clip norm and all else"
    yield "command           " + shlex.join(
        ["dpscale", "train", *given, *overrides, "--run-dir", f"runs/{config.run.name}-batch-{batch:g}"]
    )
    yield (
        f"epsilon           {small.epsilon_after(small.steps):.4g} at delta {small.delta:g} for the cheap run, against "
        f"{plan.epsilon_after(plan.steps):.4g} for the run that it stands for"
    )
    yield (
        "warning           the cheap run hardly protects its data: search on public or made-up data of the same kind. "
        "On private data every cheap run spends its own, much worse epsilon, whatever the final run's is"
    )
    yield "source            constant noise-to-batch ratio: Sander et al. 2023, arXiv 2210.03403"


def batch_of(at: str, plan: PrivacyPlan) -> float:
    """The batch size that "batch=N" names.

    Raises: InputError unless 1 <= N < the plan's expected batch size, and the plan has noise.
    """
    name, _, text = at.partition("=")
    try:
        batch = float(text)
    except ValueError:
        batch = math.nan
    if name.strip() != "batch" or not batch >= 1:
        raise InputError(f"--simulate-at {at}: write batch=N with N from 1, for example --simulate-at batch=256")
    if not batch < plan.expected_batch_size:
        raise InputError(
            f"--simulate-at {at}: the config's expected batch is {plan.expected_batch_size:g}; a simulation is cheaper "
            "only below it"
        )
    if not plan.enabled or plan.noise_multiplier == 0:
        raise InputError("--simulate-at keeps the noise-to-batch ratio, but this config adds no noise: enable privacy")
    return batch


def simulated(plan: PrivacyPlan, batch: float) -> PrivacyPlan:
    """The plan of the cheap run: batch and noise multiplier scaled down alike, the same steps and clip norm."""
    rate = batch / plan.num_examples
    return dataclasses.replace(
        plan,
        sampling_rate=rate,
        expected_batch_size=batch,
        noise_multiplier=plan.noise_multiplier * batch / plan.expected_batch_size,
        epsilon_target=None,
        max_batch_size=None if plan.max_batch_size is None else suggested_cap(rate, batch),
        replay_reserve=0,
    )


def simulation_overrides(config: RunConfig, small: PrivacyPlan) -> list[str]:
    """The overrides that make the plan of `config` the plan `small`."""
    privacy = config.privacy
    overrides = [
        f"privacy.noise_multiplier={small.noise_multiplier!r}",
        f"privacy.expected_batch_size={small.expected_batch_size!r}",
        f"training.steps={small.steps}",
    ]
    taken = {"privacy.epsilon": privacy.epsilon, "privacy.sampling_rate": privacy.sampling_rate}
    taken["training.epochs"] = config.training.epochs
    overrides += [f"{key}={UNSET}" for key, value in taken.items() if value is not None]
    if privacy.replay_reserve:
        overrides.append(f"privacy.replay_reserve={UNSET}")
    if small.max_batch_size is not None:
        overrides.append(f"privacy.max_batch_size={small.max_batch_size}")
    return overrides
