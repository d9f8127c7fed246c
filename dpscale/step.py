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
from dpscale.clipping import ClippedSum, NormGroups
from dpscale.data.resident import gather
from dpscale.data.transforms import example_keys
from dpscale.errors import InputError
from dpscale.mesh import DATA_AXIS, place_rows, replicated, split
from dpscale.noise import add_gaussian_noise
from dpscale.placement import cut, join
from dpscale.privacy.plan import PrivacyPlan
from dpscale.shard_update import shard_update
from dpscale.state import RIDERS, TrainState, moved_average


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Each device's own partial sums of one logical step: nothing crosses devices before `finalize`.

    `gradient`: pytree like the parameters, float32, with a leading axis of one entry per device; `statistics`:
    float32[devices, 5], the first five of `Statistics`. With `reduce_every_accumulation` each device's `gradient` is
    already the sum over all of them. `groups`: float32[devices, num_sums] of `NormGroups.sums`, or None.
    """

    gradient: Any
    statistics: jax.Array
    groups: jax.Array | None = None


class Rows(NamedTuple):
    """One physical batch of the whole mesh: B = devices x physical batch rows, split over the devices.

    `arrays`: the rows as stored, with leading axis B, or {"index": int32[B]} when the data set lives on the device;
    `id_words`: uint32[B, 2], high and low word of each row's data-set index; `mask`: bool[B], False on padding.
    """

    arrays: dict[str, jax.Array]
    id_words: jax.Array
    mask: jax.Array


@dataclass(frozen=True)
class _Bound:
    """A compiled `accumulate` with the weights that no step changes."""

    compiled: Any
    frozen: Any

    def __call__(self, *arguments: Any) -> Sums:
        return self.compiled(*arguments, self.frozen)

    def memory_analysis(self) -> Any:
        return self.compiled.memory_analysis()


@dataclass(frozen=True)
class StepFunctions:
    """The two functions, compiled ahead for one fixed shape, so that no draw of any size compiles anything again.

    `accumulate(params, sums, table, rows, key) -> sums` and `finalize(state, sums, requests, noise_key) -> (state,
    sums, statistics)`; both donate `sums`, `finalize` also donates `state`.
    """

    accumulate: Callable[..., Sums]
    finalize: Callable[..., tuple[TrainState, Sums, jax.Array]]
    zero_sums: Callable[[], Sums]


def build_accumulate(
    mesh: Mesh,
    summed: Callable[..., ClippedSum],
    clip_norm: float,
    uses_key: bool,
    *,
    reduce_every_accumulation: bool = False,
    norm_groups: NormGroups | None = None,
):
    """The jitted `accumulate`: adds each device's clipped sum of its own rows to its own partial sum.

    Args:
        summed: `clipped_grad(...)` or the non-private baseline; it takes `frozen` last where `accumulate` is given it.
        clip_norm: only for the sensitive count of clipped rows.
        uses_key: whether the loss takes a key. Each row's key is the step's key with the row's data-set index folded
            in, so it does not change with the row's place in the batch.
        reduce_every_accumulation: reduce each physical batch's sum at once, as ordinary data-parallel SGD does: for
            comparison only; `finalize` must know.
        norm_groups: those that `summed` reports norms of, to be added up in `Sums.groups`.
    """

    def on_one_device(params, sums: Sums, table, rows: Rows, key: jax.Array, frozen) -> Sums:
        # Named, since jax's default generator can be set to another, whose keys have more words.
        typed_key = jax.random.wrap_key_data(key, impl="threefry2x32")
        keys = example_keys(typed_key, rows.id_words) if uses_key else None
        constants = () if frozen is None else (frozen,)
        out = summed(params, gather(table, rows.arrays), rows.mask, keys, *constants)
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
        grad_sum = out.grad_sum
        if reduce_every_accumulation:
            grad_sum = cut(jax.lax.psum(join(grad_sum), DATA_AXIS), grad_sum)
        gradient = jax.tree.map(lambda total, part: total + part[None], sums.gradient, grad_sum)
        groups = sums.groups
        if groups is not None and norm_groups is not None and out.group_norms is not None:
            groups = groups + norm_groups.sums(out.group_norms, counted)[None]
        return Sums(gradient, sums.statistics + statistics[None], groups)

    mine, everywhere = P(DATA_AXIS), P()
    mapped = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, mine, everywhere, mine, everywhere, everywhere),
        out_specs=mine,
        # Replication checking would make autodiff insert a psum for the replicated parameters; the reduction is ours.
        check_vma=False,
    )

    def accumulate(params, sums: Sums, table, rows: Rows, key: jax.Array, frozen=None) -> Sums:
        return mapped(params, sums, table, rows, key, frozen)

    return jax.jit(accumulate, donate_argnums=(1,))


def build_finalize(
    mesh: Mesh,
    plan: PrivacyPlan,
    optimizer: Any,
    *,
    sharded: bool = False,
    reduce_every_accumulation: bool = False,
    ema_decay: float | None = None,
):
    """The jitted `finalize`: the only reduction of the step, its only draw of noise, the public divisor, the update.

    Args:
        optimizer: an optax transformation, or an `optimizer.Optimizer`, which `sharded` needs.
        sharded: noise and optimizer on shards (`shard_update`), for a state that a sharded `Placement` made.
        reduce_every_accumulation: the gradients are reduced already; only statistics and requests are left to reduce.
        ema_decay: also keep the average of the parameters; the state must have one.
    """
    if sharded and reduce_every_accumulation:
        raise InputError("update_sharding and reduce_every_accumulation exclude each other: choose one of them")
    update = shard_update if sharded else partial(_whole_update, reduced=reduce_every_accumulation)

    def finalize(state: TrainState, sums: Sums, requests: jax.Array, noise_key: jax.Array):
        params, opt_state, statistics = update(mesh, plan, optimizer, state, sums, requests, noise_key)
        ema = None if ema_decay is None else moved_average(state.ema, params, state.step, ema_decay)
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return TrainState(state.step + 1, params, opt_state, ema), zeros, statistics

    everywhere, mine = replicated(mesh), split(mesh)
    # A sharded state lies as its parts say that come from shard_map; out_shardings would need its structure.
    return jax.jit(finalize, donate_argnums=(0, 1), out_shardings=(None if sharded else everywhere, mine, everywhere))


def _whole_update(mesh: Mesh, plan: PrivacyPlan, optimizer: Any, state, sums: Sums, requests, noise_key, *, reduced):
    """Every device draws the whole noise and updates everything, alike: (params, opt_state, statistics)."""

    def reduce_once(sums: Sums, requests: jax.Array) -> jax.Array:
        if reduced:
            riders = jax.lax.psum(join((sums.statistics, requests, sums.groups)), DATA_AXIS)
            return jnp.concatenate([join(sums.gradient), riders])
        return jax.lax.psum(join((sums.gradient, sums.statistics, requests, sums.groups)), DATA_AXIS)

    vector = jax.shard_map(
        reduce_once, mesh=mesh, in_specs=(P(DATA_AXIS), P(DATA_AXIS)), out_specs=P(), check_vma=False
    )(sums, requests)
    riders = RIDERS + (0 if sums.groups is None else sums.groups.shape[1])
    total, statistics = jnp.split(vector, [vector.size - riders])
    if plan.enabled:
        total = add_gaussian_noise(total, noise_key, jnp.float32(plan.noise_stddev))
    gradient = cut(total / jnp.float32(plan.expected_batch_size), state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, statistics


def compile_steps(
    accumulate,
    finalize,
    mesh: Mesh,
    state: TrainState,
    table: Any,
    rows: Rows,
    frozen: Any = None,
    norm_groups: NormGroups | None = None,
) -> StepFunctions:
    """Compile both functions for these shapes before step 0; `rows` gives shapes only.

    A call with other shapes raises instead of compiling again. `frozen`: weights that are not trained, placed on every
    device; an argument of the compiled program, not constants in it, that every call is given. `norm_groups`: those
    of `accumulate`.
    """
    group_sums = None if norm_groups is None else norm_groups.num_sums
    zero_sums = jax.jit(partial(_zeros, state.params, mesh.size, group_sums), out_shardings=split(mesh))
    sums = zero_sums()
    key = np.zeros(2, np.uint32)
    constants = () if frozen is None else (frozen,)
    accumulating = accumulate.lower(state.params, sums, table, rows, key, *constants).compile()
    requests = requests_array(mesh, stop=False, save=False)
    finalizing = finalize.lower(state, sums, requests, key_words(bytes(32))).compile()
    bound = accumulating if frozen is None else _Bound(accumulating, frozen)
    return StepFunctions(bound, finalizing, zero_sums)


def requests_array(mesh: Mesh, *, stop: bool, save: bool) -> jax.Array:
    """f32[devices, 2]: what this process asks for, to ride in the next reduction."""
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    return place_rows(mesh, np.tile(np.array([[stop, save]], np.float32), (mine, 1)))


def _zeros(params: Any, devices: int, group_sums: int | None) -> Sums:
    gradient = jax.tree.map(lambda leaf: jnp.zeros((devices, *leaf.shape), jnp.float32), params)
    groups = None if group_sums is None else jnp.zeros((devices, group_sums), jnp.float32)
    return Sums(gradient, jnp.zeros((devices, 5), jnp.float32), groups)
