"""TrainState: all that a step changes, and all that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A frozen pytree.

    Attributes:
        step: int32 scalar, logical steps done; the next step to run has this number.
        params: the trainable parameters, float leaves.
        opt_state: optax's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before step 0."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
