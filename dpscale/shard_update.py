"""The update of one logical step on shards: reduce-scatter, noise and optimizer on each device's part, gather.

    partial sums -> reduce-scatter -> noise -> divide by the expected batch size -> optimizer's direction -> all-gather

The two collectives together move what one all-reduce moves. Source: Rajbhandari et al. 2020 (ZeRO, stage 1; arXiv
1910.02054) for the sharded optimizer; Xu et al. 2020 (arXiv 2004.13336) for the sharded weight update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.mesh import DATA_AXIS
from dpscale.noise import add_gaussian_noise, shard_start
from dpscale.optimizer import Optimizer
from dpscale.placement import count_elements, cut, join, shard_specs, vector_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.state import RIDERS, OptimizerShards, TrainState


def shard_update(
    mesh: Mesh, plan: PrivacyPlan, optimizer: Optimizer, state: TrainState, sums: Any, requests: Any, noise_key: Any
) -> tuple[Any, OptimizerShards, jax.Array]:
    """Sum, noise and update one shard a device; to be traced inside a jitted function.

    Args:
        state: made by a sharded `Placement` on this mesh.
        sums: `step.Sums`, each leaf with one entry per device. requests: f32[devices, 2].
        noise_key: uint32[8].

    Returns: (params, opt_state, statistics), params and f32[7 or more] statistics whole on every device.

    Guarantees: element i gets the noise of global index i, as in the whole update. Statistics and padding ride in the
    vector, but get no noise and reach no optimizer state. The only collectives are one reduce-scatter and one
    all-gather, each of `vector_size` float32.
    """
    group_sums = 0 if sums.groups is None else sums.groups.shape[1]
    elements, size = count_elements(state.params), vector_size(state.params, mesh.size, group_sums)
    shard, end = size // mesh.size, elements + RIDERS + group_sums

    def on_one_device(params, opt_state, sums, requests, noise_key):
        mine = join((sums.gradient, sums.statistics, requests, sums.groups), size)
        reduced = jax.lax.psum_scatter(mine, DATA_AXIS, scatter_dimension=0, tiled=True)
        start = shard_start(DATA_AXIS, shard)
        noisy = reduced
        if plan.enabled:
            noisy = add_gaussian_noise(reduced, noise_key, jnp.float32(plan.noise_stddev), start)
        is_parameter = start + jnp.arange(shard, dtype=jnp.uint32) < np.uint32(elements)
        gradient = jnp.where(is_parameter, noisy / jnp.float32(plan.expected_batch_size), 0.0)
        here = jax.lax.dynamic_slice(join(params, size), (start,), (shard,))
        direction: Any
        direction, moments = optimizer.direction.update(gradient, opt_state.direction, here)
        # The statistics come back to everyone in the room after the parameters.
        sent = jnp.where(is_parameter, direction, reduced)
        vector = jax.lax.all_gather(sent, DATA_AXIS, tiled=True)
        updates, scaling = optimizer.scaling.update(cut(vector, params), opt_state.scaling, params)
        params = optax.apply_updates(params, updates)
        return params, OptimizerShards(moments, scaling), vector[elements:end]

    specs = shard_specs(state.opt_state)
    mapped = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P(), specs, P(DATA_AXIS), P(DATA_AXIS), P()),
        out_specs=(P(), specs, P()),
        check_vma=False,  # that every device gathers the same is known here, not to the checker
    )
    return mapped(state.params, state.opt_state, sums, requests, noise_key)
