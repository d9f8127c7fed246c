"""Any source to ArrayRecord: resumable shard by shard, and read back before it counts."""

import fcntl
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.array_record import DESCRIPTION, FORMAT, RecordLayout, describe, open_shard
from dpscale.data.source import Batch, ExampleSource, content_digest
from dpscale.durable import append_durably, sync_directory, write_atomically
from dpscale.errors import InputError

PLAN, JOURNAL = "conversion.json", "conversion.jsonl"
_CHUNK_BYTES = 8192  # small records are stored several in a chunk, which is read and checked as a whole
# A read looks at the list of a shard's chunks, so shards are short; but not too many, since each is an open file.
_CHUNKS_PER_SHARD = 4096
_MOST_SHARDS = 512
_BLOCK_ROWS = 32


def convert(
    source: ExampleSource,
    destination: Path,
    *,
    users: tuple[str, np.ndarray] | None = None,
    num_threads: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `source` as ArrayRecord files into the folder `destination`, and give the number of examples.

    users: a name for data.user_key and the id of each example's user, kept as KEY.npy, where a run looks for them.
    progress: called with (examples done, examples in all).

    Guarantees: example i of the result has the features and label of example i of the source, and stays unreadable
    where it was so there. Killed at any moment and called again, it goes on after the last finished shard. Each
    shard is read back and its count and digest compared before it counts, and shards of an earlier call once more.
    `dataset.json`, without which the folder is no data set, comes last. The folder is the owner's alone (mode 0700).

    Raises: InputError where the folder holds something else, a conversion of another source, or one that is running,
        and what reading the source raises; OSError from the file system.
    """
    if source.metadata.records is not None:
        raise InputError(f"{source.metadata.name} holds users: convert the records, and name the users in the run")
    if users is not None and users[1].shape != (len(source),):
        raise InputError(
            f"{source.metadata.name}: {len(users[1])} user ids for {len(source)} examples: give one for each"
        )
    destination.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(destination):
        plan = _begin(source, destination, users)
        journal = _journal(destination)
        with ThreadPoolExecutor(num_threads) as pool:
            done = 0
            for number, (first, last) in enumerate(_bounds(plan)):
                if not _is_there(destination, journal.get(number), last - first, plan):
                    digest = _write(source, destination, number, (first, last), plan, pool, num_threads)
                    journal[number] = {"shard": number, "records": last - first, "digest": digest}
                    append_durably(destination / JOURNAL, json.dumps(journal[number]).encode() + b"\n")
                done += last - first
                progress(done, plan["examples"])
        if users is not None:
            _write_users(destination, *users)
        _finish(destination, plan, journal)
        return plan["examples"]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.array_record"


def _write_users(destination: Path, key: str, ids: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, ids, allow_pickle=False)
    write_atomically(destination / f"{key}.npy", data.getvalue())


def _begin(source: ExampleSource, destination: Path, users: tuple[str, np.ndarray] | None) -> dict[str, Any]:
    """The plan of this conversion; an unfinished one of the same source is taken up again."""
    if (destination / DESCRIPTION).exists():
        raise InputError(f"{destination} is a finished data set already: look at it with `dpscale data inspect`")
    size = RecordLayout(source.metadata).dtype.itemsize
    group = max(1, min(64, _CHUNK_BYTES // size))
    per_shard = max(_CHUNKS_PER_SHARD * group, -(-len(source) // _MOST_SHARDS))
    plan = {
        "format": FORMAT,
        "examples": len(source),
        "metadata": describe(source.metadata),
        "records_per_shard": per_shard,
        "group": group,
        "record_bytes": size,
        "source": source.fingerprint_parts().hex(),
        "users": None if users is None else [users[0], content_digest({users[0]: users[1]}).hex()],
    }
    path = destination / PLAN
    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key in plan if before.get(key) != plan[key]]
        if changed:
            raise InputError(
                f"{destination} holds an unfinished conversion of something else "
                f"({', '.join(changed)} differ): remove it, "
                "or convert to another folder"
            )
    elif any(item.name != ".lock" for item in destination.iterdir()):
        raise InputError(f"{destination} is not empty: give a new folder")
    else:
        write_atomically(path, json.dumps(plan, indent=1) + "\n")
    return plan


def _bounds(plan: dict[str, Any]) -> Iterator[tuple[int, int]]:
    for first in range(0, plan["examples"], plan["records_per_shard"]):
        yield first, min(first + plan["records_per_shard"], plan["examples"])


def _journal(destination: Path) -> dict[int, dict[str, Any]]:
    path = destination / JOURNAL
    lines = path.read_text().split("\n") if path.exists() else []
    if lines and lines[-1]:  # cut off in the middle of a line: that shard is written again
        with path.open("r+") as file:
            file.truncate(len("\n".join(lines[:-1])) + bool(lines[:-1]))
    return {entry["shard"]: entry for entry in map(json.loads, filter(None, lines[:-1]))}


def _write(
    source: ExampleSource,
    destination: Path,
    number: int,
    bounds: tuple[int, int],
    plan: dict[str, Any],
    pool: ThreadPoolExecutor,
    num_threads: int,
) -> str:
    """Write one shard under another name, read it back, rename it; the digest of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = destination / shard_name(number)
    temporary = path.with_suffix(".tmp")
    layout, digest = RecordLayout(source.metadata), hashlib.blake2b(digest_size=32)
    writer = ArrayRecordWriter(str(temporary), f"group_size:{plan['group']},uncompressed")
    try:
        for rows in _blocks(source, bounds, pool, 2 * num_threads):
            for record in layout.pack(rows):
                data = record.tobytes()
                writer.write(data)
                digest.update(data)
    finally:
        writer.close()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    expected = {"records": bounds[1] - bounds[0], "digest": digest.hexdigest()}
    if _digest(temporary, expected["records"]) != expected["digest"]:
        raise OSError(f"{temporary} does not read back as it was written: the disk or its file system is failing")
    os.replace(temporary, path)
    sync_directory(destination)
    return expected["digest"]


def _blocks(source: ExampleSource, bounds: tuple[int, int], pool: ThreadPoolExecutor, ahead: int) -> Iterator[Batch]:
    """The rows of a shard in order, a few blocks read ahead by threads."""
    starts = iter(range(bounds[0], bounds[1], _BLOCK_ROWS))
    waiting: deque[Future[Batch]] = deque()
    while True:
        while len(waiting) < ahead and (start := next(starts, None)) is not None:
            waiting.append(pool.submit(source.rows, np.arange(start, min(start + _BLOCK_ROWS, bounds[1]))))
        if not waiting:
            return
        yield waiting.popleft().result()


def _digest(path: Path, records: int) -> str:
    """Of the records of a shard, as they can be read."""
    reader = open_shard(path, records)
    digest = hashlib.blake2b(digest_size=32)
    try:
        for start in range(0, records, 256):
            for data in reader.read(start, min(start + 256, records)):
                digest.update(data)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    finally:
        reader.close()
    return digest.hexdigest()


def _is_there(destination: Path, entry: dict[str, Any] | None, records: int, plan: dict[str, Any]) -> bool:
    """Whether a shard of an earlier call is whole; a damaged one is written again."""
    if entry is None or entry["records"] != records:
        return False
    try:
        return _digest(destination / shard_name(entry["shard"]), records) == entry["digest"]
    except InputError:
        return False


def _finish(destination: Path, plan: dict[str, Any], journal: dict[int, dict[str, Any]]) -> None:
    shards = [
        {
            "file": shard_name(number),
            "records": journal[number]["records"],
            "bytes": (destination / shard_name(number)).stat().st_size,
            "digest": journal[number]["digest"],
        }
        for number in sorted(journal)
    ]
    whole = hashlib.blake2b(digest_size=32)
    whole.update(json.dumps([plan["metadata"], plan["examples"], shards]).encode())
    kept = {key: plan[key] for key in ("format", "examples", "metadata", "records_per_shard", "record_bytes")}
    description = {**kept, "shards": shards, "digest": whole.hexdigest()}
    write_atomically(destination / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    (destination / PLAN).unlink()
    (destination / JOURNAL).unlink()


@contextmanager
def _only_one(destination: Path) -> Iterator[None]:
    descriptor = os.open(destination / ".lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another conversion into {destination} is running: wait for it, or stop it") from error
        yield
    finally:
        os.close(descriptor)
