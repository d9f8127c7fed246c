"""Laws of one measured point, on the eight virtual devices of the tests."""

from __future__ import annotations

import numpy as np
import pytest

from dpscale.config import config_from_dict
from dpscale.errors import InputError
from dpscale.sampling import PoissonSampler
from dpscale.scaling.bench import LEAD_IN_STEPS, SECRET, WARM_UP_STEPS, Bench
from dpscale.scaling.measure import measure
from dpscale.scaling.options import Effort
from dpscale.scaling.parts import over_processes
from dpscale.scaling.point import Setting
from dpscale.scaling.record import read_record
from dpscale.scaling.sweep import collect

N, BATCH, PHYSICAL, DEVICES = 400, 100.0, 4, 8
CONFIG = config_from_dict(
    {
        "run": {"name": "small"},
        "data": {"train": f"made_up:vectors:{N}:8:3"},
        "model": {"name": "mlp"},
        "training": {"steps": 4},
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "expected_batch_size": 7},
        "performance": {"physical_batch_size": PHYSICAL},
    }
)
SETTING = Setting(DEVICES, BATCH, ("strong",), 2)
EFFORT = Effort(windows=2, steps=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep")
    lines: list[str] = []
    records = measure(
        CONFIG, SETTING, ("private", "nonprivate"), directory, EFFORT, declared_public=False, say=lines.append
    )
    return directory, records, lines


@pytest.mark.slow
def test_each_variant_gets_a_record_that_is_read_back_equal(measured):
    directory, records, lines = measured
    assert list(collect(directory).records) == sorted(records, key=lambda r: r.variant)
    for record in records:
        assert read_record(directory / "records" / record.file_name) == record
        assert (record.devices, record.batch, record.repeat) == (DEVICES, BATCH, 2)
    assert [p.name for p in directory.iterdir()] == ["records"], "the checkpoint that was timed is gone"
    assert any("compiled in" in line for line in lines)


@pytest.mark.slow
def test_the_windows_are_consecutive_draws_after_warm_up_and_lead_in_the_same_for_both_variants(measured):
    _, (private, nonprivate), _ = measured
    sampler = PoissonSampler(N, BATCH / N, SECRET.derive("sampling"))
    per_window = LEAD_IN_STEPS + EFFORT.steps
    for number, window in enumerate(private.windows):
        first = WARM_UP_STEPS + number * per_window + LEAD_IN_STEPS
        sizes = [len(sampler.indices(step)) for step in range(first, first + EFFORT.steps)]
        rows = PHYSICAL * DEVICES
        assert window.examples == sum(sizes)
        assert window.accumulations == sum(-(-size // rows) for size in sizes)
        assert window.rows == window.accumulations * rows
        assert (window.examples, window.rows) == (nonprivate.windows[number].examples, nonprivate.windows[number].rows)


@pytest.mark.slow
def test_every_part_of_the_step_has_a_time_and_only_privacy_has_noise(measured):
    _, (private, nonprivate), _ = measured
    for record in (private, nonprivate):
        parts = record.parts
        assert min(parts.accumulate, parts.reduction, parts.update, parts.finalize, parts.transfer) > 0
        assert parts.checkpoint is not None
        assert parts.checkpoint > 0
        assert all(window.loop_s > 0 and window.device_s > 0 and window.input_wait_s >= 0 for window in record.windows)
        assert record.compile_s > 0
        assert record.environment["packages"]["jax"]
    assert private.parts.noise > 0 == nonprivate.parts.noise


@pytest.mark.slow
def test_the_measured_step_is_the_step_that_trains(measured):
    """The bench's state after some steps is what the same functions give by hand: nothing is skipped for speed."""
    bench = Bench(CONFIG, SETTING, "private", Effort(windows=1, steps=1, checkpoint=False))
    before = [np.asarray(leaf) for leaf in _leaves(bench.state.params)]
    bench.warm_up()
    assert int(bench.state.step) == WARM_UP_STEPS + 1  # the replay made one
    bench.window()
    assert int(bench.state.step) == WARM_UP_STEPS + 1 + LEAD_IN_STEPS + 2
    after = [np.asarray(leaf) for leaf in _leaves(bench.state.params)]
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))
    bench.close()


def test_private_data_are_refused_before_any_row_is_read(tmp_path):
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"train": "patients.npz"})})
    with pytest.raises(InputError, match="may be private"):
        measure(config, SETTING, ("private",), tmp_path, EFFORT, declared_public=False, say=print)


def test_another_number_of_devices_is_refused(tmp_path):
    with pytest.raises(InputError, match="8 devices in 1 processes are here, but the point has 3"):
        measure(
            CONFIG, Setting(3, BATCH, ("strong",), 1), ("private",), tmp_path, EFFORT, declared_public=False, say=print
        )


def test_a_process_alone_is_the_slowest():
    np.testing.assert_array_equal(over_processes(np.array([1.25, 1e-9])), [1.25, 1e-9])


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
