"""Laws of the loader: what it gives is the draw, whole and in order, wherever it starts and however it is
cut."""

import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpscale.batching import BatchLayout
from dpscale.data import as_source, open_source
from dpscale.data.loader import EveryExample, Loader
from dpscale.data.resident import gather, load_resident
from dpscale.errors import InputError
from dpscale.sampling import PoissonSampler

KEY = bytes(range(32))
SOURCE = open_source("made_up:vectors:200:3:5")
SAMPLER = PoissonSampler(num_examples=200, sampling_rate=0.1, key=KEY)


@dataclass(frozen=True)
class Fixed:
    """Draws of the given sizes, one a step."""

    sizes: tuple[int, ...]
    num_examples: int = 200

    def indices(self, step, attempt=0):
        return np.arange(self.sizes[step % len(self.sizes)], dtype=np.int64) + step + attempt


def load(positions, *, draws=SAMPLER, layout=None, source=SOURCE, **options):
    """[(step, accumulations, [physical batches])], all of it."""
    layout = layout or BatchLayout(physical_batch_size=4, num_devices=2)
    options = {"planned_accumulations": 3, "stop_step": 12, "num_threads": 2, **options}
    with Loader(source, draws, layout, positions, **options) as loader:
        return [(logical.step, logical.accumulations, list(logical)) for logical in loader]


def flat(steps):
    """Everything that was loaded, in order, in a form that compares."""
    return [
        (
            step,
            accumulations,
            [(b.ids.tolist(), b.mask.tolist(), {k: v.tolist() for k, v in b.arrays.items()}) for b in bs],
        )
        for step, accumulations, bs in steps
    ]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_multiset_of_loaded_ids_over_processes_is_the_draw(processes):
    layout = BatchLayout(physical_batch_size=3, num_devices=8)
    seen = {step: Counter() for step in range(12)}
    accumulations = []
    for process in range(processes):
        positions = range(process, 8, processes)
        steps = load(positions, layout=layout)
        accumulations.append([(step, count, len(batches)) for step, count, batches in steps])
        for step, _, batches in steps:
            for batch in batches:
                seen[step].update(batch.ids[batch.mask].tolist())
                assert batch.ids.shape == batch.mask.shape == (3 * len(positions),)
    assert all(counts == accumulations[0] for counts in accumulations)  # the same on every process
    for step, ids in seen.items():
        assert ids == Counter(SAMPLER.indices(step).tolist())


def test_rows_are_those_of_the_ids_and_padding_is_zero():
    for _, _, batches in load([0, 1]):
        for batch in batches:
            wanted = SOURCE.rows(batch.ids[batch.mask])
            for name, array in batch.arrays.items():
                np.testing.assert_array_equal(array[batch.mask], wanted[name])
                assert not array[~batch.mask].any()


def test_starting_at_any_step_gives_the_rest():
    whole = flat(load([0, 1]))
    for start in range(13):
        assert flat(load([0, 1], start_step=start)) == whole[start:]


@pytest.mark.parametrize("planned", [1, 2, 5, 50])
@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("prefetch", [1, 20])
def test_plan_threads_and_prefetch_change_nothing(planned, num_threads, prefetch):
    assert flat(load([0, 1])) == flat(
        load([0, 1], planned_accumulations=planned, num_threads=num_threads, prefetch=prefetch)
    )


def test_draws_larger_than_planned_are_loaded_whole_and_empty_ones_are_steps():
    draws = Fixed((0, 8, 61, 0, 24, 25))
    steps = load([0, 1], draws=draws, planned_accumulations=3)
    assert [(step, accumulations) for step, accumulations, _ in steps[:6]] == [
        (0, 0),
        (1, 1),
        (2, 8),
        (3, 0),
        (4, 3),
        (5, 4),
    ]
    for step, accumulations, batches in steps:
        assert len(batches) == accumulations
        ids = [i for batch in batches for i in batch.ids[batch.mask]]
        np.testing.assert_array_equal(ids, draws.indices(step))


def test_another_attempt_is_another_draw():
    first, second = (load([0, 1], attempt=attempt) for attempt in (0, 1))
    assert flat(first) != flat(second)
    ids = np.concatenate([batch.ids[batch.mask] for batch in second[5][2]])
    np.testing.assert_array_equal(ids, SAMPLER.indices(5, attempt=1))


def test_a_caller_that_leaves_a_step_early_gets_the_next_one_whole():
    layout = BatchLayout(4, 2)
    options = {"planned_accumulations": 3, "stop_step": 12, "num_threads": 2}
    whole = flat(load([0, 1]))
    with Loader(SOURCE, SAMPLER, layout, [0, 1], **options) as loader:
        for logical in loader:
            if logical.step % 2:
                assert flat([(logical.step, logical.accumulations, list(logical))]) == [whole[logical.step]]
            else:
                next(iter(logical), None)


def test_resident_data_give_the_same_examples_and_the_host_reads_no_row(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    resident, readable = load_resident(SOURCE, NamedSharding(mesh, PartitionSpec()))
    assert readable is None
    assert resident["features"].dtype == jnp.uint8
    assert resident["features"].sharding.is_fully_replicated
    fetch = jax.jit(gather)
    hosts = load([0, 1])
    monkeypatch.setattr(type(SOURCE), "rows", None)  # a call would fail
    residents = load([0, 1], resident=True)
    assert len(hosts) == len(residents) == 12
    for (_, _, host), (_, _, other) in zip(hosts, residents, strict=True):
        for a, b in zip(host, other, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.mask, b.mask)
            assert list(b.arrays) == ["index"]
            assert b.arrays["index"].dtype == np.int32
            examples, direct = fetch(resident, b.arrays), fetch({}, a.arrays)
            for name in ("features", "label"):
                assert examples[name].dtype == direct[name].dtype
                np.testing.assert_array_equal(examples[name][a.mask], direct[name][a.mask])


def test_every_example_is_one_pass_in_order():
    steps = load([0, 1], draws=EveryExample(200), stop_step=1, planned_accumulations=25)
    ids = np.concatenate([batch.ids[batch.mask] for batch in steps[0][2]])
    np.testing.assert_array_equal(ids, np.arange(200))


class Odd:
    """A source with one method replaced."""

    def __init__(self, rows):
        self.metadata, self.rows = replace(SOURCE.metadata, name="odd"), rows

    def __len__(self):
        return len(SOURCE)

    def fingerprint_parts(self):
        return b""


def test_memory_does_not_grow_with_the_logical_batch():
    row_bytes = 2**16
    source = open_source(f"made_up:vectors:4000:{row_bytes}:5")

    def zeros(indices):
        shape = (len(indices), row_bytes)
        return {"features": np.zeros(shape, np.uint8), "label": np.zeros(len(indices), np.int32)}

    odd = Odd(zeros)
    odd.metadata = source.metadata
    odd.__class__ = type("Large", (Odd,), {"__len__": lambda self: 4000})

    def peak(size, planned):
        layout = BatchLayout(8, 1)
        with Loader(
            odd,
            Fixed((size,), 4000),
            layout,
            [0],
            planned_accumulations=planned,
            stop_step=1,
            num_threads=2,
            prefetch=4,
        ) as loader:
            tracemalloc.start()
            try:
                for logical in loader:
                    for batch in logical:
                        assert batch.mask.all()
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak(8, 1)  # imports
    # At most prefetch + threads + the caller's own: 7 physical batches of 8 rows, and two more for slack.
    limit = 9 * 8 * row_bytes
    assert peak(4000, 500) < limit  # read ahead; the logical batch is 500 such batches
    assert peak(4000, 1) < limit  # larger than planned


def test_an_error_in_the_source_reaches_the_loop_with_its_text_and_leaves_no_threads():
    def rows(indices):
        if 7 in indices:
            raise OSError("disk on fire")
        return SOURCE.rows(indices)

    draws = Fixed((4, 4, 8, 4))
    seen = []

    def run():
        with Loader(Odd(rows), draws, BatchLayout(4, 2), [0, 1], planned_accumulations=1, num_threads=2) as loader:
            seen.extend(logical.step for logical in loader)

    with pytest.raises(OSError, match="disk on fire") as raised:
        run()
    assert seen == [0, 1]  # steps 0 and 1 take rows 0..4; step 2 is the first to take row 7
    assert "while loading the examples of step 2 from odd" in raised.value.__notes__
    assert wait_for_no_grain_threads()


def wait_for_no_grain_threads(timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]:
            return True
        time.sleep(0.01)
    return False


def test_the_next_step_is_drawn_and_read_while_the_caller_is_busy_with_this_one():
    next_was_read = threading.Event()

    def rows(indices):
        if 107 in indices:  # the last row of step 1
            next_was_read.set()
        return SOURCE.rows(indices)

    class Apart(Fixed):
        def indices(self, step, attempt=0):
            return np.arange(8, dtype=np.int64) + 100 * step

    draws, layout = Apart(()), BatchLayout(4, 1)
    with Loader(Odd(rows), draws, layout, [0], planned_accumulations=2, num_threads=2, stop_step=2) as loader:
        steps = iter(loader)
        first = next(iter(next(steps)))
        assert first.ids.tolist() == [0, 1, 2, 3]
        # Nothing more is asked for: what is read now is read ahead.
        assert next_was_read.wait(timeout=30)
        steps.close()


def test_after_close_the_source_is_left_alone():
    calls = []

    def rows(indices):
        time.sleep(0.01)
        calls.append(len(indices))
        return SOURCE.rows(indices)

    loader = Loader(Odd(rows), SAMPLER, BatchLayout(4, 2), [0, 1], planned_accumulations=3, num_threads=4)
    steps = iter(loader)
    next(steps)
    loader.close()
    loader.close()
    count = len(calls)
    time.sleep(0.1)
    assert len(calls) == count
    steps.close()
    assert wait_for_no_grain_threads()


def test_a_source_that_breaks_its_promise_is_refused():
    def rows(indices):
        good = SOURCE.rows(indices)
        return {**good, "features": good["features"].astype(np.float32)}

    with pytest.raises(InputError, match=r"odd gave float32.* for 'features'.*promise uint8"):
        load([0, 1], source=Odd(rows))
    with pytest.raises(InputError, match="gave nothing for 'label'"):
        load([0, 1], source=Odd(lambda indices: {"features": SOURCE.rows(indices)["features"]}))


def test_draws_over_another_number_of_examples_are_refused():
    with pytest.raises(InputError, match="200 examples, but arrays has 2"):
        load([0], source=as_source((np.zeros((2, 3), np.uint8), np.zeros(2, int))))


def test_importing_the_loader_imports_neither_grain_nor_jax():
    code = "import sys, dpscale.data.loader, dpscale.data; print({'grain', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
