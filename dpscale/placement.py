"""Where the training state lies: whole on every device, or the optimizer's arrays cut into one shard a device.

The shards are of one vector: all parameters' elements in flattening order, so that a place in it is the global
element index that the noise counts by; then room for the step's statistics; then zeros up to equal parts. The
parameters themselves, and their average, are whole on every device either way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpscale.mesh import DATA_AXIS, place_replicated, replicated
from dpscale.optimizer import Optimizer
from dpscale.state import RIDERS, OptimizerShards, TrainState, check_trainable


def count_elements(tree: Any) -> int:
    """Elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def vector_size(params: Any, devices: int, group_sums: int = 0) -> int:
    """Length of the vector that is cut into one equal shard for each device."""
    shard = -(-(count_elements(params) + RIDERS + group_sums) // devices)
    return shard * devices


def join(tree: Any, size: int | None = None) -> jax.Array:
    """All elements end to end, in flattening order: float32[size], zeros past the last; by default no longer."""
    flat = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])
    return flat if size is None else jnp.pad(flat, (0, size - flat.size))


def cut(flat: jax.Array, like: Any) -> Any:
    """The leaves that `join` made a vector of, with the shapes and dtypes of `like`; what lies past them is left."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in leaves])
    parts = jnp.split(flat[: ends[-1]], ends[:-1])
    shaped = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def shard_specs(opt_state: Any) -> Any:
    """The PartitionSpec of each leaf of `OptimizerShards`: vectors are cut, counters are on every device."""
    return jax.tree.map(lambda leaf: PartitionSpec(DATA_AXIS) if leaf.ndim == 1 else PartitionSpec(), opt_state)


@dataclass(frozen=True)
class Placement:
    """How a run lays its TrainState over its mesh.

    `sharded`: each device keeps only its shard of the optimizer's arrays (`performance.update_sharding`).
    `average`: the state has a moving average of the parameters (`training.ema_decay`).
    `size`: length of the cut vector; None: `vector_size`. Another one is what a checkpoint of other devices holds.
    `group_sums`: how many sums of groups of leaves ride along (`NormGroups.sums`).
    """

    mesh: Mesh
    optimizer: Optimizer
    sharded: bool = False
    average: bool = False
    size: int | None = None
    group_sums: int = 0

    def create(self, params: Any) -> TrainState:
        """The state before step 0, on its devices, where none ever holds more of the optimizer's than it keeps.

        Raises: InputError for parameters that cannot be trained.
        """
        check_trainable(params)
        params, step = place_replicated(self.mesh, (params, np.zeros((), np.int32)))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract(params).opt_state)
        opt_state = jax.jit(self._opt_state, out_shardings=shardings)(params)
        return TrainState(step, params, opt_state, self._copy(params) if self.average else None)

    def abstract(self, params: Any) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        opt_state = jax.eval_shape(self._opt_state, params)
        specs = shard_specs(opt_state) if self.sharded else jax.tree.map(lambda _: PartitionSpec(), opt_state)
        average = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
        step, params, average = jax.tree.map(
            lambda leaf: self._laid(leaf, PartitionSpec()), (jax.ShapeDtypeStruct((), jnp.int32), params, average)
        )
        opt_state = jax.tree.map(self._laid, opt_state, specs)
        return TrainState(step, params, opt_state, average if self.average else None)

    def moved(self, state: TrainState, old: Placement) -> TrainState:
        """The same values, which lie as `old` says, laid as this placement says.

        On the way a device may hold the whole optimizer state. An average that is missing begins at the parameters.
        """
        params = state.params
        if (old.sharded, old._size(params)) != (self.sharded, self._size(params)):
            there = self.abstract(params)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, there.opt_state)
            move = jax.jit(partial(self._converted, there.params, old), out_shardings=shardings)
            state = replace(state, opt_state=move(state.opt_state))
        if self.average and not old.average:
            state = replace(state, ema=self._copy(params))
        return state if self.average else replace(state, ema=None)

    def _opt_state(self, params: Any) -> Any:
        if not self.sharded:
            return self.optimizer.init(params)
        vector = join(params, self._size(params))
        return OptimizerShards(self.optimizer.direction.init(vector), self.optimizer.scaling.init(params))

    def _converted(self, params: Any, old: Placement, opt_state: Any) -> Any:
        """Vectors to leaves where the old ones are cut, then leaves to vectors where the new ones are."""
        direction, scaling = opt_state
        # Where the state of a vector has a vector, the state of leaves has a tree of them; all else is the same.
        places = jax.eval_shape(self.optimizer.direction.init, jax.ShapeDtypeStruct((1,), jnp.float32))
        is_vector, treedef = [leaf.ndim == 1 for leaf in jax.tree.leaves(places)], jax.tree.structure(places)
        if old.sharded:
            whole = treedef.flatten_up_to(jax.eval_shape(self.optimizer.init, params)[0])
            values = zip(is_vector, jax.tree.leaves(direction), whole, strict=True)
            direction = treedef.unflatten([cut(value, like) if vector else value for vector, value, like in values])
        if not self.sharded:
            return direction, scaling
        values = zip(is_vector, treedef.flatten_up_to(direction), strict=True)
        vectors = [join(value, self._size(params)) if vector else value for vector, value in values]
        return OptimizerShards(treedef.unflatten(vectors), scaling)

    def _copy(self, params: Any) -> Any:
        """The parameters in float32, in buffers of their own: a step gives away those of the state."""
        copy = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32) + 0)
        return jax.jit(copy, out_shardings=replicated(self.mesh))(params)

    def _size(self, params: Any) -> int:
        return self.size or vector_size(params, self.mesh.size, self.group_sums)

    def _laid(self, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        # A vector of another mesh's length need not fall into equal parts here: read whole, it is cut again.
        even = leaf.ndim == 0 or leaf.shape[0] % self.mesh.size == 0
        sharding = NamedSharding(self.mesh, spec) if even else replicated(self.mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
