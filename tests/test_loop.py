"""Laws of the loop: agreement two steps later, charge before dispatch, keys, and one result whatever the layout."""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_fixtures import curved_loss, curved_params, flat, make_plan, mesh_of

from dpscale.batching import BatchLayout
from dpscale.chacha import key_words
from dpscale.clipping import clipped_grad
from dpscale.data.arrays import ArraySource
from dpscale.feed import Feed, blank_rows
from dpscale.loop import STEPS_IN_FLIGHT, StepKeys, training_steps
from dpscale.mesh import place_replicated
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler
from dpscale.sections import DataSection
from dpscale.state import RIDERS, Statistics, TrainState
from dpscale.step import StepFunctions, build_accumulate, build_finalize, compile_steps, requests_array

KEYS = StepKeys(RootSecret.from_insecure_seed(11), attempt=0)
NOTHING = Statistics(0, 0, 0, 0, 0, 0, 0)


# The order of events, with step functions that only write down that they were called


class OnDevice:
    """Statistics of a step that are still on the devices: reading them waits, and is written down."""

    def __init__(self, events: list[tuple[str, int]], step: int, values: tuple[float, ...]) -> None:
        self._events, self._step, self._values = events, step, values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._events.append(("read", self._step))
        return np.array(self._values, np.float32)


class Played:
    """A loop over steps whose reductions are given: `reduced[step]`, nothing where a step is not named."""

    def __init__(self, steps: range, reduced: dict[int, Statistics], batches: int = 1, request: str = "") -> None:
        self.events: list[tuple[str, int]] = []
        self.statistics: list[Statistics] = []
        self.noise_keys: list[np.ndarray] = []
        self._reduced = reduced
        self.infos = list(
            training_steps(
                StepFunctions(self._accumulate, self._finalize, lambda: None),
                TrainState(steps.start, None, None),
                {},
                lambda step: [step] * batches,
                KEYS,
                steps,
                lambda step: self.events.append(("charge", step)),
                lambda: request,
                self._arrived,
            )
        )

    def _accumulate(self, params: Any, sums: Any, table: Any, rows: Any, key: Any) -> Any:
        self.events.append(("accumulate", rows))
        return sums

    def _finalize(self, state: Any, sums: Any, requests: Any, key: Any) -> Any:
        self.events.append(("finalize", state.step))
        self.noise_keys.append(key)
        reduced = self._reduced.get(state.step, NOTHING)._replace(examples=float(state.step))
        on_device = OnDevice(self.events, state.step, reduced[:RIDERS])
        return TrainState(state.step + 1, None, None), sums, on_device

    def _arrived(self, done: int, statistics: Statistics) -> None:
        self.events.append(("arrived", done))
        self.statistics.append(statistics)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_each_step_is_charged_before_anything_of_it_is_dispatched_and_finalized_once(batches):
    played = Played(range(4, 9), {}, batches)
    sent = [event for event in played.events if event[0] not in ("arrived", "read")]
    expected = [[("charge", t), *[("accumulate", t)] * batches, ("finalize", t)] for t in range(4, 9)]
    assert sent == [event for events in expected for event in events]
    assert [info.step for info in played.infos] == [5, 6, 7, 8, 9]


def test_the_loop_waits_for_the_step_two_before_and_for_no_later_one():
    assert STEPS_IN_FLIGHT == 2
    events = Played(range(6), {}).events
    for step in range(6):
        here = events.index(("charge", step))
        arrived = [done for name, done in events[:here] if name == "arrived"]
        assert arrived == list(range(1, step))  # "done" counts this step: steps 0 .. step - 2
    for step in range(STEPS_IN_FLIGHT, 6):
        # Between one step and the next the host reads one result, of the step two before: the last sent one is queued.
        between = events[events.index(("finalize", step - 1)) : events.index(("finalize", step))]
        assert [event for event in between if event[0] == "read"] == [("read", step - STEPS_IN_FLIGHT)]


@pytest.mark.parametrize("stop_at", [0, 1, 3, 6, 7])
def test_a_stop_ends_the_loop_two_steps_after_the_one_whose_reduction_holds_it(stop_at):
    reduced = {stop_at: NOTHING._replace(stop=1.0)}
    last = min(stop_at + STEPS_IN_FLIGHT, 8)
    for request in ("", "stop"):  # what this process itself asks for decides nothing: only the reduction does
        played = Played(range(8), reduced, request=request)
        assert [info.step for info in played.infos] == list(range(1, last + 1))
        charged = [step for name, step in played.events if name == "charge"]
        assert charged == list(range(last))


def test_a_request_to_stop_that_was_not_reduced_stops_nobody():
    assert len(Played(range(8), {}, request="stop").infos) == 8


@pytest.mark.parametrize("save_at", [0, 2, 4])
def test_a_save_is_agreed_two_steps_after_the_one_whose_reduction_holds_it_and_once(save_at):
    infos = Played(range(7), {save_at: NOTHING._replace(save=1.0)}).infos
    assert [info.step for info in infos if info.save] == [save_at + STEPS_IN_FLIGHT + 1]


@pytest.mark.parametrize("stop_at", [None, 0, 3, 5])
def test_statistics_of_every_dispatched_step_arrive_once_and_in_order(stop_at):
    reduced = {} if stop_at is None else {stop_at: NOTHING._replace(stop=1.0)}
    played = Played(range(6), reduced)
    steps = [info.step for info in played.infos]
    assert [done for name, done in played.events if name == "arrived"] == steps
    assert [statistics.examples for statistics in played.statistics] == [step - 1 for step in steps]


def test_no_steps_dispatch_and_charge_nothing():
    assert Played(range(3, 3), {}).events == []


# Keys


def test_noise_keys_follow_the_step_not_the_place_in_the_loop():
    whole, rest = Played(range(6), {}).noise_keys, Played(range(4, 6), {}).noise_keys
    np.testing.assert_array_equal(whole[4:], rest)
    expected = [key_words(KEYS.secret.derive("noise", 0, step)) for step in range(6)]
    np.testing.assert_array_equal(whole, expected)


def test_all_keys_over_steps_attempts_and_purposes_are_distinct():
    secret = RootSecret.from_insecure_seed(11)
    keys = [secret.derive("sampling")]
    for attempt, step in product(range(4), range(500)):
        of_attempt = StepKeys(secret, attempt)
        noise, examples = of_attempt.noise(step), of_attempt.examples(step)
        assert (noise.dtype, noise.shape) == (np.uint32, (8,))  # 256 bits
        assert (examples.dtype, examples.shape) == (np.uint32, (2,))  # 64 bits
        keys += [noise.tobytes(), examples.tobytes()]
    assert len(set(keys)) == len(keys)
    # No key is the beginning of another either: 8 bytes tell them all apart.
    assert len({key[:8] for key in keys}) == len(keys)
    # Every word of a key is used: 2000 random words of 32 bits hold a repeated one with probability 5e-4.
    words = np.array([StepKeys(secret, 0).examples(step) for step in range(2000)])
    assert [len(np.unique(word)) for word in words.T] == [2000, 2000]


def test_neighbouring_attempts_and_steps_are_not_confused():
    secret = RootSecret.from_insecure_seed(11)
    assert np.any(StepKeys(secret, 0).noise(1) != StepKeys(secret, 1).noise(0))
    assert np.any(StepKeys(secret, 0).noise(2**32) != StepKeys(secret, 0).noise(0))


# The whole path: sampler, loader, devices, accumulate, finalize


NUM_EXAMPLES, EXPECTED, STEPS = 50, 5.0, 6
LEARNING_RATE = 0.2


class Result(NamedTuple):
    indices: list[list[int]]  # drawn in each step, as they came
    noise_keys: list[bytes]
    params: np.ndarray
    sizes: list[float]
    compiled_before: list[str]
    compiled_after: list[str]


def source() -> ArraySource:
    rng = np.random.default_rng(2)
    return ArraySource(
        rng.standard_normal((NUM_EXAMPLES, 6)).astype(np.float32), rng.standard_normal(NUM_EXAMPLES).astype(np.float32)
    )


def keyed_loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
    """Augmentation by the example's key: the result changes if a key follows the place in the batch."""
    brightness = 0.5 + jax.random.key_data(key)[1].astype(jnp.float32) * 2.0**-32
    return curved_loss(params, {**example, "features": example["features"] * brightness})


@lru_cache
def seed_whose_first_draw_is_empty() -> int:
    rate = EXPECTED / NUM_EXAMPLES
    for seed in range(2000):
        secret = RootSecret.from_insecure_seed(seed)
        sampler = PoissonSampler(NUM_EXAMPLES, rate, secret.derive("sampling"))
        sizes = [len(sampler.indices(step)) for step in range(STEPS)]
        if sizes[0] == 0 and max(sizes) >= 9:
            return seed
    raise AssertionError("no such seed")


@lru_cache
def run(devices: int, physical_batch_size: int, residence: str) -> Result:
    """The steps of a run as `train` makes them, on some of the devices."""
    compiled: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            return _run(devices, physical_batch_size, residence, compiled)
    finally:
        logger.removeHandler(handler)


def _run(devices: int, physical_batch_size: int, residence: Any, log: list[str]) -> Result:
    mesh, layout = mesh_of(devices), BatchLayout(physical_batch_size, devices)
    keys = StepKeys(RootSecret.from_insecure_seed(seed_whose_first_draw_is_empty()), attempt=0)
    plan = make_plan(expected=EXPECTED, num_examples=NUM_EXAMPLES, sigma=0.5)
    sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, keys.secret.derive("sampling"))
    data, examples = DataSection(residence=residence), source()
    feed = Feed(mesh, examples, sampler, layout, attempt=0, start_step=0, stop_step=STEPS, data=data)
    optimizer = optax.sgd(LEARNING_RATE)
    state = place_replicated(mesh, TrainState.create(curved_params(), optimizer))
    summed = clipped_grad(keyed_loss, clip_norm=1.0, method="materialize")
    functions = compile_steps(
        build_accumulate(mesh, summed, 1.0, True),
        build_finalize(mesh, plan, optimizer),
        mesh,
        state,
        feed.table,
        blank_rows(mesh, examples, layout, data),
    )
    compiled_before = finished(log)
    log.clear()
    drawn: list[list[int]] = []
    noise_keys: list[bytes] = []

    def batches(step):
        drawn.append([])
        for rows in feed.batches(step):
            words = np.asarray(rows.id_words)[np.asarray(rows.mask)]
            drawn[-1] += (words[:, 0].astype(np.int64) * 2**32 + words[:, 1]).tolist()
            yield rows

    def finalize(*arguments):
        noise_keys.append(arguments[3].tobytes())
        return functions.finalize(*arguments)

    sizes: list[float] = []
    for info in training_steps(
        StepFunctions(functions.accumulate, finalize, functions.zero_sums),
        state,
        feed.table,
        batches,
        keys,
        range(STEPS),
        lambda step: None,
        lambda: requests_array(mesh, stop=False, save=False),
        lambda step, statistics: sizes.append(statistics.examples),
    ):
        state = info.state
    feed.close()
    return Result(drawn, noise_keys, flat(state.params), sizes, compiled_before, finished(log))


def finished(log: list[str]) -> list[str]:
    return [line.split("compilation of ")[1].split(" in ")[0] for line in log if "Finished XLA compilation" in line]


LAYOUTS = [(3, 2, "device"), (1, 8, "host")]
# Every physical batch on every number of devices, each of both with rows of both kinds.
PAIRS = enumerate(product((1, 3, 64), (1, 2, 8)))
ALL_LAYOUTS = [layout for at, pair in PAIRS if (layout := (*pair, ("device", "host")[at % 2])) not in LAYOUTS]


@pytest.mark.parametrize(
    ("physical_batch_size", "devices", "residence"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ALL_LAYOUTS)],
)
def test_physical_batch_devices_and_residence_change_no_index_no_noise_and_no_result(
    physical_batch_size, devices, residence
):
    one = run(1, 64, "host")
    other = run(devices, physical_batch_size, residence)
    assert other.indices == one.indices
    assert other.noise_keys == one.noise_keys
    assert other.sizes == one.sizes == [len(drawn) for drawn in one.indices]
    # A sum of n <= 12 vectors of norm <= 1 in another order differs by n^2 eps, the noise (sigma 0.5, below 5 sigma)
    # by 2.5 * 2**-19: 1.4e-5, of which a step passes on rate / expected = 0.04. The gradient follows the parameters
    # with a factor that stays below 2 over these six steps: 6 * 2 * 0.04 * 1.4e-5.
    np.testing.assert_allclose(other.params, one.params, rtol=0, atol=7e-6)
    assert np.max(np.abs(one.params - flat(curved_params()))) > 0.01


def test_an_empty_first_draw_and_any_later_one_compile_nothing_after_the_start():
    result = run(2, 3, "device")
    assert result.sizes[0] == 0
    assert len(set(result.sizes)) >= 4
    assert max(result.sizes) > 6  # more than one accumulation
    assert [name for name in result.compiled_before if "finalize" in name or "accumulate" in name] == [
        "jit(accumulate)",
        "jit(finalize)",
    ]
    assert result.compiled_after == []
