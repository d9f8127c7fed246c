"""The optax optimizer and learning rate schedule that a config names."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from dpscale.errors import InputError
from dpscale.sections import OptimizerSection


def learning_rate_schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warm-up to the peak, then the named decay.

    Step t of a warm-up of W steps has the rate peak (t + 1) / W: every step is charged, so none may stand still. The
    decay begins at step W and is at its end once all steps are done, so that the last one still moves too.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup and warmup >= steps:
        raise InputError(
            f"optimizer.warmup_steps={warmup} is not below the run's {steps} steps: it would end within its "
            "warm-up. Choose fewer, or train longer"
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
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), decay], [warmup])


class Optimizer(NamedTuple):
    """An optax optimizer in two parts, so that the first, which holds every array of the state, can work on shards.

    direction: element by element (moments, weight decay): any part of the flattened parameters may be given to it.
    scaling: the rest, for whole leaves: learning rate and, for lamb, the ratio of the leaves' norms. Its state holds
    no array beyond a counter.

    `init` and `update` are those of the two in a chain: `init(params)`, `update(gradient, state, params)`.
    """

    direction: optax.GradientTransformation
    scaling: optax.GradientTransformation

    def init(self, params: Any) -> tuple[Any, Any]:
        """(state of `direction`, state of `scaling`)."""
        return self.direction.init(params), self.scaling.init(params)

    def update(self, updates: Any, state: tuple[Any, Any], params: Any = None) -> tuple[Any, tuple[Any, Any]]:
        """(what is added to the parameters, the new state)."""
        updates, direction = self.direction.update(updates, state[0], params)
        updates, scaling = self.scaling.update(updates, state[1], params)
        return updates, (direction, scaling)


def make_optimizer(config: OptimizerSection, steps: int) -> Optimizer:
    """The optimizer of `config`; it sees only noised gradients, and its weight decay is decoupled from them."""
    rate = optax.scale_by_learning_rate(learning_rate_schedule(config, steps))
    if config.name == "sgd":
        momentum = optax.trace(config.momentum, bool(config.nesterov)) if config.momentum else optax.identity()
        return Optimizer(momentum, rate)
    b1 = 0.9 if config.beta1 is None else config.beta1
    b2 = 0.999 if config.beta2 is None else config.beta2
    moments = optax.scale_by_adam(b1, b2, eps=config.eps or (1e-6 if config.name == "lamb" else 1e-8))
    if config.name == "adam":
        return Optimizer(moments, rate)
    decayed = optax.chain(moments, optax.add_decayed_weights(config.weight_decay or 0.0))
    if config.name == "adamw":
        return Optimizer(decayed, rate)
    return Optimizer(decayed, optax.chain(optax.scale_by_trust_ratio(), rate))
