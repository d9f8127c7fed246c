"""Restoring a checkpoint into the placement that a run has now, whichever it was saved from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from dpscale.checkpoint import SHARDS, Checkpoints
from dpscale.placement import Placement
from dpscale.state import TrainState


def restore(checkpoints: Checkpoints, step: int, placement: Placement, params: Any) -> TrainState:
    """The state of `step`, laid as `placement` says: on any number of devices, from whole or cut optimizer state.

    Args:
        params: arrays or shapes of the run's parameters.

    Edge cases: an average that the checkpoint lacks begins at the restored parameters; one that is not wanted is left.
    Raises: RunDirectoryError when the checkpoint holds another model or optimizer.
    """
    held = checkpoints.contents(step)
    lengths = {array.shape[0] for array in jax.tree.leaves(held.get(SHARDS)) if len(array.shape) == 1}
    old = replace(placement, sharded=SHARDS in held, average="ema" in held, size=max(lengths, default=None))
    return placement.moved(checkpoints.restore(step, old.abstract(params)), old)
