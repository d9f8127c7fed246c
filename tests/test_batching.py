"""Laws of the cut from a logical batch to physical batches."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpscale.batching import PADDING_INDEX, BatchLayout
from dpscale.errors import InputError
from dpscale.sampling import PoissonSampler

KEY = bytes(range(32))


@st.composite
def layouts_with_processes(draw):
    """A layout and a partition of its device positions, in any order, over one or more processes."""
    layout = BatchLayout(draw(st.integers(1, 9)), draw(st.integers(1, 8)), draw(st.sampled_from([0, 0, 120])))
    positions = draw(st.permutations(range(layout.num_devices)))
    owners = draw(st.lists(st.integers(0, 3), min_size=layout.num_devices, max_size=layout.num_devices))
    return layout, [[p for p, o in zip(positions, owners, strict=True) if o == process] for process in range(4)]


@settings(max_examples=200, deadline=None)
@given(case=layouts_with_processes(), n=st.integers(0, 300), offset=st.integers(0, 10**12))
def test_all_processes_together_load_exactly_the_draw(case, n, offset):
    layout, processes = case
    indices = offset + 3 * np.arange(n, dtype=np.int64)
    loaded = []
    for accumulation in range(layout.accumulations(n)):
        for positions in processes:
            ids, mask = layout.rows(indices, accumulation, positions)
            assert ids.shape == mask.shape == (len(positions) * layout.physical_batch_size,)
            assert ids.dtype == np.int64
            assert mask.dtype == bool
            assert np.all(ids[~mask] == PADDING_INDEX)
            loaded.append(ids[mask])
    assert np.array_equal(np.sort(np.concatenate([*loaded, np.empty(0, np.int64)])), indices)


@settings(max_examples=100, deadline=None)
@given(case=layouts_with_processes(), n=st.integers(0, 100), extra=st.integers(0, 3))
def test_a_process_has_the_rows_of_its_devices_in_their_order(case, n, extra):
    layout, processes = case
    size, indices = layout.physical_batch_size, np.arange(5, 5 + n)
    accumulation = max(layout.accumulations(n) - 1, 0) + extra
    whole, whole_mask = layout.rows(indices, accumulation, range(layout.num_devices))
    for positions in processes:
        ids, mask = layout.rows(indices, accumulation, positions)
        for mine, device in enumerate(positions):
            there, here = slice(device * size, (device + 1) * size), slice(mine * size, (mine + 1) * size)
            assert np.array_equal(ids[here], whole[there])
            assert np.array_equal(mask[here], whole_mask[there])
    if extra:
        assert not whole_mask.any()


@settings(max_examples=50, deadline=None)
@given(physical=st.integers(1, 9), devices=st.integers(1, 8), cap=st.integers(1, 100))
def test_padded_draws_up_to_the_cap_take_one_number_of_accumulations_and_larger_ones_are_not_cut(
    physical, devices, cap
):
    layout = BatchLayout(physical, devices, padded_to=cap)
    assert {layout.accumulations(n) for n in range(cap + 1)} == {-(-cap // (physical * devices))}
    assert layout.accumulations(cap + 1000) == BatchLayout(physical, devices).accumulations(cap + 1000)


def test_padding_waste_of_padded_draws_is_of_all_rows_that_are_computed():
    sampler = PoissonSampler(100, 0.1, KEY, max_batch_size=20)
    layout = BatchLayout(8, 1, padded_to=20)
    sizes, probabilities = sampler.size_distribution()
    assert layout.expected_padding_waste(sampler) == pytest.approx(1 - sizes @ probabilities / 24)


def test_rows_follow_the_draw_over_devices_then_accumulations():
    layout, indices = BatchLayout(2, 3), np.arange(100, 108)
    assert layout.accumulations(len(indices)) == 2
    assert layout.rows(indices, 0, [0, 1, 2])[0].tolist() == [100, 101, 102, 103, 104, 105]
    assert layout.rows(indices, 0, [2, 0])[0].tolist() == [104, 105, 100, 101]
    ids, mask = layout.rows(indices, 1, [0, 1])
    assert ids.tolist() == [106, 107, 0, 0]
    assert mask.tolist() == [True, True, False, False]


def test_the_draw_does_not_depend_on_the_layout():
    sampler = PoissonSampler(1000, 0.1, KEY)
    for step in range(3):
        indices = sampler.indices(step)
        for layout in (BatchLayout(1, 1), BatchLayout(16, 2), BatchLayout(7, 8), BatchLayout(500, 1)):
            parts = [
                layout.rows(indices, k, range(layout.num_devices)) for k in range(layout.accumulations(len(indices)))
            ]
            assert np.array_equal(np.concatenate([ids[mask] for ids, mask in parts]), indices)


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(0, 0), (1, 1), (11, 1), (12, 1), (13, 2), (24, 2), (25, 3), (10**9, 83333334)]
)
def test_accumulations_are_rows_over_rows_per_accumulation_rounded_up(num_rows, expected):
    assert BatchLayout(4, 3).rows_per_accumulation == 12
    assert BatchLayout(4, 3).accumulations(num_rows) == expected


def test_an_empty_draw_has_no_accumulation_and_an_empty_process_no_rows():
    layout = BatchLayout(4, 2)
    assert layout.accumulations(0) == 0
    ids, mask = layout.rows(np.empty(0, np.int64), 0, [0])
    assert ids.tolist() == [0] * 4
    assert not mask.any()
    ids, mask = layout.rows(np.arange(8), 0, [])
    assert ids.shape == mask.shape == (0,)


def test_draws_larger_than_planned_lose_no_row():
    layout, sampler = BatchLayout(2, 2), PoissonSampler(40, 0.9, KEY)
    planned = BatchLayout(2, 2).planned_accumulations(mean=4, std=1)
    indices = sampler.indices(0)
    assert layout.accumulations(len(indices)) > planned
    ids = [layout.rows(indices, k, [0, 1]) for k in range(layout.accumulations(len(indices)))]
    assert sum(int(mask.sum()) for _, mask in ids) == len(indices)


@pytest.mark.parametrize(
    ("mean", "std", "expected"), [(0, 0, 1), (1e-9, 1e-5, 1), (10, 0, 1), (10.5, 0, 2), (1024, 28, 114), (16, 1, 2)]
)
def test_planned_accumulations_hold_mean_plus_four_std(mean, std, expected):
    assert BatchLayout(5, 2).planned_accumulations(mean, std) == expected


@pytest.mark.parametrize("cap", [None, 9])
@pytest.mark.parametrize(("size", "devices"), [(1, 1), (2, 2), (8, 4), (50, 1)])
def test_expected_padding_waste_is_the_exact_expectation(size, devices, cap):
    n, q, layout = 30, 0.3, BatchLayout(size, devices)
    sampler = PoissonSampler(n, q, KEY, max_batch_size=cap)
    real = computed = 0.0
    for k in range(n + 1):
        probability, rows = comb(n, k) * q**k * (1 - q) ** (n - k), min(k, n if cap is None else cap)
        real += probability * rows
        computed += probability * -(-rows // layout.rows_per_accumulation) * layout.rows_per_accumulation
    assert layout.expected_padding_waste(sampler) == pytest.approx(1 - real / computed, abs=1e-12)


@pytest.mark.statistical
def test_expected_padding_waste_is_what_draws_waste():
    layout, sampler = BatchLayout(16, 4), PoissonSampler(10_000, 0.01, KEY)
    rows = np.array([len(sampler.indices(t)) for t in range(2000)])
    computed = np.array([layout.accumulations(n) for n in rows]) * layout.rows_per_accumulation
    waste = layout.expected_padding_waste(sampler)
    # Delta method: E[rows - (1 - waste) * computed] is zero; five standard errors either way.
    error = rows - (1 - waste) * computed
    standard_error = error.std() / np.sqrt(len(rows))
    assert abs(error.mean()) < 5 * standard_error
    assert abs((rows - (1 - 1.1 * waste) * computed).mean()) > 5 * standard_error  # ten per cent off is seen


def test_there_is_no_padding_waste_without_rows_or_with_single_rows():
    assert BatchLayout(8, 4).expected_padding_waste(PoissonSampler(10, 0.0, KEY)) == 0.0
    assert BatchLayout(1, 1).expected_padding_waste(PoissonSampler(10, 0.5, KEY)) == 0.0
    assert BatchLayout(4, 1).expected_padding_waste(PoissonSampler(8, 1.0, KEY)) == 0.0


@pytest.mark.parametrize("positions", [[-1], [2], [0, 0], [0, 1, 2]])
def test_positions_outside_the_mesh_or_repeated_are_refused(positions):
    with pytest.raises(InputError, match="device_positions"):
        BatchLayout(4, 2).rows(np.arange(5), 0, positions)


def test_impossible_layouts_are_refused():
    with pytest.raises(InputError, match="physical_batch_size=0"):
        BatchLayout(0, 1)
    with pytest.raises(InputError, match="num_devices=-1"):
        BatchLayout(4, -1)
    with pytest.raises(InputError, match="accumulation=-1"):
        BatchLayout(4, 1).rows(np.arange(3), -1, [0])


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("per_process", [1, 2, 4])
def test_every_process_computes_as_many_rows_and_reads_as_many_to_one_physical_batch_a_device(num_rows, per_process):
    """Its straggler is at most one physical batch behind; with one device a process that is one physical batch."""
    layout, draw = BatchLayout(physical_batch_size=8, num_devices=8), np.arange(num_rows)
    computed, read = [], []
    for first in range(0, 8, per_process):
        positions = range(first, first + per_process)
        masks = [layout.rows(draw, k, positions)[1] for k in range(layout.accumulations(num_rows))]
        computed.append(sum(mask.size for mask in masks))
        read.append(sum(int(mask.sum()) for mask in masks))
    assert len(set(computed)) == 1
    assert sum(read) == num_rows
    assert max(read) - min(read) <= 8 * per_process
