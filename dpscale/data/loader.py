"""From the sampler's draws to this process's physical batches, in order, read ahead by threads (grain)."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dpscale.batching import BatchLayout
from dpscale.data.source import VALID, Batch, ExampleSource, empty_rows
from dpscale.errors import InputError

# A pipeline has a length; steps without an end get one that is never reached.
_ENDLESS = 2**62


class Draws(Protocol):
    """What says which examples belong to a step: a PoissonSampler, or EveryExample."""

    @property
    def num_examples(self) -> int:
        """Size of the data set that is drawn from."""
        ...

    def indices(self, step: int, attempt: int = 0) -> np.ndarray:
        """The step's examples, int64[n]; a pure function of its arguments, the same on every process."""
        ...


@dataclass(frozen=True)
class EveryExample:
    """Each step is one pass over all examples in order: for evaluation, never for private training."""

    num_examples: int

    def indices(self, step: int, attempt: int = 0) -> np.ndarray:
        """int64[num_examples], 0 .. num_examples - 1."""
        return np.arange(self.num_examples, dtype=np.int64)


@dataclass(frozen=True)
class PhysicalBatch:
    """This process's rows of one accumulation: as many each time, whatever was drawn.

    ids: int64[m], the rows' indices in the data set, 0 where padded. mask: bool[m], False where padded, and
    where the source gave zeros in place of an unreadable example (which keeps its index).
    arrays: what the device gets: {"features", "label"} rows as stored, zeros where padded; or {"index":
    int32[m]} when the data set lives on the device (`dpscale.data.resident.gather` turns either into
    examples).
    """

    ids: np.ndarray
    mask: np.ndarray
    arrays: Batch


class LogicalBatch:
    """One step's physical batches: iterate once, in order, before asking the loader for the next step.

    `num_examples` (of the whole draw) and `accumulations` follow the draw, so they are sensitive.
    `accumulations` is the same on every process, and 0 for an empty draw where the layout pads no further.
    """

    def __init__(self, step: int, num_examples: int, accumulations: int, batches: Iterator[PhysicalBatch]):
        self.step = step
        self.num_examples = num_examples
        self.accumulations = accumulations
        self._batches = batches

    def __iter__(self) -> Iterator[PhysicalBatch]:
        return self._batches


@dataclass(frozen=True)
class _Element:
    """The k-th physical batch of a step (None beyond the draw) and the size of the draw."""

    batch: PhysicalBatch | None
    num_examples: int


class Loader:
    """Iterates over steps start_step, start_step + 1, ..; gives a LogicalBatch each, read ahead by
    `num_threads` threads.

    source: the examples. draws: which of them each step takes. layout: how a draw is cut. device_positions:
    this process's places in the mesh. planned_accumulations: K, the physical batches of a step that are read
    ahead; a larger draw is still loaded whole, its rest by the caller's own thread. prefetch: physical
    batches in memory at most, by default num_threads + 2. resident: give indices instead of rows.
    readable: bool[N], with `resident`: which examples could be read when the data set was put on the device.

    Guarantees: over all processes, the ids of a step are exactly its draw, each once. What step t gives does
    not depend on start_step (starting there costs nothing), K, threads or prefetch. Memory is O(prefetch *
    physical batch + draw), never the logical batch's rows. An error in the source reaches the caller with its
    text; after `close` (or the end of the with block) the source is not called any more.
    Raises: InputError when the draws are over another number of examples, or a row has another shape than
    promised.
    """

    def __init__(
        self,
        source: ExampleSource,
        draws: Draws,
        layout: BatchLayout,
        device_positions: Sequence[int],
        *,
        planned_accumulations: int,
        start_step: int = 0,
        stop_step: int | None = None,
        attempt: int = 0,
        num_threads: int = 4,
        prefetch: int | None = None,
        resident: bool = False,
        readable: np.ndarray | None = None,
    ):
        if draws.num_examples != len(source):
            raise InputError(
                f"the sampler draws from {draws.num_examples} examples, but {source.metadata.name} has "
                f"{len(source)}: "
                "make both from the same data set"
            )
        self._planned = max(1, planned_accumulations)
        self._start = start_step
        self._stop = stop_step
        self._num_threads = num_threads
        self._prefetch = num_threads + 2 if prefetch is None else max(1, prefetch)
        kept_steps = self._prefetch // self._planned + 3
        self._reader = _Reader(
            source,
            layout,
            device_positions,
            _DrawCache(draws, attempt, kept_steps),
            resident=resident,
            readable=readable,
        )

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading ahead and waits for reads under way; may be called twice."""
        self._reader.close()

    def __iter__(self) -> Iterator[LogicalBatch]:
        pipeline = self._pipeline()
        step = self._start
        try:
            while self._stop is None or step < self._stop:
                logical = self._logical_batch(step, pipeline)
                yield logical
                for _ in logical:  # what the caller left
                    pass
                step += 1
        finally:
            pipeline.close()

    def _pipeline(self) -> Any:
        import grain  # takes seconds to import: only those who load data pay

        elements = _Elements(self._reader, self._planned, self._start, self._stop)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self._prefetch)
        return iter(grain.MapDataset.source(elements).to_iter_dataset(options))

    def _logical_batch(self, step: int, pipeline: Any) -> LogicalBatch:
        first: _Element = next(pipeline)
        accumulations = self._reader.layout.accumulations(first.num_examples)

        def batches() -> Iterator[PhysicalBatch]:
            if first.batch is not None:
                yield first.batch
            for _ in range(1, self._planned):
                element: _Element = next(pipeline)
                if element.batch is not None:
                    yield element.batch
            for k in range(self._planned, accumulations):
                batch = self._reader.element(step, k).batch
                assert batch is not None, "the draw changed between two readings of one step"
                yield batch

        return LogicalBatch(step, first.num_examples, accumulations, batches())


class _Elements:
    """The sequence that grain reads: element i is the (i mod K)-th physical batch of step start + i // K."""

    def __init__(self, reader: "_Reader", planned: int, start: int, stop: int | None):
        self._reader, self._planned, self._start = reader, planned, start
        self._length = _ENDLESS if stop is None else max(0, stop - start) * planned

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> _Element:
        steps, k = divmod(int(index), self._planned)
        return self._reader.element(self._start + steps, k)


class _DrawCache:
    """The draws of the few steps that are being read; several threads ask for the same one."""

    def __init__(self, draws: Draws, attempt: int, kept_steps: int):
        self._draws, self._attempt, self._kept_steps = draws, attempt, kept_steps
        self._lock = threading.Lock()
        self._by_step: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> np.ndarray:
        with self._lock:
            if step in self._by_step:
                return self._by_step[step]
            draw = self._by_step[step] = self._draws.indices(step, attempt=self._attempt)
            if len(self._by_step) > self._kept_steps:
                del self._by_step[min(self._by_step)]
            return draw


class _Reader:
    """Reads one physical batch; called from many threads, counts the reads under way so that closing can
    wait."""

    def __init__(
        self,
        source: ExampleSource,
        layout: BatchLayout,
        device_positions: Sequence[int],
        draws: _DrawCache,
        *,
        resident: bool,
        readable: np.ndarray | None,
    ):
        self.layout = layout
        self._source, self._positions, self._draws = source, tuple(device_positions), draws
        self._resident, self._readable = resident, readable
        self._idle = threading.Condition()
        self._under_way = 0
        self._closed = False

    def element(self, step: int, k: int) -> _Element:
        with self._idle:
            if self._closed:
                raise RuntimeError("the loader is closed")
            self._under_way += 1
        try:
            return self._element(step, k)
        except Exception as error:
            error.add_note(f"while loading the examples of step {step} from {self._source.metadata.name}")
            raise
        finally:
            with self._idle:
                self._under_way -= 1
                self._idle.notify_all()

    def close(self) -> None:
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._under_way == 0)

    def _element(self, step: int, k: int) -> _Element:
        draw = self._draws[step]
        if k >= self.layout.accumulations(len(draw)):
            return _Element(None, len(draw))
        ids, mask = self.layout.rows(draw, k, self._positions)
        if self._resident:
            mask = mask if self._readable is None else mask & self._readable[ids]
            return _Element(PhysicalBatch(ids, mask, {"index": ids.astype(np.int32)}), len(draw))
        rows = self._rows(ids, mask)
        # An unreadable example is masked like padding: drawn, charged, and contributing exactly zero.
        mask = mask & rows.pop(VALID, mask)
        return _Element(PhysicalBatch(ids, mask, rows), len(draw))

    def _rows(self, ids: np.ndarray, mask: np.ndarray) -> Batch:
        read = self._source.rows(ids[mask])
        self._check(read, int(mask.sum()))
        if mask.all():
            return read
        padded = empty_rows(self._source.metadata, len(ids))
        for name, array in padded.items():
            array[mask] = read[name]
        if VALID in read:
            padded[VALID] = np.zeros(len(ids), bool)
            padded[VALID][mask] = read[VALID]
        return padded

    def _check(self, read: Batch, count: int) -> None:
        metadata = self._source.metadata
        for name, promised in empty_rows(metadata, 0).items():
            shape = (count, *promised.shape[1:])
            if name not in read or read[name].shape != shape or read[name].dtype != promised.dtype:
                seen = f"{read[name].dtype}{list(read[name].shape)}" if name in read else "nothing"
                raise InputError(
                    f"the source {metadata.name} gave {seen} for {name!r}, but its metadata promise "
                    f"{promised.dtype}{list(shape)}: "
                    "correct rows() or metadata"
                )
        if VALID in read and (read[VALID].shape != (count,) or read[VALID].dtype != bool):
            raise InputError(
                f"the source {metadata.name} gave {read[VALID].dtype}{list(read[VALID].shape)} for {VALID!r}: "
                f"it must be bool[{count}]"
            )
