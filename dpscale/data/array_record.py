"""Rows as `dpscale data convert` writes them: ArrayRecord files of fixed-size records, and dataset.json beside them."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.corrupt import CorruptExample, unreadable
from dpscale.data.options import SourceOptions
from dpscale.data.source import FEATURES, LABEL, SAMPLED_ROWS, VALID, Batch, SourceMetadata, empty_rows
from dpscale.errors import InputError

DESCRIPTION = "dataset.json"
FORMAT = "dpscale-array-record-1"
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class RecordLayout:
    """One record, little-endian: a byte, 0 where the example was unreadable, then the label, then the features."""

    metadata: SourceMetadata

    @property
    def dtype(self) -> np.dtype:
        """A structured dtype without gaps."""
        m = self.metadata
        return np.dtype(
            [
                (VALID, np.uint8),
                (LABEL, m.label_dtype.newbyteorder("<"), m.label_shape),
                (FEATURES, m.feature_dtype.newbyteorder("<"), m.feature_shape),
            ]
        )

    def pack(self, rows: Batch) -> np.ndarray:
        """Records[n] from rows; `tobytes` of each is what is stored."""
        records = np.zeros(len(rows[LABEL]), self.dtype)
        records[VALID] = rows.get(VALID, True)
        records[LABEL], records[FEATURES] = rows[LABEL], rows[FEATURES]
        return records


def describe(metadata: SourceMetadata) -> dict[str, Any]:
    """The metadata as JSON; `name` is left out, since it says where the data came from."""
    found = {key: value for key, value in asdict(metadata).items() if key != "name"}
    return json.loads(json.dumps({**found, "feature_dtype": metadata.feature_dtype.str}))


def undescribe(described: dict[str, Any], name: str) -> SourceMetadata:
    """The metadata from `describe`; KeyError or TypeError for anything else."""
    m = SourceMetadata(name=name, **described)
    return replace(
        m,
        feature_shape=tuple(m.feature_shape),
        label_shape=tuple(m.label_shape),
        feature_dtype=np.dtype(m.feature_dtype),
        class_names=None if m.class_names is None else tuple(m.class_names),
    )


class ArrayRecordSource:
    """A folder that `dpscale data convert` made. Record r of shard s is example s * records_per_shard + r.

    Raises: InputError for a folder without dataset.json, one whose files are missing or hold another number of records,
    and a `num_classes` or `image_size` that differs from what was converted.
    """

    def __init__(self, folder: Path, options: SourceOptions):
        self._folder, self._options = folder, options
        described = _read_description(folder)
        try:
            self._metadata = undescribe(described["metadata"], str(folder))
            self._length, self._per_shard = int(described["examples"]), int(described["records_per_shard"])
            self._shards = [(str(shard["file"]), int(shard["records"])) for shard in described["shards"]]
            sizes = {str(shard["file"]): int(shard["bytes"]) for shard in described["shards"]}
            self._digest = bytes.fromhex(described["digest"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / DESCRIPTION} is damaged ({error!r}): convert the data again") from error
        _check_sizes(folder, sizes)
        _check_options(self._metadata, options)
        self._dtype = RecordLayout(self._metadata).dtype
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        for number in (0, len(self._shards) - 1):  # the others are looked at when they are needed
            self._reader(number)

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants, as they were converted."""
        return self._metadata

    def __len__(self) -> int:
        """Number of examples."""
        return self._length

    def rows(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, int64[n]; each shard that they need is asked once, outside of Python's lock."""
        indices = np.asarray(indices, np.int64)
        records = np.zeros(len(indices), self._dtype)
        problems: dict[int, Exception] = {}
        shards = indices // self._per_shard
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            for place, data in zip(places.tolist(), self._records(shard, indices[places]), strict=True):
                if isinstance(data, Exception):
                    problems[place] = data
                else:
                    records[place] = np.frombuffer(data, self._dtype)[0]
        valid = records[VALID].astype(bool)
        if self._options.on_corrupt == "error" and not valid.all():
            place = int(np.argmin(valid))
            error = problems.get(place) or CorruptExample("it was unreadable when the data set was converted")
            raise unreadable(self._metadata.name, int(indices[place]), error)
        rows = {
            name: np.ascontiguousarray(records[name]).astype(promised.dtype, copy=False)
            for name, promised in empty_rows(self._metadata, 0).items()
        }
        return rows if self._options.on_corrupt == "error" else {**rows, VALID: valid}

    def fingerprint_parts(self) -> bytes:
        """A digest of what was converted, as noted then, and of 1,024 evenly spaced records as they are now."""
        digest = hashlib.blake2b(self._digest, digest_size=32)
        chosen = np.unique(np.linspace(0, len(self) - 1, SAMPLED_ROWS).astype(np.int64))
        for shard in np.unique(chosen // self._per_shard).tolist():
            for data in self._records(shard, chosen[chosen // self._per_shard == shard]):
                digest.update(b"unreadable" if isinstance(data, Exception) else data)
        return digest.digest()

    def _records(self, shard: int, indices: np.ndarray) -> list[bytes | Exception]:
        """The stored bytes, or what is wrong with them."""
        reader, positions = self._reader(shard), (indices % self._per_shard).tolist()
        try:
            found = reader.read(positions)
        except (RuntimeError, ValueError, IndexError):  # one damaged record spoils the answer for all
            found = [_read_alone(reader, position) for position in positions]
        size = self._dtype.itemsize
        return [
            CorruptExample(f"its record has {len(data)} bytes for {size}")
            if isinstance(data, bytes) and len(data) != size
            else data
            for data in found
        ]

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                file, records = self._shards[shard]
                self._readers[shard] = open_shard(self._folder / file, records)
            return self._readers[shard]


def open_shard(path: Path, records: int) -> Any:
    """A reader of one ArrayRecord file, safe to share between threads for reads by position.

    Raises: InputError for a file that cannot be read or holds another number of records.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        if not path.is_file():
            raise RuntimeError("no such file")
        reader = ArrayRecordReader(str(path), _RANDOM_ACCESS)
        found = reader.num_records()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): it is missing, truncated, or no ArrayRecord file; "
            "copy or convert it again"
        ) from error
    if found != records:
        raise InputError(
            f"{path} holds {found} records, but {DESCRIPTION} says {records}: the files are not of "
            "one conversion; copy or "
            "convert them again"
        )
    return reader


def _read_alone(reader: Any, position: int) -> bytes | Exception:
    try:
        return reader.read([position])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        return CorruptExample(f"its record is damaged: {error}")


def _check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """All at once, so that a copy that was cut short is noticed before the run and not in the middle of it."""
    for file, size in sizes.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else None
        if found != size:
            raise InputError(
                f"{folder / file} has {found or 'no'} bytes, but {DESCRIPTION} says {size}: it is "
                "missing or truncated; "
                "copy or convert it again"
            )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        unfinished = (folder / "conversion.json").exists()
        raise InputError(
            f"{folder} is a conversion that has not finished: run the same `dpscale data convert` again"
            if unfinished
            else f"{folder} has no {DESCRIPTION}: ArrayRecord files say nothing about what is in "
            "them, so dpscale reads "
            "those that `dpscale data convert` wrote"
        )
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): copy or convert the data again") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise InputError(f"{path} is not of the format {FORMAT}: convert the data with this version of dpscale")
    return described


def _check_options(metadata: SourceMetadata, options: SourceOptions) -> None:
    m = metadata
    text = m.vocabulary_size is not None
    checks = {
        "num_classes": m.num_classes if m.label_kind == "class" and m.num_classes else options.num_classes,
        "vocabulary_size": m.vocabulary_size,
        "sequence_length": m.feature_shape[0] if text else None,
    }
    for key, stored in checks.items():
        asked = getattr(options, key)
        if asked is not None and asked != stored:
            raise InputError(
                f"{m.name} was converted with data.{key}={stored}, but the config says {asked}: "
                "leave it out, or convert the "
                "data again"
            )
