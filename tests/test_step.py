"""Laws of one logical step: what is summed, what is noised, by what it is divided, and what may not leak in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_fixtures import (
    KEY,
    LINEAR,
    OTHER_KEY,
    WIDTH,
    Step,
    capture,
    curved_loss,
    curved_params,
    flat,
    linear_loss,
    make_plan,
)

from dpscale.chacha import key_words
from dpscale.clipping import ROUNDING_SLACK, NormGroups
from dpscale.errors import InputError
from dpscale.noise import standard_normal
from dpscale.optimizer import Optimizer
from dpscale.state import RIDERS, Statistics, TrainState
from dpscale.step import Sums, requests_array

DEVICES = [1, 2, 8]
EPS = 2.0**-24
# Of a Box-Muller value between two compiled programs: 2**-20 each (test_noise.py).
NOISE_RTOL = 2.0**-19
COLLECTIVES = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all)(?:-start)?\("
)


@lru_cache
def step_on(devices: int, method: str = "materialize") -> Step:
    """Linear loss, optimizer that only looks: clip norm 1, sigma 1, expected batch 8."""
    return Step(devices=devices, method=method)


def unit(place: int, size: float = 1.0) -> np.ndarray:
    return size * np.eye(WIDTH, dtype=np.float32)[place]


def known_noise(plan, count: int, key: bytes = KEY) -> np.ndarray:
    normals = jax.jit(standard_normal, static_argnums=2)(key_words(key), 0, count)
    return plan.noise_stddev * np.asarray(normals, np.float64)


def collectives(compiled_text: str) -> list[tuple[str, str]]:
    """(operation, its result's type) of every collective in an optimised program."""
    return [(name, kind) for kind, name in COLLECTIVES.findall(compiled_text)]


# `linear_loss`'s leaves, v before w; 0.6 and 0.8 are the norms that a bound of 1 in all could be made of.
GROUPS = NormGroups(("v", "w"), (0, 1), (0.6, 0.8))


# The reduction


def check_reductions(step: Step) -> None:
    """float32, so four bytes each: the parameters and seven statistics (and padding to equal shards), nothing else.

    Sums of groups ride along where they are asked for.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.params))
    riders = 7 + (0 if step.norm_groups is None else step.norm_groups.num_sums)
    assert collectives(step.functions.accumulate.as_text()) == []
    found = [(name, re.sub(r"\{.*\}", "", kind)) for name, kind in collectives(step.functions.finalize.as_text())]
    if not step.placement.sharded:
        assert found == [("all-reduce", f"f32[{parameters + riders}]")]
        return
    shard = -(-(parameters + riders) // step.mesh.size)
    assert found == [("reduce-scatter", f"f32[{shard}]"), ("all-gather", f"f32[{shard * step.mesh.size}]")]


def test_finalize_has_exactly_one_reduction_of_parameters_and_statistics_and_accumulate_has_none():
    assert RIDERS == 7
    check_reductions(step_on(8))


def test_an_optimizer_with_state_and_the_engine_of_choice_add_no_collective():
    check_reductions(nonlinear(8, "auto"))


def test_on_shards_there_is_one_reduce_scatter_and_one_all_gather():
    check_reductions(nonlinear(8, "auto", sharded=True))


@pytest.mark.parametrize("sharded", [False, True])
def test_norms_of_groups_ride_in_the_same_collectives(sharded):
    check_reductions(Step(devices=8, sharded=sharded, norm_groups=GROUPS))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("accumulations", [1, 50])
def test_a_whole_logical_step_reduces_once_whatever_the_number_of_accumulations(accumulations, sharded):
    step = Step(devices=8, physical_batch_size=1, sharded=sharded)

    def logical_step(state, sums, rows, requests):
        for _ in range(accumulations):
            sums = step.jitted_accumulate(state.params, sums, {}, rows, np.zeros(2, np.uint32))
        return step.jitted_finalize(state, sums, requests, key_words(KEY))

    requests = requests_array(step.mesh, stop=False, save=False)
    arguments = (step.new_state(), step.functions.zero_sums(), step.rows([])[0], requests)
    text = jax.jit(logical_step).lower(*arguments).compile().as_text()
    names = [name for name, _ in collectives(text)]
    assert names == (["reduce-scatter", "all-gather"] if sharded else ["all-reduce"])


def test_the_switch_to_reduce_every_accumulation_reduces_the_gradients_there_and_only_there():
    step = Step(devices=8, reduce_every_accumulation=True)
    found = [collectives(function.as_text()) for function in (step.functions.accumulate, step.functions.finalize)]
    assert [[(name, re.sub(r"\{.*\}", "", kind)) for name, kind in each] for each in found] == [
        [("all-reduce", f"f32[{WIDTH}]")],
        [("all-reduce", "f32[7]")],
    ]


@pytest.mark.parametrize("devices", [1, 8])
def test_reducing_every_accumulation_gives_the_same_step(devices):
    examples = np.random.default_rng(1).standard_normal((37, WIDTH))
    once, often = (Step(devices=devices, reduce_every_accumulation=every) for every in (False, True))
    expected, statistics = once(once.rows(examples), stop=True)
    got, found = often(often.rows(examples), stop=True)
    # 37 terms of at most 1 in another order, and the noise's rounding.
    np.testing.assert_allclose(flat(got.opt_state), flat(expected.opt_state), rtol=NOISE_RTOL, atol=37 * EPS)
    np.testing.assert_allclose(found[:RIDERS], statistics[:RIDERS], rtol=1e-6)
    empty, _ = often()
    np.testing.assert_allclose(flat(empty.opt_state), flat(once()[0].opt_state), rtol=NOISE_RTOL)


MANY_DEVICES = """
import jax
from step_fixtures import Step
from test_step import check_reductions
assert jax.device_count() == {devices}
check_reductions(Step(devices={devices}, physical_batch_size=1))
check_reductions(Step(devices={devices}, physical_batch_size=1, sharded=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [80, 512])
def test_the_collectives_are_the_same_on_80_and_512_devices(devices):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), env.get("PYTHONPATH", "")])
    program = [sys.executable, "-c", MANY_DEVICES.format(devices=devices)]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# What reaches the optimizer: clip -> reduce -> noise -> divide


@pytest.mark.parametrize("devices", DEVICES)
def test_a_planted_unit_gradient_is_exactly_what_the_output_has_more_than_the_known_noise(devices):
    step = step_on(devices)
    with_it, without = step.gradient(step.rows([unit(17)])), step.gradient()
    # The sum 1 + noise and its quotient round once each.
    tolerance = float(2 * EPS * (np.abs(with_it[17]) + np.abs(without[17])))
    assert with_it[17] - without[17] == pytest.approx(1 / step.plan.expected_batch_size, abs=tolerance)
    np.testing.assert_array_equal(np.delete(with_it, 17), np.delete(without, 17))


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_clip_then_reduce_then_noise_then_divide_then_optimizer(devices):
    """Each stage leaves a trace of its own: moving one of them changes the value by far more than rounding."""
    plan = make_plan(expected=5.0, clip_norm=3.0, sigma=0.7)
    step = Step(devices=devices, plan=plan)
    # Two rows on one device and one on the next; two are above the bound. Clipping after a sum would give other values.
    examples = [unit(0, 6.0), unit(0, 2.0), unit(39, -9.0), unit(20, 0.5)]
    clipped_sum = unit(0, 3.0 + 2.0) + unit(39, -3.0) + unit(20, 0.5)
    noise = known_noise(plan, WIDTH)
    got = step.gradient(step.rows(examples))
    tolerance = NOISE_RTOL * np.abs(noise) + 8 * EPS * np.abs(clipped_sum) + ROUNDING_SLACK * np.abs(clipped_sum)
    np.testing.assert_array_less(np.abs(got * plan.expected_batch_size - (clipped_sum + noise)), tolerance + 1e-30)


@pytest.mark.parametrize("devices", DEVICES)
def test_noise_is_drawn_once_per_logical_step_whatever_the_number_of_accumulations(devices):
    step = step_on(devices)
    nothing = step.rows([np.zeros(WIDTH)] * step.rows_at_once)
    none, one, four = (step.gradient(nothing * k) for k in (0, 1, 4))
    np.testing.assert_array_equal(none, one)
    np.testing.assert_array_equal(none, four)
    noise = known_noise(step.plan, WIDTH) / step.plan.expected_batch_size
    np.testing.assert_allclose(none, noise, rtol=NOISE_RTOL)
    assert np.all(step.gradient(key=OTHER_KEY) != none)


def test_the_noise_is_the_same_on_any_mesh_to_the_last_bits():
    one, two, eight = (step_on(devices).gradient() for devices in DEVICES)
    np.testing.assert_allclose(two, one, rtol=NOISE_RTOL)
    np.testing.assert_allclose(eight, one, rtol=NOISE_RTOL)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_divisor_is_the_public_expected_batch_size_never_the_realised_one(devices):
    step = step_on(devices)
    example = step.rows([unit(5, 0.25)])
    in_small = step.gradient(example) - step.gradient()
    company = [unit(9)] * 37
    in_large = step.gradient(step.rows([unit(5, 0.25), *company])) - step.gradient(step.rows(company))
    # Coordinate 5 holds 0.25 and noise; both differences round as in the planted-gradient law.
    tolerance = float(4 * EPS * (0.25 + 2 * np.abs(step.gradient()[5])))
    assert in_small[5] == pytest.approx(0.25 / 8, abs=tolerance)
    assert in_large[5] == pytest.approx(in_small[5], abs=tolerance)


def test_the_noise_does_not_change_with_the_realised_batch_size():
    step = step_on(2)
    untouched = np.arange(1, WIDTH)  # gradients lie in coordinate 0 only
    sizes = [0, 1, 3, 50]
    noises = [step.gradient(step.rows([unit(0)] * size)[: None if size else 0])[untouched] for size in sizes]
    for noise in noises[1:]:
        np.testing.assert_array_equal(noise, noises[0])


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_an_empty_draw_is_a_step_noised_counted_and_moving_every_parameter(devices):
    step = Step(devices=devices, optimizer=optax.sgd(0.5))
    before = flat(step.new_state().params)
    state, statistics = step()
    assert int(state.step) == 1
    assert statistics == Statistics(0, 0, 0, 0, 0, 0, 0)
    noise = known_noise(step.plan, WIDTH) / step.plan.expected_batch_size
    np.testing.assert_allclose(flat(state.params) - before, -0.5 * noise, rtol=NOISE_RTOL)
    state, _ = step(state=state, key=OTHER_KEY)
    assert int(state.step) == 2


def test_with_zero_gradients_every_trainable_leaf_moves_also_one_that_the_loss_never_uses():
    params = {**curved_params(), "unused": jnp.ones((3, 2)), "scalar": jnp.ones(())}
    step = Step(
        params=params,
        loss=lambda p, example: 0.0 * curved_loss(p, example),
        feature_shape=(6,),
        optimizer=optax.sgd(0.1, momentum=0.9),
    )
    state, _ = step(step.rows(np.ones((2, 6))))
    for name, leaf in params.items():
        assert np.all(np.asarray(state.params[name]) != np.asarray(leaf)), name


def test_a_tied_leaf_enters_the_norm_once():
    tied = Step(
        params={"w": jnp.zeros(4)},
        loss=lambda p, example: jnp.dot(example["features"], p["w"]) + jnp.dot(example["features"][::-1], p["w"]),
        feature_shape=(4,),
    )
    example = np.array([[3.0, 1.0, 0.0, 4.0]])
    total = example[0] + example[0][::-1]  # one leaf: its uses add up before the norm is taken
    np.testing.assert_allclose(tied.sums(tied.rows(example)), total / np.linalg.norm(total), rtol=ROUNDING_SLACK)


# Rows that must not count


GARBAGE = [np.nan, np.inf, -np.inf, 1e38]


@lru_cache
def nonlinear(devices: int, method: str, sharded: bool = False, ema_decay: float | None = None) -> Step:
    return Step(
        ema_decay=ema_decay,
        sharded=sharded,
        devices=devices,
        physical_batch_size=4,
        params=curved_params(),
        loss=curved_loss,
        method=method,
        feature_shape=(6,),
        optimizer=Optimizer(optax.scale_by_adam(), optax.scale_by_learning_rate(0.1)),
    )


def same_bits(left, right) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("devices", "method"), [(1, "materialize"), (8, "auto")])
def test_padding_and_bad_rows_leave_the_same_bits_as_rows_that_are_not_there(devices, method):
    step = nonlinear(devices, method)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((11, 6)).astype(np.float32)
    labels = rng.standard_normal(11).astype(np.float32)
    clean, _ = step(step.rows(features, labels))
    for value in GARBAGE:
        dirty, _ = step(step.rows(features, labels, filler=value))
        same_bits(dirty, clean)

    keep = np.ones(11, bool)
    keep[[0, 5]] = False  # one of them first on its device
    masked = place_masked(step, features, labels, keep)
    left_out, _ = step(masked)
    for value in GARBAGE[:3]:
        bad = features.copy()
        bad[~keep] = value
        poisoned, statistics = step(step.rows(bad, labels))
        same_bits(poisoned, left_out)
        assert statistics.examples == 11
        assert statistics.nonfinite == 2
        assert np.isfinite([*statistics[:RIDERS], *statistics.groups]).all()


def place_masked(step: Step, features, labels, keep):
    size = step.rows_at_once
    total = -(-len(features) // size) * size
    pad = total - len(features)
    features, labels = np.pad(features, ((0, pad), (0, 0))), np.pad(labels, (0, pad))
    mask = np.pad(keep, (0, pad))
    return [
        step.place(features[k : k + size], labels[k : k + size], mask[k : k + size], np.arange(k, k + size))
        for k in range(0, total, size)
    ]


@pytest.mark.parametrize(("devices", "method"), [(1, "materialize"), (8, "auto")])
def test_a_batch_of_bad_rows_only_is_an_empty_draw(devices, method):
    step = nonlinear(devices, method)
    empty, _ = step()
    poisoned, statistics = step(step.rows(np.full((5, 6), np.nan)))
    same_bits(poisoned, empty)
    assert statistics.nonfinite == 5


# What must not flow into the state


@pytest.mark.parametrize("sharded", [False, True])
def test_statistics_and_requests_never_touch_the_state(sharded):
    """Identical noisy sums, every other fact about the data different: all state identical."""
    step = nonlinear(8, "auto", sharded, ema_decay=0.9)
    gradient = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape), jnp.float32), step.params)
    everything = [np.full((8, 5), value) for value in (0.0, 1e9, np.nan, -np.inf)]
    states = []
    for statistics in everything:
        like = step.functions.zero_sums()
        sums = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), Sums(gradient, jnp.float32(statistics)), like)
        asked = bool(np.any(statistics))
        requests = requests_array(step.mesh, stop=asked, save=asked)
        state, zeros, _ = step.functions.finalize(step.new_state(), sums, requests, key_words(KEY))
        states.append(state)
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(zeros))
    for state in states[1:]:
        same_bits(state, states[0])


def test_nothing_of_one_step_is_left_in_the_sums_of_the_next():
    step = step_on(2)
    state, sums, _ = step.functions.finalize(
        step.new_state(),
        step.functions.accumulate(
            step.new_state().params, step.functions.zero_sums(), {}, step.rows([unit(3)])[0], np.zeros(2, np.uint32)
        ),
        requests_array(step.mesh, stop=True, save=True),
        key_words(KEY),
    )
    same_bits(sums, step.functions.zero_sums())
    again, _, statistics = step.functions.finalize(
        state, sums, requests_array(step.mesh, stop=False, save=False), key_words(KEY)
    )
    np.testing.assert_array_equal(flat(again.opt_state), step.gradient())
    assert not np.any(np.asarray(statistics))


def test_statistics_are_sums_over_all_devices_and_accumulations():
    step = step_on(8)
    examples = [unit(k % WIDTH, 0.5) for k in range(20)] + [unit(0, 2.0)] * 3 + [np.full(WIDTH, np.nan)]
    _, statistics = step(step.rows(examples), stop=True)
    assert statistics == Statistics(examples=24, clipped=3, nonfinite=1, loss=0, norm=16.0, stop=8, save=0)
    _, statistics = step(save=True)
    assert (statistics.stop, statistics.save) == (0, 8)


@pytest.mark.parametrize(
    ("devices", "how"), [(1, {}), (8, {}), (8, {"sharded": True}), (8, {"reduce_every_accumulation": True})]
)
def test_norms_of_groups_are_sums_over_all_devices_and_accumulations_and_change_no_bit_of_the_step(devices, how):
    v = jax.tree.leaves(LINEAR)[0]
    examples = [unit(0, 0.5), unit(0, 0.7), 2.0 * unit(v.size) + 0.5 * unit(1), np.full(WIDTH, np.nan)]
    step = Step(devices=devices, norm_groups=GROUPS, **how)
    state, statistics = step(step.rows(examples, filler=np.inf), stop=True)
    np.testing.assert_allclose(statistics.groups, [1.7, 2.0, 1, 1], rtol=1e-6)  # norms of v and w; above 0.6 and 0.8
    plain = Step(devices=devices, **how)
    expected, without = plain(plain.rows(examples, filler=np.inf), stop=True)
    assert without.groups == ()
    assert statistics._replace(groups=()) == without
    np.testing.assert_array_equal(flat(state.opt_state)[:WIDTH], flat(expected.opt_state)[:WIDTH])
    _, statistics = step()
    assert statistics.groups == (0, 0, 0, 0)


def test_the_callers_parameters_are_left_alone():
    step = nonlinear(1, "materialize")
    copies = jax.tree.map(lambda leaf: np.array(leaf, copy=True), step.params)
    state, _ = step()
    step(state=state)
    same_bits(step.params, copies)


@pytest.mark.parametrize(
    ("leaf", "seen"),
    [
        (jnp.arange(3), r"int32\[3\]"),
        (jnp.zeros((0, 4)), r"float32\[0, 4\]"),
        (jnp.zeros(2, bool), r"bool\[2\]"),
        (jnp.zeros(2, jnp.complex64), r"complex64\[2\]"),
    ],
)
def test_a_leaf_that_cannot_be_trained_is_refused_by_its_name(leaf, seen):
    with pytest.raises(InputError, match=rf"\['layer'\]\['n'\] is {seen}"):
        TrainState.create({"w": jnp.zeros(3), "layer": {"n": leaf}}, capture())


def test_a_batch_of_another_shape_is_refused_and_not_compiled_for():
    step = step_on(2)
    (larger,) = Step(devices=2, physical_batch_size=3).rows([unit(0)])
    with pytest.raises(TypeError, match="compiled"):
        step([larger])


# Precision


def bfloat16_loss(params, example):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return linear_loss(low, {"features": example["features"].astype(jnp.bfloat16)}).astype(jnp.float32)


def floats_of(jaxpr) -> set[str]:
    return set(re.findall(r"\b(b?f(?:16|32|64))\[", str(jaxpr)))


@pytest.mark.parametrize("sharded", [False, True])
def test_sums_reduction_and_noise_are_float32_also_where_the_model_computes_in_bfloat16(sharded):
    step = Step(devices=2, loss=bfloat16_loss, physical_batch_size=2, sharded=sharded)
    state, sums = step.new_state(), step_on(2).functions.zero_sums()
    finalize = jax.make_jaxpr(step.jitted_finalize)(
        state, sums, requests_array(step.mesh, stop=False, save=False), key_words(KEY)
    )
    assert floats_of(finalize) == {"f32"}
    assert not re.search(r"\b(bf16|f16)\[", step_on(2).functions.finalize.as_text())
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}
    out = jax.eval_shape(step.jitted_accumulate, state.params, sums, {}, step.rows([])[0], np.zeros(2, np.uint32))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("method", [pytest.param("materialize", marks=pytest.mark.slow), "auto"])
def test_a_sum_of_257_ones_is_257_also_where_the_model_computes_in_bfloat16(method):
    """bfloat16 has 8 bits: 256 + 1 = 256, in one physical batch or over several."""
    step = Step(loss=bfloat16_loss, method=method, physical_batch_size=257)
    for batches in (1, 3):
        total = step.sums(step.rows([unit(2)] * 257 * batches))
        # The engine may clip by an upper bound of the norm, within the slack; integers below 2**24 add exactly.
        assert total[2] == pytest.approx(257 * batches, rel=ROUNDING_SLACK)


@pytest.mark.parametrize("method", [pytest.param("materialize", marks=pytest.mark.slow), "auto"])
def test_no_example_moves_the_sum_by_more_than_the_bound_that_the_noise_is_made_for(method):
    step = Step(
        plan=make_plan(clip_norm=0.3), params=curved_params(), loss=curved_loss, method=method, feature_shape=(6,)
    )
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 1e3, 1e6):
        for row in scale * rng.standard_normal((6, 6)):
            moved = np.linalg.norm(step.sums(step.rows([row], [3.0])))
            assert moved <= step.plan.noise_stddev / step.plan.noise_multiplier
    assert step.plan.noise_stddev == 0.3 * (1 + ROUNDING_SLACK)


# Keys and data are arguments


@pytest.mark.parametrize("residence", ["host", "device"])
def test_keys_and_data_are_arguments_and_never_in_the_program(residence):
    rng = np.random.default_rng(5)
    key = rng.integers(2**31, 2**32, 8, dtype=np.uint32)
    example_key = rng.integers(2**31, 2**32, 2, dtype=np.uint32)
    values = rng.standard_normal((5, WIDTH)).astype(np.float32)
    table = {"features": values, "label": np.zeros(5, np.float32)} if residence == "device" else {}

    def loss(params, example, key):
        return linear_loss(params, example) * jax.random.bernoulli(key)

    step = Step(loss=loss, uses_key=True, physical_batch_size=5)
    (rows,) = step.rows(values)
    if table:
        rows = rows._replace(arrays={"index": jnp.arange(5, dtype=jnp.int32)})
    sums = Sums(jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), step.params), jnp.zeros((1, 5)))
    state, requests = step.new_state(), requests_array(step.mesh, stop=False, save=False)
    lowered = [
        step.jitted_accumulate.lower(state.params, sums, table, rows, example_key),
        *([step.jitted_finalize.lower(state, sums, requests, key)] if residence == "host" else []),
    ]
    text = "\n".join(program.as_text() for program in lowered).lower()
    for word in (
        *key.tolist(),
        *example_key.tolist(),
        *values.view(np.uint32).reshape(-1)[:20].tolist(),
    ):  # in decimal, signed, hexadecimal, and as bytes
        for form in (str(word), str(word - 2**32), f"{word:08x}", word.to_bytes(4, "little").hex()):
            assert form not in text
    for value in values.reshape(-1)[:20].tolist():  # as -1.2345e+00 or -1.2345
        assert f"{value:.6e}"[:6] not in text
