"""Laws of the sharded update: the same step as the whole one, with the same noise, for a share of memory and work."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_fixtures import KEY, OTHER_KEY, WIDTH, Step, curved_loss, curved_params, flat, make_plan
from test_noise import reference_words

from dpscale import noise
from dpscale.chacha import key_words
from dpscale.errors import InputError
from dpscale.optimizer import make_optimizer
from dpscale.placement import join, vector_size
from dpscale.replicas import ReplicaCheck
from dpscale.sections import OptimizerSection
from dpscale.state import RIDERS
from dpscale.step import build_finalize, requests_array

RNG = np.random.default_rng(5)
FEATURES, LABELS = RNG.standard_normal((2, 11, 6)), RNG.standard_normal((2, 11))
OPTIMIZERS = [
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "lamb", "weight_decay": 0.1},
]


def curved(devices: int, sharded: bool, options: dict, ema_decay: float | None = None) -> Step:
    optimizer = make_optimizer(OptimizerSection.model_validate({"learning_rate": 0.1, **options}), 10)
    return Step(
        devices=devices,
        physical_batch_size=4,
        params=curved_params(),
        loss=curved_loss,
        feature_shape=(6,),
        optimizer=optimizer,
        sharded=sharded,
        ema_decay=ema_decay,
    )


def three_steps(step: Step):
    state, _ = step(step.rows(FEATURES[0], LABELS[0]))
    state, _ = step(state=state, key=OTHER_KEY)
    return step(step.rows(FEATURES[1], LABELS[1]), state=state)


@pytest.mark.parametrize(("devices", "options"), [(8, options) for options in OPTIMIZERS] + [(2, OPTIMIZERS[-1])])
def test_parameters_and_statistics_are_those_of_the_whole_update(devices, options):
    (whole, expected), (cut, statistics) = (three_steps(curved(devices, sharded, options)) for sharded in (False, True))
    for mine, theirs in zip(jax.tree.leaves(cut.params), jax.tree.leaves(whole.params), strict=True):
        # Entries of order 1; sums in another order, and adam's quotient of them, over three steps.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics[:RIDERS], expected[:RIDERS], rtol=1e-6)
    assert int(cut.step) == int(whole.step) == 3


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_step_draws_the_words_of_pure_python_chacha20_in_both_modes(monkeypatch, devices, sharded):
    def shown_words(high, low, angle):
        # Words instead of normals: 24 bits of two sums in which every bit of every word counts.
        return tuple((x >> 8).astype(jnp.float32) for x in digest(high, low, angle))

    def digest(high, low, angle):
        return high * 3 + low * 5 + angle * 7, high * 11 + low * 13 + angle * 17

    monkeypatch.setattr(noise, "box_muller", shown_words)
    step = Step(devices=devices, sharded=sharded)
    stddev, divisor = np.float32(step.plan.noise_stddev), np.float32(step.plan.expected_batch_size)
    expected = []
    for index in range(WIDTH):
        *words, sine = reference_words(KEY, index)
        expected.append(np.float32(digest(*words)[sine] % 2**32 >> 8) * stddev / divisor)
    np.testing.assert_array_equal(step.gradient(), np.array(expected, np.float32))


def test_nothing_but_zeros_is_kept_past_the_parameters():
    state, _ = three_steps(curved(8, True, {"name": "adamw", "weight_decay": 0.1}))
    elements = flat(curved_params()).size
    vectors = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 1]
    assert [vector.shape for vector in vectors] == [(vector_size(curved_params(), 8),)] * 2
    for vector in vectors:
        assert np.all(vector[:elements] != 0)
        assert not np.any(vector[elements:])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_average_is_the_recursion_over_the_noised_parameters_with_its_warm_up(sharded):
    step = curved(8, sharded, {"name": "sgd"}, ema_decay=0.15)
    state = step.new_state()
    expected = flat(state.params).astype(np.float64)
    np.testing.assert_array_equal(flat(state.ema), expected)
    for t, key in enumerate([KEY, OTHER_KEY, KEY]):
        state, _ = step(step.rows(FEATURES[0], LABELS[0]), state=state, key=key)
        kept = min(0.15, (1 + t) / (10 + t))  # 0.1, then 0.15
        expected = kept * expected + (1 - kept) * flat(state.params)
        np.testing.assert_allclose(flat(state.ema), expected, rtol=1e-5, atol=1e-6)


def test_parameters_stay_equal_on_all_devices():
    step = curved(8, True, {"name": "adamw"})
    state, _ = three_steps(step)
    ReplicaCheck(step.mesh).send(state.params, bytes(16)).agreed()


def bytes_of(step: Step) -> tuple[int, int]:
    """(arguments, temporaries) of the compiled finalize on one device."""
    memory = step.functions.finalize.memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def test_each_device_keeps_one_share_of_the_optimizer_state_and_needs_no_more_room_for_it():
    params = {"w": jnp.zeros((100, 100)), "b": jnp.zeros(7)}
    count = 10_007
    adam = make_optimizer(OptimizerSection.model_validate({"name": "adam"}), 10)
    made = [Step(devices=8, params=params, feature_shape=(count,), optimizer=adam, sharded=on) for on in (False, True)]
    (whole, whole_room), (cut, cut_room) = map(bytes_of, made)
    shard = vector_size(params, 8) // 8
    # Two moments, of four bytes: everything else that a device holds is the same.
    assert whole - cut == 2 * 4 * (count - shard)
    assert cut_room <= whole_room + 4 * shard
    state = made[1].new_state()
    on_one = [leaf.addressable_data(0).size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert on_one == [shard, shard]


def test_noise_is_drawn_for_one_shard_on_each_device():
    """Counted in the program: the loop that draws fills a shard, not the whole vector."""
    params = {"w": jnp.zeros(40_000)}
    step = Step(devices=8, params=params, feature_shape=(40_000,), sharded=True)
    requests = requests_array(step.mesh, stop=False, save=False)
    text = str(
        jax.make_jaxpr(step.jitted_finalize)(step.new_state(), step.functions.zero_sums(), requests, key_words(KEY))
    )
    drawn = {int(size) for size in re.findall(r"f32\[(\d+)\] = dynamic_update_slice", text)}
    assert drawn == {vector_size(params, 8) // 8}


def test_both_ways_to_reduce_at_once_are_refused():
    with pytest.raises(InputError, match="exclude each other"):
        build_finalize(
            Step(devices=2).mesh, make_plan(), optax.identity(), sharded=True, reduce_every_accumulation=True
        )


def test_the_vector_holds_parameters_statistics_and_padding():
    assert [vector_size(curved_params(), devices) for devices in (1, 8)] == [47, 48]
    assert [vector_size(curved_params(), devices, 6) for devices in (1, 8)] == [53, 56]
    joined = np.asarray(join({"a": jnp.arange(3.0), "b": jnp.ones((), jnp.bfloat16)}, 6))
    np.testing.assert_array_equal(joined, [0, 1, 2, 1, 0, 0])
    assert RIDERS == 7
