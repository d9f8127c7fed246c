"""The named optimizers are optax's, their schedules start and end where they say, and decay is decoupled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_fixtures import flat

from dpscale.config import config_from_dict
from dpscale.data import as_source
from dpscale.optimizer import learning_rate_schedule, make_optimizer
from dpscale.sections import OptimizerSection
from dpscale.task import build_task

PARAMS = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.asarray([0.1, -0.2])}


def section(**values) -> OptimizerSection:
    return OptimizerSection.model_validate(values)


def after(optimizer: optax.GradientTransformation, gradients: list) -> np.ndarray:
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


def some_gradients(count: int = 4) -> list:
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape)), PARAMS) for _ in range(count)]


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({"name": "sgd"}, optax.sgd(0.2)),
        ({"name": "sgd", "momentum": 0.9}, optax.sgd(0.2, momentum=0.9)),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, optax.sgd(0.2, momentum=0.9, nesterov=True)),
        ({"name": "adam"}, optax.adam(0.2)),
        ({"name": "adam", "beta1": 0.0, "beta2": 0.5, "eps": 1e-3}, optax.adam(0.2, 0.0, 0.5, 1e-3)),
        ({"name": "adamw", "weight_decay": 0.3}, optax.adamw(0.2, weight_decay=0.3)),
        ({"name": "adamw"}, optax.adamw(0.2, weight_decay=0.0)),
        ({"name": "lamb", "weight_decay": 0.3}, optax.lamb(0.2, weight_decay=0.3)),
        ({"name": "lamb", "beta1": 0.8, "eps": 1e-3}, optax.lamb(0.2, 0.8, eps=1e-3, weight_decay=0.0)),
    ],
)
def test_each_name_is_the_optax_optimizer_of_that_name(config, plain):
    ours = make_optimizer(section(learning_rate=0.2, **config), steps=10)
    np.testing.assert_allclose(after(ours, some_gradients()), after(plain, some_gradients()), rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_weight_decay_is_decoupled_from_the_gradient(name):
    """It acts on the parameters alone: with a gradient of any size it takes away the same, and it is no gradient."""
    decay, rate = 0.1, 0.5
    zero = [jax.tree.map(jnp.zeros_like, PARAMS)]
    got = after(make_optimizer(section(name=name, learning_rate=rate, weight_decay=decay), 10), zero)
    # adamw: w - rate * decay * w. lamb scales the whole update to the leaf's norm: w - rate * w.
    factor = 1 - rate * decay if name == "adamw" else 1 - rate
    np.testing.assert_allclose(got, factor * flat(PARAMS), rtol=1e-6)
    if name == "adamw":
        for gradients in (some_gradients(1), [jax.tree.map(lambda g: 1e3 * g, some_gradients(1)[0])]):
            without = after(make_optimizer(section(name=name, learning_rate=rate, weight_decay=0.0), 10), gradients)
            with_it = after(make_optimizer(section(name=name, learning_rate=rate, weight_decay=decay), 10), gradients)
            np.testing.assert_allclose(without - with_it, rate * decay * flat(PARAMS), rtol=1e-5, atol=1e-7)


def test_weight_decay_takes_no_share_of_the_clip_norm():
    """What is clipped, the gradient of one example's loss, is the same with any decay, bit for bit."""
    source = as_source((np.eye(6, dtype=np.float32), np.arange(6) % 2), num_classes=2)
    example = {"features": jnp.ones(6), "label": jnp.int32(1)}
    found = []
    for decay in (0.0, 10.0):
        config = config_from_dict(
            {
                "model": {"name": "mlp", "widths": [4]},
                "optimizer": {"name": "adamw", "weight_decay": decay},
                "training": {"steps": 1},
                "privacy": {"enabled": False, "sampling_rate": 1.0},
            }
        )
        task = build_task(config, source.metadata)
        found.append(jax.jit(jax.value_and_grad(task.loss))(task.params, example, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def rates(steps: int = 10, **values) -> np.ndarray:
    schedule = learning_rate_schedule(section(learning_rate=2.0, **values), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_without_schedule_and_warmup_the_rate_is_constant():
    np.testing.assert_array_equal(rates(), 2.0)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_climbs_linearly_its_first_step_moves_and_its_last_has_the_peak(schedule):
    np.testing.assert_allclose(rates(warmup_steps=4, schedule=schedule)[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates(warmup_steps=1, schedule=schedule)[:2], [2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_goes_down_all_the_way_and_no_step_is_made_at_its_end(schedule, warmup_steps):
    """The end is reached once all steps are done: with final_fraction 0 the last charged step still moves."""
    found = rates(warmup_steps=warmup_steps, schedule=schedule)
    assert found[warmup_steps] == 2.0
    assert np.all(np.diff(found[warmup_steps:]) < 0)
    assert found[9] > 0
    assert found[10] == pytest.approx(0, abs=1e-6)
    assert rates(warmup_steps=warmup_steps, schedule=schedule, final_fraction=0.25)[10] == pytest.approx(0.5)


def test_the_cosine_is_half_way_down_in_the_middle():
    assert rates(schedule="cosine")[5] == pytest.approx(1.0, rel=1e-6)
    assert rates(schedule="linear")[5] == pytest.approx(1.0, rel=1e-6)


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("constant", "cosine", "linear"):
        assert rates(steps=1, schedule=schedule)[0] == 2.0


def test_the_schedule_follows_the_step_that_the_optimizer_counts():
    optimizer = make_optimizer(section(name="sgd", learning_rate=2.0, warmup_steps=4), steps=10)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    moved = [after(optimizer, [ones] * count) - flat(PARAMS) for count in range(1, 6)]
    np.testing.assert_allclose([-m[0] for m in moved], np.cumsum([0.5, 1.0, 1.5, 2.0, 2.0]), rtol=1e-5)
