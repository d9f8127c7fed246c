"""TrainState: all that a step changes, and all that a checkpoint holds; Statistics: what a step tells beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpscale.errors import InputError


class Statistics(NamedTuple):
    """Sums over the logical batch and over devices. All but the two requests are sensitive (PRIVACY.md 34).

    They ride at the end of the reduced vector, past the elements that get noise.
    """

    examples: Any  # rows that were drawn
    clipped: Any  # rows whose norm was above the bound
    nonfinite: Any  # rows left out because their loss or gradient was not finite
    loss: Any  # sum of losses over the finite rows
    norm: Any  # sum of gradient norms over the finite rows
    stop: Any  # devices whose process asks for a stop
    save: Any  # devices whose process asks for a checkpoint
    groups: Any = ()  # with metrics.group_norms: see `clipping.groups.NormGroups.sums`

    @classmethod
    def of(cls, riders: Any) -> Statistics:
        """From the end of the reduced vector, f32[RIDERS + those of groups], on the host."""
        values = [float(value) for value in riders]
        return cls(*values[:RIDERS], groups=tuple(values[RIDERS:]))


RIDERS = 7
"""How many numbers ride in every step's reduction; those of groups come after them."""


class OptimizerShards(NamedTuple):
    """The optimizer's state where its arrays are cut over the devices (`placement.Placement`).

    `direction`: its arrays are vectors as long as the flattened, padded parameters, one shard on each device;
    `scaling`: counters, the same on every device.
    """

    direction: Any
    scaling: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A frozen pytree.

    Attributes:
        step: int32 scalar, logical steps done; the next step to run has this number.
        params: the trainable parameters, float leaves.
        opt_state: optax's state, or `OptimizerShards`.
        ema: moving average of the parameters, float32 leaves of their shapes; None where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @classmethod
    def create(cls, params: Any, optimizer: Any) -> TrainState:
        """The state before step 0, without an average.

        Args:
            optimizer: an optax transformation, or an `optimizer.Optimizer`.

        Raises: InputError for a leaf that cannot be trained (`check_trainable`).
        """
        check_trainable(params)
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def check_trainable(params: Any) -> None:
    """Raise InputError for a leaf that is not a float of at most 32 bits, or has no elements."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize > 4 or leaf.size == 0:
            raise InputError(
                f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}: every parameter is "
                "trained, so it must be a non-empty float of at most 32 bits; keep other values in the loss"
            )


def moved_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of the parameters once `params`, which step `step` made, are in it.

    average: float32 leaves. decay: of the steps far from the start; step t takes min(decay, (1 + t) / (10 + t)), so
    that the initial weights are forgotten soon (TensorFlow's ExponentialMovingAverage with num_updates; De et al. 2022,
    arXiv 2204.13650, section 3.2 average this way). It sees parameters only, which only noised gradients have moved.
    """
    count = step.astype(jnp.float32)
    kept = jnp.minimum(jnp.float32(decay), (1 + count) / (10 + count))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new.astype(jnp.float32), average, params)
