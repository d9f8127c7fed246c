"""The one-dimensional mesh of all devices, and the two shardings in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes, in jax's global order, with the single axis "data"."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis is cut into one consecutive part per device."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def local_positions(mesh: Mesh) -> list[int]:
    """Places of this process's devices in the mesh, in order: the shares of a batch that it loads."""
    me = jax.process_index()
    return [place for place, device in enumerate(mesh.devices.flat) if device.process_index == me]


def place_rows(mesh: Mesh, local: Any) -> Any:
    """Global arrays, split over the mesh, of which this process gives the rows of its own devices, in order.

    local: a NumPy array, or a pytree of them, which travel together.
    """
    own = len(mesh.local_devices)
    if own == mesh.size:
        return jax.device_put(local, split(mesh))  # one call for all leaves: half the host's time

    def place(leaf: np.ndarray) -> jax.Array:
        global_shape = (len(leaf) // own * mesh.size, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(split(mesh), leaf, global_shape)

    return jax.tree.map(place, local)


def place_replicated(mesh: Mesh, tree):
    """Give every device the same value of each leaf, from host values that are equal on all processes."""

    def place(leaf):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(place, tree)
