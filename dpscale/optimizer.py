"""The optax optimizer and learning rate schedule that a config names."""

from __future__ import annotations

import optax

from dpscale.config import OptimizerSection
from dpscale.errors import InputError


def learning_rate_schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warm-up from 0 to the peak, then the named decay.

    The decay is at its end once all `steps` are done, so that the last step still moves where it ends at 0.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup and warmup >= steps:
        raise InputError(
            f"optimizer.warmup_steps={warmup} is not below the run's {steps} steps: the peak would never be reached. "
            "Choose fewer, or train longer"
        )
    decay_steps = max(1, steps - warmup)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_fraction, decay_steps)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """The optimizer of `config`; it sees only noised gradients, and its weight decay is decoupled from them."""
    rate = learning_rate_schedule(config, steps)
    if config.name == "sgd":
        return optax.sgd(rate, momentum=config.momentum or None, nesterov=bool(config.nesterov))
    b1 = 0.9 if config.beta1 is None else config.beta1
    b2 = 0.999 if config.beta2 is None else config.beta2
    if config.name == "adam":
        return optax.adam(rate, b1, b2, eps=config.eps or 1e-8)
    decay = config.weight_decay or 0.0
    if config.name == "adamw":
        return optax.adamw(rate, b1, b2, eps=config.eps or 1e-8, weight_decay=decay)
    return optax.lamb(rate, b1, b2, eps=config.eps or 1e-6, weight_decay=decay)
