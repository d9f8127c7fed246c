"""Whether every device still holds the same parameters and every process made the same draw: sent, and read later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.errors import DivergedError
from dpscale.mesh import DATA_AXIS, local_positions, place_rows, replicated, split

REMEDY = "Go on from the last checkpoint; if it happens again, the hardware or the network corrupts data: run doctor."


class ReplicaCheck:
    """Compares the parameters of all devices without moving them: each device sums its own bits to 32.

    The sums are gathered with the processes' draws, 20 bytes a device, and no host waits for another. It is a
    collective, so all processes must send their checks between the same two steps.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        mapped = jax.shard_map(
            _gather_checksums, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(), check_vma=False
        )
        # Shardings are said, not taken from the arguments: a state comes from several programs.
        self._gather = jax.jit(mapped, in_shardings=(replicated(mesh), split(mesh)), out_shardings=replicated(mesh))

    def send(self, params: Any, draw: bytes) -> SentCheck:
        """Send a check of `params` and of `draw`, 16 bytes that tell a draw from another; waits for nothing.

        `params` may be donated to what is sent after it.
        """
        words = np.tile(np.frombuffer(draw, "<u4").astype(np.uint32), (len(local_positions(self._mesh)), 1))
        gathered = self._gather(params, place_rows(self._mesh, words))
        gathered.copy_to_host_async()
        return SentCheck(gathered, tuple(device.process_index for device in self._mesh.devices.flat))


@dataclass(frozen=True)
class SentCheck:
    """A check under way. `gathered`: uint32[devices, 5], checksum and draw of each device, the same everywhere;
    `processes`: to which process each device belongs.
    """

    gathered: jax.Array
    processes: tuple[int, ...]

    def agreed(self) -> bytes:
        """The checksum that all devices agree on, 4 bytes, sensitive without a key; waits for what was sent before it.

        Raises: DivergedError, on every process, when any two devices hold different parameters or any two processes
            made different draws.
        """
        rows = np.asarray(self.gathered)
        for what, columns, remedy in (
            ("the parameters", slice(0, 1), REMEDY),
            ("the draw", slice(1, None), "All must run one version on one data set."),
        ):
            part = rows[:, columns]
            different = np.flatnonzero(np.any(part != part[0], axis=1))
            if len(different):
                owners = sorted({self.processes[device] for device in different})
                raise DivergedError(
                    f"{what} of device(s) {different.tolist()} (process(es) {owners}) differ from device 0's: all must "
                    f"be equal, or the noise and the sampling are not what is accounted. {remedy}"
                )
        return rows[0, 0].tobytes()


def _gather_checksums(params: Any, draw: jax.Array) -> jax.Array:
    """uint32[devices, 5] on every device."""
    mine = jnp.concatenate([_checksum(params), draw[0]])
    return jax.lax.all_gather(mine, DATA_AXIS)


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
