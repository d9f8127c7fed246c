"""Laws of restoring: whole or cut, on any number of devices, the run goes on as if nothing had happened."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from step_fixtures import Step, curved_params
from test_shard_update import FEATURES, LABELS, curved

from dpscale.checkpoint import Checkpoints
from dpscale.errors import RunDirectoryError
from dpscale.placement import Placement
from dpscale.restore import restore

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIONS = {"name": "lamb", "weight_decay": 0.1}


def save(directory, step: Step, state) -> None:
    checkpoints = Checkpoints(directory, keep=3)
    checkpoints.save(int(state.step), state, {})
    checkpoints.wait()
    checkpoints.close()


def load(directory, step: Step):
    checkpoints = Checkpoints(directory, keep=3)
    try:
        return restore(checkpoints, 1, step.placement, curved_params())
    finally:
        checkpoints.close()


def after_one(step: Step):
    state, _ = step(step.rows(FEATURES[0], LABELS[0]))
    return state


def go_on(step: Step, state):
    state, _ = step(step.rows(FEATURES[1], LABELS[1]), state=state)
    return state


@pytest.fixture(scope="module")
def uninterrupted():
    step = curved(8, False, OPTIONS)
    return jax.tree.map(np.asarray, go_on(step, after_one(step)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((8, True), (8, True)),
        ((8, True), (2, True)),
        ((2, True), (8, True)),
        ((8, False), (2, True)),
        ((2, True), (8, False)),
    ],
    ids=str,
)
def test_a_run_goes_on_to_the_same_end_on_other_devices_and_in_the_other_mode(before, after, uninterrupted, tmp_path):
    first, second = (curved(devices, sharded, OPTIONS) for devices, sharded in (before, after))
    save(tmp_path, first, after_one(first))
    state = go_on(second, load(tmp_path, second))
    assert int(state.step) == 2
    for mine, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(uninterrupted.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


def test_cut_state_read_on_as_many_devices_has_the_same_bits_and_lies_as_it_did(tmp_path):
    step = curved(8, True, OPTIONS)
    state = after_one(step)
    save(tmp_path, step, state)
    for mine, theirs in zip(jax.tree.leaves(load(tmp_path, step)), jax.tree.leaves(state), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
        assert mine.sharding == theirs.sharding


def test_whole_to_cut_and_back_changes_no_bit():
    whole, cut = curved(8, False, OPTIONS), curved(8, True, OPTIONS)
    state = after_one(whole)
    expected = jax.tree.map(np.asarray, state)
    there = cut.placement.moved(state, whole.placement)
    back = whole.placement.moved(there, cut.placement)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
        assert np.asarray(mine).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_average_is_restored_bit_for_bit_begins_where_there_is_none_and_is_left_where_it_is_not_wanted(
    sharded, tmp_path
):
    with_it, without = (curved(8, sharded, OPTIONS, ema_decay=decay) for decay in (0.9, None))
    state = after_one(with_it)
    save(tmp_path / "with", with_it, state)
    for mine, theirs in zip(jax.tree.leaves(load(tmp_path / "with", with_it)), jax.tree.leaves(state), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    assert load(tmp_path / "with", without).ema is None
    save(tmp_path / "without", without, after_one(without))
    late = load(tmp_path / "without", with_it)
    for mine, theirs in zip(jax.tree.leaves(late.ema), jax.tree.leaves(late.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    go_on(with_it, late)  # in buffers of its own: the step gives away those of the state


def test_a_cut_checkpoint_of_another_optimizer_is_refused(tmp_path):
    step = curved(8, True, OPTIONS)
    save(tmp_path, step, after_one(step))
    other = curved(8, True, {"name": "sgd", "momentum": 0.9})
    assert isinstance(other.placement, Placement)
    with pytest.raises(RunDirectoryError, match="does not hold this model and optimizer"):
        load(tmp_path, other)
