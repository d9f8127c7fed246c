"""What there is to know about a data set before a run: for its owner's eyes, since it is derived from the data."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpscale.data.corrupt import CorruptExample
from dpscale.data.source import FEATURES, LABEL, VALID, ExampleSource, empty_rows
from dpscale.errors import InputError

SHOWN_PROBLEMS = 5
_BLOCK = 32
_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Findings:
    """What reading examples one by one showed; derived from the data."""

    looked_at: int
    wrong: int
    problems: list[str]  # the first few, in full


def describe_source(source: ExampleSource, path: Path | None) -> Iterator[str]:
    """Number of examples, shapes, types and classes: lines of text; reads no example."""
    m = source.metadata
    yield f"examples          {len(source):,}"
    yield f"features          {m.feature_dtype}{list(m.feature_shape)}"
    kind = {"class": "a class", "value": "values", "tokens": "the next tokens"}[m.label_kind]
    yield f"label             {m.label_dtype}{list(m.label_shape)}, {kind}"
    if m.label_kind == "class":
        yield f"classes           {_classes(m.num_classes, m.class_names)}"
    if m.vocabulary_size is not None:
        padding = "" if m.padding_token is None else f", padding is {m.padding_token}"
        yield f"vocabulary        {m.vocabulary_size:,} tokens{padding}"
    row = empty_rows(m, 1)
    yield f"bytes             {sum(array.nbytes for array in row.values()):,} for each example on the device"
    if path is not None and path.exists():
        yield f"on disk           {_disk_bytes(path) / 2**20:,.1f} MiB"


def look_through(
    source: ExampleSource,
    count: int | None,
    num_threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Read `count` evenly spaced examples (None: all) with `num_threads` threads; what is wrong with them."""
    chosen = _spaced(len(source), count)
    blocks = [chosen[start : start + _BLOCK] for start in range(0, len(chosen), _BLOCK)]
    wrong, problems, done = 0, [], 0
    with ThreadPoolExecutor(num_threads) as pool:
        for block, found in zip(blocks, pool.map(lambda block: list(_problems(source, block)), blocks), strict=True):
            wrong += len(found)
            problems += found[: SHOWN_PROBLEMS - len(problems)]
            done += len(block)
            progress(done, len(chosen))
    return Findings(len(chosen), wrong, problems)


def read_rate(source: ExampleSource, num_threads: int, seconds: float) -> float:
    """Examples/s of `num_threads` threads that each ask for blocks of 32 random rows, as a Poisson draw does."""
    deadline = time.perf_counter() + seconds

    def reader(number: int) -> int:
        generator, rows = np.random.default_rng(number), 0
        while time.perf_counter() < deadline or rows == 0:
            with contextlib.suppress(CorruptExample):  # it was read, and is counted elsewhere
                source.rows(np.sort(generator.integers(0, len(source), _BLOCK)))
            rows += _BLOCK
        return rows

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        rows = sum(pool.map(reader, range(num_threads)))
    return rows / (time.perf_counter() - start)


def _problems(source: ExampleSource, indices: np.ndarray) -> Iterator[str]:
    try:
        rows = source.rows(indices)
    except InputError as error:
        if len(indices) == 1:
            yield str(error)
        else:
            for index in indices:
                yield from _problems(source, np.array([index]))
        return
    for place in np.flatnonzero(~rows.get(VALID, np.ones(len(indices), bool))):
        yield f"example {indices[place]} is unreadable, and would be replaced by padding"
    for name in (FEATURES, LABEL):
        if rows[name].dtype.kind == "f":
            for place in np.flatnonzero(~np.isfinite(rows[name]).reshape(len(indices), -1).all(1)):
                yield f"example {indices[place]} holds a NaN or an infinity in its {name}: it would contribute nothing"


def _spaced(length: int, count: int | None) -> np.ndarray:
    if count is None or count >= length:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, count).astype(np.int64))


def _classes(count: int | None, names: tuple[str, ...] | None) -> str:
    if count is None:
        return "not known: set data.num_classes (a constant that you know; it is not counted from labels)"
    shown = ", ".join((names or ())[:_SHOWN_CLASSES])
    more = ", .." if names and len(names) > _SHOWN_CLASSES else ""
    return f"{count}" + (f": {shown}{more}" if names else "")


def _disk_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, files in os.walk(path):
        total += sum(os.stat(os.path.join(folder, file)).st_size for file in files)
    return total
