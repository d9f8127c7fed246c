"""The run's own step functions on made-up rows, one call at a time, with their results on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.config import RunConfig
from dpscale.data.transforms import example_keys, id_words
from dpscale.gradients import build_finalize_for
from dpscale.loop import StepKeys
from dpscale.mesh import local_positions, place_replicated
from dpscale.observe import gradient_reader, standing_still
from dpscale.placement import Placement, count_elements, join
from dpscale.privacy.plan import PrivacyPlan
from dpscale.state import Statistics, TrainState
from dpscale.step import StepFunctions, Sums, requests_array
from dpscale.task import Task
from dpscale.verify.made_up import MadeUp


class Bench:
    """`accumulate` is the run's compiled one. `finalize` is the run's program with an optimizer that only looks.

    `keys`: of a secret that is the verification's alone. `params`: the initial parameters, on every device.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: PrivacyPlan,
        task: Task,
        placement: Placement,
        functions: StepFunctions,
        made_up: MadeUp,
        keys: StepKeys,
    ) -> None:
        self.config, self.plan, self.task, self.placement, self.functions = config, plan, task, placement, functions
        self.made_up, self.keys, self.mesh = made_up, keys, placement.mesh
        self.params = place_replicated(self.mesh, task.params)
        self.count = count_elements(task.params)
        self._table = made_up.table()
        self._looking = replace(placement, optimizer=standing_still(), average=False)

    @cached_property
    def _finalize(self) -> Callable[..., Any]:
        self._state = self._looking.create(self.task.params)
        self._read = gradient_reader(self._looking, self.count)
        finalize = build_finalize_for(self.config, self.plan, self._looking)
        arguments = (self._state, self.functions.zero_sums(), self._requests(), self.keys.noise(0))
        return finalize.lower(*arguments).compile()

    def sums_of(
        self, kinds: Sequence[int], padding: int, params: Any = None, after: Sums | None = None
    ) -> tuple[Sums, list[np.ndarray], list[np.ndarray]]:
        """Accumulate these rows on every device, beginning with `after` (which is used up) or with zeros.

        Returns: the sums; for each device of this process its own rows' sum, float32[n], and its five statistics.
        """
        sums = self.functions.zero_sums() if after is None else after
        for rows in self.made_up.batches(kinds, padding):
            params = self.params if params is None else params
            sums = self.functions.accumulate(params, sums, self._table, rows, self.keys.examples(0))
        # With a reduction in every accumulation each device holds the sum of all, whose rows are alike.
        devices = self.mesh.size if self.config.performance.reduce_every_accumulation else 1
        own = [x / np.float32(devices) for x in self._each(sums.gradient)]
        return sums, own, self._each(sums.statistics)

    def finalize(self, sums: Sums, step: int) -> tuple[np.ndarray, Statistics]:
        """(noisy sum of all devices, float32[n]: the released gradient times the divisor; reduced statistics)."""
        copies, statistics = self.finalize_everywhere(sums, step)
        return copies[0], statistics

    def finalize_everywhere(self, sums: Sums, step: int) -> tuple[list[np.ndarray], Statistics]:
        """The same, as each device of this process has it."""
        finalize = self._finalize
        self._state, _, reduced = finalize(self._state, sums, self._requests(), self.keys.noise(step))
        divisor = np.float32(self.plan.expected_batch_size)
        shards = self._read(self._state).addressable_shards
        statistics = Statistics.of(np.asarray(reduced.addressable_data(0)))
        return [np.asarray(shard.data) * divisor for shard in shards], statistics

    def run_finalize(self, step: int) -> TrainState:
        """The state that the run's own compiled `finalize` makes of the initial one and an empty batch."""
        state = self.placement.create(self.task.params)
        return self.functions.finalize(state, self.functions.zero_sums(), self._requests(), self.keys.noise(step))[0]

    def release(self) -> None:
        """Let go of what `finalize` keeps on the devices."""
        del self._state

    def leaf_names(self) -> list[str]:
        """Of the parameters, in flattening order."""
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.task.params)]

    def leaf_sizes(self) -> list[int]:
        """Elements of each of them."""
        return [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.task.params)]

    def _requests(self) -> jax.Array:
        return requests_array(self.mesh, stop=False, save=False)

    def _each(self, tree: Any) -> list[np.ndarray]:
        """One vector for each device of this process, in mesh order, of leaves that begin with a device axis."""
        mine = {place: number for number, place in enumerate(local_positions(self.mesh))}
        parts: list[list[np.ndarray]] = [[] for _ in mine]
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                parts[mine[shard.index[0].start or 0]].append(np.asarray(shard.data).reshape(-1))
        return [np.concatenate(part) for part in parts]


def jit_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit for what runs a few times: on a CPU it is not worth optimising, which takes seconds."""
    return jax.jit(
        function, compiler_options={"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    )


def reference_gradient(task: Task, keys: StepKeys) -> Callable[[Any, dict[str, np.ndarray], int], np.ndarray]:
    """A function (params, example, its index) -> the gradient of its loss, float64[n], by jax.grad on one device.

    Nothing of dpscale's clipping, batching or sharding takes part in it.
    """

    def gradient(params: Any, example: Any, words: jax.Array, key: jax.Array) -> jax.Array:
        typed = jax.random.wrap_key_data(key, impl="threefry2x32")
        own = (example_keys(typed, words[None])[0],) if task.uses_key else ()
        return join(jax.grad(task.loss)(params, example, *own))

    compiled = jit_quickly(gradient)

    def call(params: Any, example: dict[str, np.ndarray], index: int) -> np.ndarray:
        arrays = jax.tree.map(jnp.asarray, example)
        words = id_words(np.array([index]))[0]
        return np.asarray(compiled(params, arrays, words, keys.examples(0)), np.float64)

    return call
