"""An optimizer that shows the noisy gradient that it was given: all that a step releases of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpscale.mesh import replicated
from dpscale.optimizer import Optimizer
from dpscale.placement import Placement, join
from dpscale.state import TrainState


class Observed(NamedTuple):
    """State of an observing `direction`: `inner` is the optimizer's own; `gradient` lies as the placement has it."""

    inner: Any
    gradient: Any


def observing(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, whose state also holds the gradient of the last step."""

    def init(params: Any) -> Observed:
        return Observed(optimizer.direction.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Observed, params: Any = None) -> tuple[Any, Observed]:
        own, inner = optimizer.direction.update(updates, state.inner, params)
        return own, Observed(inner, updates)

    return Optimizer(optax.GradientTransformation(init, update), optimizer.scaling)  # pyright: ignore[reportArgumentType]


def standing_still() -> Optimizer:
    """Observes, and moves nothing."""
    return observing(Optimizer(optax.identity(), optax.set_to_zero()))


def gradient_reader(placement: Placement, count: int) -> Callable[[TrainState], jax.Array]:
    """A function from a state to the first `count` elements of the gradient of its last step, in flattening order.

    placement: of an observing optimizer. The result is float32[count], whole on every device; where the gradient lies
    in shards, all processes must call it together.
    """
    read = jax.jit(lambda gradient: join(gradient)[:count], out_shardings=replicated(placement.mesh))
    return lambda state: read(state.opt_state[0].gradient)
