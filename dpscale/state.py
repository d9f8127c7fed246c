"""TrainState: all that a step changes, and all that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpscale.errors import InputError


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
        """The state before step 0.

        Raises: InputError for a leaf that cannot be trained: not a float of at most 32 bits, or without elements.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            leaf = jnp.asarray(leaf)
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize > 4 or leaf.size == 0:
                raise InputError(
                    f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}: every parameter is "
                    "trained, so it must be a non-empty float of at most 32 bits; keep other values in the loss"
                )
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
