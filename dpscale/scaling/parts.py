"""The pieces of a logical step, compiled and timed one by one: what the fused programs cannot tell apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.chacha import key_words
from dpscale.mesh import DATA_AXIS, place_replicated, replicated, split
from dpscale.noise import add_gaussian_noise
from dpscale.state import RIDERS, TrainState

ROUNDS = 5
CALLS = 3  # in a row, so that dispatch hides behind the device as it does in the loop


def seconds_each(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds of one call among several in a row, the median of `rounds`; the first round, a warm-up, is left out."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / CALLS)
    return statistics.median(found[1:])


def reduction_seconds(mesh: Mesh, num_parameters: int) -> float:
    """One all-reduce of as many float32 numbers as a step reduces: every parameter, and the statistics."""
    length = num_parameters + RIDERS
    parts = jax.jit(lambda: jnp.zeros((mesh.size, length), jnp.float32), out_shardings=split(mesh))()

    def reduce_once(mine: jax.Array) -> jax.Array:
        return jax.lax.psum(mine[0], DATA_AXIS)

    mapped = jax.shard_map(reduce_once, mesh=mesh, in_specs=P(DATA_AXIS), out_specs=P(), check_vma=False)
    reduce = jax.jit(mapped)
    return seconds_each(lambda: reduce(parts))


def noise_seconds(mesh: Mesh, num_parameters: int, stddev: float) -> float:
    """One draw of noise on a replicated vector of all parameters."""
    total = jax.jit(lambda: jnp.zeros(num_parameters, jnp.float32), out_shardings=replicated(mesh))()
    key = place_replicated(mesh, key_words(bytes(32)))
    noisy = jax.jit(lambda total, key: add_gaussian_noise(total, key, jnp.float32(stddev)))
    return seconds_each(lambda: noisy(total, key))


def update_seconds(mesh: Mesh, optimizer: Any, params: Any) -> float:
    """The optimizer's update of replicated parameters, from `params`. `optimizer`: has optax's init and update."""
    state = place_replicated(mesh, TrainState.create(params, optimizer))

    def updated(params: Any, opt_state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    gradient = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=replicated(mesh))(
        state.params
    )
    update = jax.jit(updated)
    return seconds_each(lambda: update(state.params, state.opt_state, gradient))


def over_processes(values: np.ndarray) -> np.ndarray:
    """The element-wise maximum over all processes of float64[n]; all call it in the same order."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    # As two float32 numbers: without 64-bit mode a float64 would arrive rounded.
    high = values.astype(np.float32)
    low = (values - high).astype(np.float32)
    gathered = np.asarray(multihost_utils.process_allgather(np.stack([high, low])))
    return gathered.reshape(jax.process_count(), 2, -1).astype(np.float64).sum(axis=1).max(axis=0)
