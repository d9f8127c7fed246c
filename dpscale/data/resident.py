"""A small data set that lives on the devices: batches are gathered there by index (`data.residence =
"device"`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.data.source import VALID, Batch, ExampleSource, empty_rows
from dpscale.errors import InputError

Resident = dict[str, jax.Array]  # whole arrays on the device; empty when rows come from the host


def load_resident(
    source: ExampleSource, sharding: jax.sharding.Sharding | None = None
) -> tuple[Resident, np.ndarray | None]:
    """The whole data set on the device(s), as stored: {"features": dtype[N, ...], "label": dtype[N, ...]}.

    With it, bool[N]: which examples could be read (for the loader's mask), or None where all were.

    sharding: where to; normally replicated over the mesh (every process calls this with the same data). Pass
    the result to jitted functions as an argument, never through a closure: closed-over arrays end up in the
    compiled program.
    Raises: InputError when the data set is too large for int32 indices or for the device's memory.
    """
    count = len(source)
    metadata = source.metadata
    if count > np.iinfo(np.int32).max:
        raise InputError(
            f"{metadata.name} has {count} examples, too many to index on a device: set data.residence=host"
        )
    row_bytes = sum(array.nbytes for array in empty_rows(metadata, 1).values())
    _check_memory(count * row_bytes, metadata.name, sharding)
    arrays = source.rows(np.arange(count, dtype=np.int64))
    readable = arrays.pop(VALID, None)
    if sharding is None:
        return {name: jnp.asarray(array) for name, array in arrays.items()}, readable
    return {name: _place(array, sharding) for name, array in arrays.items()}, readable


def resident_shapes(source: ExampleSource, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and sharding of what `load_resident` gives; reads no example."""
    return {
        name: jax.ShapeDtypeStruct((len(source), *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in empty_rows(source.metadata, 0).items()
    }


def gather(resident: Resident, arrays: Batch | dict[str, jax.Array]) -> dict[str, Any]:
    """{"features", "label"} of a physical batch, inside a jitted function: its own rows, or the resident rows
    at "index".

    The same values either way; padded rows hold example 0's when resident and zeros otherwise, so they must
    be masked by selection.
    """
    if not resident:
        return dict(arrays)
    return {name: jnp.take(array, arrays["index"], axis=0, mode="clip") for name, array in resident.items()}


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # Not device_put: for devices of several processes that would compare the whole array between them.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_memory(num_bytes: int, name: str, sharding: jax.sharding.Sharding | None) -> None:
    devices = sharding.device_set if sharding else jax.local_devices()[:1]
    local = [d for d in devices if d.process_index == jax.process_index()]
    stats = local[0].memory_stats() if local else None
    limit = (stats or {}).get("bytes_limit")
    if limit and num_bytes > limit // 2:
        raise InputError(
            f"{name} takes {num_bytes / 2**30:.1f} GiB, more than half of the device's {limit / 2**30:.1f} "
            "GiB: "
            "set data.residence=host"
        )
