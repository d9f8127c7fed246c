"""Whether every device still holds the same parameters, told from one 32-bit checksum a device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.distributed import check_agreement
from dpscale.errors import DivergedError
from dpscale.mesh import DATA_AXIS

REMEDY = "Go on from the last checkpoint; if it happens again, the hardware or the network corrupts data: run doctor."


class ReplicaCheck:
    """Compares the parameters of all devices without moving them: each device sums its own bits.

    Raises: DivergedError from the call when any two devices, of one process or of two, differ.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._checksums = jax.jit(
            jax.shard_map(_checksum, mesh=mesh, in_specs=P(), out_specs=P(DATA_AXIS), check_vma=False)
        )

    def __call__(self, params: Any) -> bytes:
        """Wait for `params` and compare; the checksum that all devices agree on, 4 bytes. Sensitive without a key."""
        mine = [int(np.asarray(shard.data)[0]) for shard in self._checksums(params).addressable_shards]
        if len(set(mine)) > 1:
            raise DivergedError(f"the devices of one process hold different parameters: all must be equal. {REMEDY}")
        agreed = np.uint32(mine[0]).tobytes()
        check_agreement("the parameters", agreed, REMEDY)
        return agreed


def _checksum(params: Any) -> jax.Array:
    """uint32[1]: the sum of a hash of each element's bits and place.

    Any change of one element is seen. The hash is not linear, so that changes of several elements (exchanges, two
    flipped signs) do not cancel but by chance, 2**-32.
    """
    total = jnp.zeros((1,), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
        place = _mix(jnp.arange(bits.size, dtype=jnp.uint32) + _mix(jnp.uint32(number + 1)))
        total += jnp.sum(_mix(bits + place), dtype=jnp.uint32)
    return total


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: a bijection in which each bit of x moves half of the result's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
