"""Conversion keeps every example at its index, survives being killed, and is read back; damage is noticed."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import dpscale.data.convert as module
from dpscale.data import as_source, open_source
from dpscale.data.array_record import ArrayRecordSource
from dpscale.data.convert import convert
from dpscale.errors import InputError

RNG = np.random.default_rng(3)
COUNT = 100


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Ten examples a shard, one a chunk."""
    monkeypatch.setattr(module, "_CHUNKS_PER_SHARD", 10)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 3)


def arrays(count=COUNT, shape=(5, 4, 3)):
    return as_source((RNG.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 7), num_classes=7)


class Marked:
    """A source that could not read some of its examples, and may raise at one of them."""

    def __init__(self, inner, unreadable=(), fatal=None):
        self.inner, self.unreadable, self.fatal = inner, np.array(unreadable, int), fatal
        self.metadata = inner.metadata
        self.fingerprint_parts = inner.fingerprint_parts

    def __len__(self):
        return len(self.inner)

    def rows(self, indices):
        if self.fatal is not None and self.fatal in indices:
            raise OSError("the disk is gone")
        rows = self.inner.rows(indices)
        rows["valid"] = ~np.isin(indices, self.unreadable)
        for name in ("features", "label"):
            rows[name][~rows["valid"]] = 0
        return rows


def sources(tmp_path):
    yield arrays()
    yield as_source((RNG.standard_normal((COUNT, 6)).astype(np.float32), RNG.standard_normal((COUNT, 2))))
    yield as_source((np.arange(COUNT)[:, None] % 2 == 0, np.arange(COUNT) % 3))
    np.arange(COUNT * 4, dtype="<u2").tofile(tmp_path / "t.bin")
    yield open_source(f"{tmp_path}/t.bin", sequence_length=3, vocabulary_size=500)


def test_a_conversion_gives_back_every_example_at_its_index(tmp_path):
    for number, source in enumerate(sources(tmp_path)):
        seen = []
        folder = tmp_path / f"converted{number}"
        assert convert(source, folder, num_threads=3, progress=lambda *at, seen=seen: seen.append(at)) == COUNT
        assert seen == [(10 * k, COUNT) for k in range(1, 11)]
        converted = open_source(str(folder))
        wanted = RNG.integers(0, COUNT, 40)
        for name, array in source.rows(wanted).items():
            found = converted.rows(wanted)[name]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        assert converted.rows(np.array([], np.int64))["features"].shape[0] == 0
        a, b = source.metadata, converted.metadata
        for what in ("feature_shape", "feature_dtype", "label_kind", "label_shape", "num_classes", "full_scale"):
            assert getattr(a, what) == getattr(b, what)
        assert (a.vocabulary_size, a.padding_token, a.class_names) == (
            b.vocabulary_size,
            b.padding_token,
            b.class_names,
        )
        assert oct(os.stat(folder).st_mode)[-3:] == "700"


def test_small_records_share_chunks_and_shards_are_never_more_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8192)
    monkeypatch.setattr(module, "_MOST_SHARDS", 3)
    monkeypatch.setattr(module, "_CHUNKS_PER_SHARD", 1)
    source = arrays(1000, (2,))
    convert(source, tmp_path / "c")
    converted = open_source(f"{tmp_path}/c")
    assert len(list((tmp_path / "c").glob("*.array_record"))) == 3
    everything = np.arange(1000)
    np.testing.assert_array_equal(converted.rows(everything)["features"], source.rows(everything)["features"])


def test_an_unreadable_example_stays_unreadable_at_its_index(tmp_path):
    inner = arrays()
    convert(Marked(inner, [0, 17, 99]), tmp_path / "c")
    everything = np.arange(COUNT)
    rows = open_source(f"{tmp_path}/c", on_corrupt="replace").rows(everything)
    assert np.flatnonzero(~rows["valid"]).tolist() == [0, 17, 99]
    np.testing.assert_array_equal(rows["features"][rows["valid"]], inner.rows(everything)["features"][rows["valid"]])
    with pytest.raises(InputError, match=r"example 17 .*unreadable when the data set was converted"):
        open_source(f"{tmp_path}/c").rows(np.array([3, 17]))


def test_a_conversion_that_failed_goes_on_after_its_last_finished_shard(tmp_path):
    source, read = arrays(), []
    with pytest.raises(OSError, match="disk is gone"):
        convert(Marked(source, fatal=35), tmp_path / "c")
    with pytest.raises(InputError, match="has not finished: run the same"):
        open_source(f"{tmp_path}/c")

    class Noted(Marked):
        def rows(self, indices):
            read.extend(indices.tolist())
            return self.inner.rows(indices)

    convert(Noted(source), tmp_path / "c")
    assert sorted(read) == list(range(30, COUNT))
    everything = np.arange(COUNT)
    np.testing.assert_array_equal(
        open_source(f"{tmp_path}/c").rows(everything)["features"], source.rows(everything)["features"]
    )
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".array_record") == [
        ".lock",
        "dataset.json",
    ]


def test_a_killed_conversion_is_finished_by_the_same_command(tmp_path):
    """A real process, killed in the middle; the command line finishes it."""
    np.savez(
        tmp_path / "set.npz", features=RNG.integers(0, 256, (4_000, 64), dtype=np.uint8), labels=np.arange(4_000) % 7
    )
    slowed = (
        "import time, sys, dpscale.data.convert as m; m._CHUNKS_PER_SHARD = 64; m._CHUNK_BYTES = 1\n"
        "original = m._write\n"
        "def slow(*a): time.sleep(0.05); return original(*a)\n"
        "m._write = slow\n"
        "from dpscale.data import open_source\n"
        "m.convert(open_source(sys.argv[1]), m.Path(sys.argv[2]))\n"
    )
    folder = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", slowed, str(tmp_path / "set.npz"), str(folder)])
    journal, end = folder / "conversion.jsonl", time.monotonic() + 60
    while time.monotonic() < end and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert 3 <= len(before) < 4_000 // 64
    with journal.open("ab") as file:  # a line that the kill cut off
        file.write(b'{"shard": 99')
    # The first process had its own shard size: with another one this is another conversion.
    with pytest.raises(InputError, match="something else"):
        convert(open_source(f"{tmp_path}/set.npz"), folder)
    module._CHUNKS_PER_SHARD, module._CHUNK_BYTES = 64, 1
    source = open_source(f"{tmp_path}/set.npz")
    convert(source, folder)
    converted = open_source(str(folder))
    everything = np.arange(4_000)
    np.testing.assert_array_equal(converted.rows(everything)["features"], source.rows(everything)["features"])
    np.testing.assert_array_equal(converted.rows(everything)["label"], source.rows(everything)["label"])
    for name, mtime in before.items():
        assert (folder / name).stat().st_mtime_ns == mtime, "a finished shard was written again"


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path):
    source = arrays()
    with pytest.raises(OSError, match="disk is gone"):
        convert(Marked(source, fatal=95), tmp_path / "c")
    flip(tmp_path / "c" / "shard-00002.array_record")
    os.truncate(tmp_path / "c" / "shard-00004.array_record", 300)
    convert(source, tmp_path / "c")
    everything = np.arange(COUNT)
    np.testing.assert_array_equal(
        open_source(f"{tmp_path}/c").rows(everything)["features"], source.rows(everything)["features"]
    )


def test_what_does_not_read_back_as_written_is_noticed(tmp_path, monkeypatch):
    original = os.fsync
    damaged = []

    def failing_disk(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("shard-00001.tmp") and not damaged:
            damaged.append(name)
            flip(name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", failing_disk)
    with pytest.raises((OSError, InputError), match=r"shard-00001.tmp"):
        convert(arrays(), tmp_path / "c")
    assert damaged
    convert(arrays_again := arrays(), tmp_path / "d")
    assert len(open_source(f"{tmp_path}/d")) == len(arrays_again)


def flip(path, place=None):
    """One bit of a stored record."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    place = len(data) // 2 if place is None else place
    data[place] ^= 1
    with open(path, "wb") as file:
        file.write(data)


def test_a_folder_is_converted_into_once_and_from_one_source(tmp_path):
    source = arrays()
    convert(source, tmp_path / "c")
    with pytest.raises(InputError, match="finished data set already"):
        convert(source, tmp_path / "c")
    with pytest.raises(OSError, match="disk is gone"):
        convert(Marked(source, fatal=35), tmp_path / "d")
    with pytest.raises(InputError, match=r"something else \(source differ\)"):
        convert(arrays(), tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("hello")
    with pytest.raises(InputError, match="not empty"):
        convert(source, tmp_path / "e")


def test_two_conversions_into_one_folder_do_not_meet(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    class Waiting(Marked):
        def rows(self, indices):
            started.set()
            go_on.wait(30)
            return self.inner.rows(indices)

    source = arrays()
    thread = threading.Thread(target=convert, args=(Waiting(source), tmp_path / "c"))
    thread.start()
    started.wait(30)
    with pytest.raises(InputError, match=r"another conversion .* is running"):
        convert(source, tmp_path / "c")
    go_on.set()
    thread.join()
    assert len(open_source(f"{tmp_path}/c")) == COUNT


@pytest.fixture
def converted(tmp_path):
    convert(arrays(), tmp_path / "c")
    return tmp_path / "c"


def test_a_damaged_record_is_an_error_or_replaced_and_its_neighbours_are_whole(converted):
    whole = open_source(str(converted)).rows(np.arange(COUNT))
    before = open_source(str(converted)).fingerprint_parts()
    shard = converted / "shard-00003.array_record"
    pixels = whole["features"][35].tobytes()
    flip(shard, shard.read_bytes().find(pixels) + 7)
    with pytest.raises(InputError, match=r"example 35 .*record is damaged"):
        open_source(str(converted)).rows(np.array([30, 35]))
    rows = open_source(str(converted), on_corrupt="replace").rows(np.arange(COUNT))
    assert np.flatnonzero(~rows["valid"]).tolist() == [35]
    np.testing.assert_array_equal(rows["features"][rows["valid"]], whole["features"][rows["valid"]])
    assert open_source(str(converted)).fingerprint_parts() != before


@pytest.mark.parametrize(
    ("break_it", "pattern"),
    [
        (lambda folder: os.truncate(folder / "shard-00009.array_record", 100), "shard-00009.*missing or truncated"),
        (lambda folder: (folder / "shard-00005.array_record").unlink(), "shard-00005.*missing or truncated"),
        (lambda folder: zeros(folder / "shard-00000.array_record"), "shard-00000"),
        (lambda folder: (folder / "dataset.json").unlink(), "has no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text('{"format": "x"}'), "is not of the format"),
        (lambda folder: rewrite(folder, examples="many"), "dataset.json is damaged"),
        (
            lambda folder: rewrite(
                folder, shards=[{"file": "shard-00000.array_record", "records": 9, "bytes": 131072}]
            ),
            "holds 10 records",
        ),
    ],
)
def test_a_folder_whose_files_are_not_whole_is_refused(converted, break_it, pattern):
    break_it(converted)
    with pytest.raises(InputError, match=pattern):
        open_source(str(converted))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def rewrite(folder, **changes):
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**described, **changes}))


def test_a_file_of_another_shard_changes_the_fingerprint(converted):
    before = open_source(str(converted)).fingerprint_parts()
    os.replace(converted / "shard-00008.array_record", converted / "shard-00009.array_record")
    (converted / "shard-00008.array_record").write_bytes((converted / "shard-00009.array_record").read_bytes())
    assert open_source(str(converted)).fingerprint_parts() != before


def test_options_that_differ_from_the_conversion_are_refused(converted):
    with pytest.raises(InputError, match=r"data.num_classes=7, but the config says 8"):
        open_source(str(converted), num_classes=8)
    with pytest.raises(InputError, match=r"data.sequence_length=None, but the config says 8"):
        open_source(str(converted), sequence_length=8)


def test_several_threads_read_one_source_at_once(converted):
    source = ArrayRecordSource(converted, open_options())
    whole = source.rows(np.arange(COUNT))["features"]
    wrong = []

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(50):
            wanted = generator.integers(0, COUNT, 20)
            if not np.array_equal(source.rows(wanted)["features"], whole[wanted]):
                wrong.append(wanted)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def open_options():
    from dpscale.data.options import SourceOptions

    return SourceOptions()
