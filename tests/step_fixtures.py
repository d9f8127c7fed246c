"""A small step to take apart: real accumulate, finalize, feed and loop over any number of virtual devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dpscale.baseline import summed_grad
from dpscale.chacha import key_words
from dpscale.clipping import NormGroups, clipped_grad
from dpscale.data.transforms import id_words
from dpscale.mesh import data_mesh, place_rows
from dpscale.optimizer import Optimizer
from dpscale.placement import Placement
from dpscale.privacy.plan import PrivacyPlan
from dpscale.state import Statistics, TrainState
from dpscale.step import Rows, Sums, build_accumulate, build_finalize, compile_steps, requests_array

KEY = bytes(range(60, 92))
OTHER_KEY = bytes(range(61, 93))
# An example of `linear_loss` is its own gradient, so a batch plants any gradients that a law needs.
LINEAR = {"w": jnp.zeros(30), "v": jnp.zeros((2, 5))}
WIDTH = 40


def mesh_of(devices: int) -> Mesh:
    found = jax.devices()
    assert len(found) >= devices, f"{len(found)} devices, but conftest.py asks for 8"
    return data_mesh(found[:devices])


def linear_loss(params: Any, example: Any) -> jax.Array:
    """<example, params>: its gradient is the example itself, the leaves in the pytree's order (v before w)."""
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
    return jnp.dot(example["features"], flat)


def curved_loss(params: Any, example: Any) -> jax.Array:
    """Not linear, so that gradients depend on the parameters: squared error of a small tanh network."""
    hidden = jnp.tanh(example["features"] @ params["w"] + params["b"])
    return jnp.square(hidden @ params["v"] - example["label"])


def curved_params(width: int = 6, hidden: int = 5, seed: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (width, hidden), "b": (hidden,), "v": (hidden,)}
    return {name: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def capture() -> optax.GradientTransformation:
    """Updates nothing and keeps what it was given: its state is the gradient that reached the optimizer."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
    )


def make_plan(
    *, expected: float = 8.0, clip_norm: float = 1.0, sigma: float = 1.0, enabled: bool = True, num_examples: int = 64
) -> PrivacyPlan:
    return PrivacyPlan(
        num_examples=num_examples,
        sampling_rate=expected / num_examples,
        steps=100,
        expected_batch_size=expected,
        noise_multiplier=sigma if enabled else 0.0,
        clip_norm=clip_norm if enabled else None,
        delta=1e-5,
        epsilon_target=None,
        enabled=enabled,
    )


def flat(tree: Any) -> np.ndarray:
    """All leaves end to end, in the order of the reduced vector."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


class Step:
    """Both functions compiled as a run compiles them, for one plan, loss, mesh and physical batch.

    `summed`: the clipped (or any other) gradient sum; by default the reference clipping of `loss`.
    """

    def __init__(
        self,
        *,
        devices: int = 1,
        physical_batch_size: int = 2,
        plan: PrivacyPlan | None = None,
        params: Any = LINEAR,
        loss: Callable[..., jax.Array] = linear_loss,
        summed: Callable[..., Any] | None = None,
        method: Any = "materialize",
        uses_key: bool = False,
        optimizer: optax.GradientTransformation | Optimizer | None = None,
        feature_shape: tuple[int, ...] = (WIDTH,),
        table: dict[str, Any] | None = None,
        sharded: bool = False,
        reduce_every_accumulation: bool = False,
        ema_decay: float | None = None,
        norm_groups: NormGroups | None = None,
    ) -> None:
        self.mesh, self.plan, self.params = mesh_of(devices), plan or make_plan(), params
        optimizer = optimizer or capture()
        self.optimizer = optimizer if isinstance(optimizer, Optimizer) else Optimizer(optimizer, optax.identity())
        self.norm_groups, group_sums = norm_groups, 0 if norm_groups is None else norm_groups.num_sums
        self.placement = Placement(
            self.mesh, self.optimizer, sharded=sharded, average=ema_decay is not None, group_sums=group_sums
        )
        self.physical_batch_size, self.feature_shape, self.table = physical_batch_size, feature_shape, table or {}
        clip_norm = self.plan.clip_norm or 1.0
        if summed is None and self.plan.enabled:
            summed = clipped_grad(loss, clip_norm=clip_norm, method=method, norm_groups=norm_groups)
        every = reduce_every_accumulation
        self.jitted_accumulate = build_accumulate(
            self.mesh,
            summed or summed_grad(loss),
            clip_norm,
            uses_key,
            reduce_every_accumulation=every,
            norm_groups=norm_groups,
        )
        self.jitted_finalize = build_finalize(
            self.mesh,
            self.plan,
            self.optimizer,
            sharded=sharded,
            reduce_every_accumulation=every,
            ema_decay=ema_decay,
        )

    @property
    def rows_at_once(self) -> int:
        return self.physical_batch_size * self.mesh.size

    @cached_property
    def functions(self):
        functions = self.jitted_accumulate, self.jitted_finalize
        rows = self.rows([])[0]
        return compile_steps(*functions, self.mesh, self.new_state(), self.table, rows, norm_groups=self.norm_groups)

    def new_state(self) -> TrainState:
        return self.placement.create(self.params)

    def rows(self, features: Sequence[Any], labels: Sequence[float] | None = None, filler: float = 0.0) -> list[Rows]:
        """Physical batches that hold these examples; `filler` is what padding holds. At least one batch."""
        size, count = self.rows_at_once, len(features)
        total = max(1, -(-count // size)) * size
        padded = np.full((total, *self.feature_shape), filler, np.float32)
        padded_labels = np.full(total, filler, np.float32)
        if count:
            padded[:count] = np.asarray(features, np.float32)
            padded_labels[:count] = 0.0 if labels is None else np.asarray(labels, np.float32)
        mask = np.arange(total) < count
        return [
            self.place(padded[k : k + size], padded_labels[k : k + size], mask[k : k + size], np.arange(k, k + size))
            for k in range(0, total, size)
        ]

    def place(self, features: np.ndarray, labels: np.ndarray, mask: np.ndarray, ids: np.ndarray) -> Rows:
        arrays = {"features": place_rows(self.mesh, features), "label": place_rows(self.mesh, labels)}
        return Rows(arrays, place_rows(self.mesh, id_words(ids)), place_rows(self.mesh, mask))

    def __call__(
        self,
        batches: Sequence[Rows] = (),
        *,
        key: bytes = KEY,
        state: TrainState | None = None,
        example_key: np.ndarray | None = None,
        stop: bool = False,
        save: bool = False,
    ) -> tuple[TrainState, Statistics]:
        """One logical step over these physical batches."""
        state = self.new_state() if state is None else state
        sums = self.functions.zero_sums()
        example_key = np.zeros(2, np.uint32) if example_key is None else example_key
        for rows in batches:
            sums = self.functions.accumulate(state.params, sums, self.table, rows, example_key)
        requests = requests_array(self.mesh, stop=stop, save=save)
        state, _, statistics = self.functions.finalize(state, sums, requests, key_words(key))
        return state, Statistics.of(np.asarray(statistics))

    def sums(self, batches: Sequence[Rows]) -> np.ndarray:
        """The clipped sum of these batches over all devices, before noise, as one float64 vector."""
        params = self.new_state().params
        leaves = jax.tree.map(lambda leaf: np.zeros((self.mesh.size, *leaf.shape), np.float32), self.params)
        sums = Sums(*jax.tree.map(lambda x: place_rows(self.mesh, x), (leaves, np.zeros((self.mesh.size, 5), "f4"))))
        for rows in batches:
            sums = self.jitted_accumulate(params, sums, self.table, rows, np.zeros(2, np.uint32))
        return flat(jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums.gradient))

    def gradient(self, batches: Sequence[Rows] = (), key: bytes = KEY) -> np.ndarray:
        """What reaches the optimizer, as one vector; for steps made with `capture()`."""
        state, _ = self(batches, key=key)
        return flat(state.opt_state)[: flat(self.params).size]
