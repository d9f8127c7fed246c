"""One logical step of DP-SGD: `accumulate` (no collective, any number of times), then `finalize` (one reduction).

    sum of clipped gradients -> one reduction -> noise -> divide by the expected batch size -> optax

Source: Abadi et al. 2016, algorithm 1, with Poisson sampling and a public divisor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.chacha import key_words
from dpscale.clipping import ClippedSum
from dpscale.data.resident import gather
from dpscale.data.transforms import example_keys
from dpscale.mesh import DATA_AXIS, place_rows, replicated, split
from dpscale.noise import add_gaussian_noise
from dpscale.privacy.plan import PrivacyPlan
from dpscale.state import TrainState


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Each device's own partial sums of one logical step: nothing crosses devices before `finalize`.

    `gradient`: pytree like the parameters, float32, with a leading axis of one entry per device; `statistics`:
    float32[devices, 5], the first five of `Statistics`.
    """

    gradient: Any
    statistics: jax.Array


class Rows(NamedTuple):
    """One physical batch of the whole mesh: B = devices x physical batch rows, split over the devices.

    `arrays`: the rows as stored, with leading axis B, or {"index": int32[B]} when the data set lives on the device;
    `id_words`: uint32[B, 2], high and low word of each row's data-set index; `mask`: bool[B], False on padding.
    """

    arrays: dict[str, jax.Array]
    id_words: jax.Array
    mask: jax.Array


@dataclass(frozen=True)
class StepFunctions:
    """The two functions, compiled ahead for one fixed shape, so that no draw of any size compiles anything again.

    `accumulate(params, sums, table, rows, key) -> sums` and `finalize(state, sums, requests, noise_key) -> (state,
    sums, statistics)`; both donate `sums`, `finalize` also donates `state`.
    """

    accumulate: Callable[..., Sums]
    finalize: Callable[..., tuple[TrainState, Sums, jax.Array]]
    zero_sums: Callable[[], Sums]


def build_accumulate(mesh: Mesh, summed: Callable[..., ClippedSum], clip_norm: float, uses_key: bool):
    """The jitted `accumulate`: adds each device's clipped sum of its own rows to its own partial sum.

    Args:
        summed: `clipped_grad(...)` or the non-private baseline.
        clip_norm: only for the sensitive count of clipped rows.
        uses_key: whether the loss takes a key. Each row's key is the step's key with the row's data-set index folded
            in, so it does not change with the row's place in the batch.
    """

    def on_one_device(params, sums: Sums, table, rows: Rows, key: jax.Array) -> Sums:
        # Named, since jax's default generator can be set to another, whose keys have more words.
        typed_key = jax.random.wrap_key_data(key, impl="threefry2x32")
        keys = example_keys(typed_key, rows.id_words) if uses_key else None
        out = summed(params, gather(table, rows.arrays), rows.mask, keys)
        counted = rows.mask & out.finite
        statistics = jnp.stack(
            [
                jnp.sum(rows.mask, dtype=jnp.float32),
                jnp.sum(counted & (out.norms > clip_norm), dtype=jnp.float32),
                jnp.sum(rows.mask & ~out.finite, dtype=jnp.float32),
                jnp.sum(jnp.where(counted, out.losses, 0.0)),
                jnp.sum(jnp.where(counted, out.norms, 0.0)),
            ]
        )
        gradient = jax.tree.map(lambda total, part: total + part[None], sums.gradient, out.grad_sum)
        return Sums(gradient, sums.statistics + statistics[None])

    mine, everywhere = P(DATA_AXIS), P()
    mapped = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, mine, everywhere, mine, everywhere),
        out_specs=mine,
        # Replication checking would make autodiff insert a psum for the replicated parameters; the reduction is ours.
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(1,))


def build_finalize(mesh: Mesh, plan: PrivacyPlan, optimizer: optax.GradientTransformation):
    """The jitted `finalize`: the only reduction of the step, its only draw of noise, the public divisor, the update."""

    def reduce_once(sums: Sums, requests: jax.Array) -> jax.Array:
        leaves = [leaf.reshape(-1) for leaf in (*jax.tree.leaves(sums.gradient), sums.statistics, requests)]
        return jax.lax.psum(jnp.concatenate(leaves), DATA_AXIS)

    def finalize(state: TrainState, sums: Sums, requests: jax.Array, noise_key: jax.Array):
        reduced = jax.shard_map(
            reduce_once, mesh=mesh, in_specs=(P(DATA_AXIS), P(DATA_AXIS)), out_specs=P(), check_vma=False
        )(sums, requests)
        total, statistics = jnp.split(reduced, [reduced.size - len(Statistics._fields)])
        if plan.enabled:
            total = add_gaussian_noise(total, noise_key, jnp.float32(plan.noise_stddev))
        gradient = _like(state.params, total / jnp.float32(plan.expected_batch_size))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return TrainState(state.step + 1, params, opt_state), zeros, statistics

    everywhere, mine = replicated(mesh), split(mesh)
    return jax.jit(finalize, donate_argnums=(0, 1), out_shardings=(everywhere, mine, everywhere))


def compile_steps(accumulate, finalize, mesh: Mesh, state: TrainState, table: Any, rows: Rows) -> StepFunctions:
    """Compile both functions for these shapes before step 0; `rows` gives shapes only.

    A call with other shapes raises instead of compiling again.
    """
    zero_sums = jax.jit(partial(_zeros, state.params, mesh.size), out_shardings=split(mesh))
    sums = zero_sums()
    key = np.zeros(2, np.uint32)
    accumulating = accumulate.lower(state.params, sums, table, rows, key).compile()
    requests = requests_array(mesh, stop=False, save=False)
    finalizing = finalize.lower(state, sums, requests, key_words(bytes(32))).compile()
    return StepFunctions(accumulating, finalizing, zero_sums)


def requests_array(mesh: Mesh, *, stop: bool, save: bool) -> jax.Array:
    """f32[devices, 2]: what this process asks for, to ride in the next reduction."""
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    return place_rows(mesh, np.tile(np.array([[stop, save]], np.float32), (mine, 1)))


def _zeros(params: Any, devices: int) -> Sums:
    gradient = jax.tree.map(lambda leaf: jnp.zeros((devices, *leaf.shape), jnp.float32), params)
    return Sums(gradient, jnp.zeros((devices, 5), jnp.float32))


def _like(params: Any, flat: jax.Array) -> Any:
    """Cut the flat vector into leaves of the parameters' shapes; the order is the one in which they were joined."""
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(flat, ends)
    cut = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, cut)
