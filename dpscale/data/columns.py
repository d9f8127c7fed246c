"""Columns of Parquet and Arrow files, by row: from memory, or one row group at a time."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpscale.data.extras import needs
from dpscale.errors import InputError

_KEPT_GROUPS = 4  # row groups of one thread that stay in memory


class Column(Protocol):
    """`values(indices)`: the Python values of some rows, in that order; safe from several threads."""

    def values(self, indices: np.ndarray) -> list[Any]: ...


class Tables:
    """The files of one data set, of one schema: Arrow ones memory-mapped, Parquet ones opened.

    Raises: InputError for a file that cannot be read, and schemas that differ.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        self.pa = needs("pyarrow", "parquet", name)
        self.parquet = needs("pyarrow.parquet", "parquet", name)
        needs("pyarrow.ipc", "parquet", name)
        self.paths, self.name = list(paths), name
        self.is_parquet = [path.suffix == ".parquet" for path in self.paths]
        if len(set(self.is_parquet)) > 1:
            raise InputError(f"{name} mixes .parquet and .arrow files: name one kind with a pattern")
        self._arrow: dict[int, Any] = {}
        schemas = [self._schema(number) for number in range(len(self.paths))]
        self.schema = schemas[0]
        for path, schema in zip(self.paths, schemas, strict=True):
            if not schema.equals(self.schema):
                raise InputError(
                    f"{path} has the columns {_columns(schema)}, but {self.paths[0]} has {_columns(self.schema)}: all "
                    "files of a data set need the same"
                )
        self.names = list(self.schema.names)

    def open(self, number: int) -> Any:
        """A ParquetFile of its own, since one is not safe to share between threads."""
        return self._guarded(number, lambda: self.parquet.ParquetFile(self.paths[number]))

    def chunks(self, key: str) -> list[Any]:
        """The column's pieces in memory (Parquet) or in the mapped files (Arrow), in order."""
        found = []
        for number in range(len(self.paths)):
            if self.is_parquet[number]:
                table = self._guarded(number, lambda number=number: self.open(number).read(columns=[key]))
            else:
                table = self._arrow[number]
            found += table.column(key).chunks
        return [chunk for chunk in found if len(chunk)]

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        found = range(len(self.paths))
        return sum(self.open(k).metadata.num_rows if self.is_parquet[k] else self._arrow[k].num_rows for k in found)

    def column_bytes(self, key: str) -> int:
        """What holding the column in memory takes; 0 for Arrow files, which are mapped."""
        total = 0
        for number in range(len(self.paths)):
            if self.is_parquet[number]:
                metadata = self.open(number).metadata
                for group in range(metadata.num_row_groups):
                    row_group = metadata.row_group(group)
                    columns = [row_group.column(k) for k in range(row_group.num_columns)]
                    total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == key)
        return total

    def numbers(self, key: str) -> np.ndarray:
        """A whole column of numbers, int64[N] or float64[N].

        Raises: InputError where it holds anything else, or nothing in some row.
        """
        field, types = self.schema.field(key).type, self.pa.types
        whole = types.is_integer(field) or types.is_boolean(field)
        if not whole and not types.is_floating(field):
            raise InputError(
                f"{self.name}: column {key} is of type {field}, but labels are whole numbers (classes) or real ones "
                "(values): map names to numbers first, or choose another column with data.labels_key"
            )
        parts, start = [np.zeros(0, np.int64 if whole else np.float64)], 0
        for chunk in self.chunks(key):
            if chunk.null_count:
                row = start + int(np.argmax(chunk.is_null().to_numpy(zero_copy_only=False)))
                raise InputError(f"{self.name}: row {row} has no label in column {key}: every example needs one")
            parts.append(chunk.to_numpy(zero_copy_only=False).astype(parts[0].dtype))
            start += len(chunk)
        return np.concatenate(parts)

    def ids(self, key: str) -> np.ndarray:
        """A whole column that tells users apart: int64[N], uint64[N] or text[N].

        Raises: InputError where there is none, it holds anything else, or nothing in some row.
        """
        types = self.pa.types
        if key not in self.names:
            raise InputError(f"{self.name} has no column {key}: choose one of {', '.join(self.names)} in data.user_key")
        field = self.schema.field(key).type
        whole, text = types.is_integer(field), types.is_string(field) or types.is_large_string(field)
        if not whole and not text:
            raise InputError(f"{self.name}: column {key} is of type {field}, but user ids are whole numbers or text")
        dtype = np.dtype(np.str_) if text else np.dtype(np.uint64 if types.is_uint64(field) else np.int64)
        parts: list[Any] = [np.zeros(0, dtype)]
        start = 0
        for chunk in self.chunks(key):
            if chunk.null_count:
                row = start + int(np.argmax(chunk.is_null().to_numpy(zero_copy_only=False)))
                raise InputError(f"{self.name}: row {row} has no user in column {key}: every record is somebody's")
            parts.append(np.array(chunk.to_pylist(), dtype))
            start += len(chunk)
        return np.concatenate(parts)

    def _schema(self, number: int) -> Any:
        if self.is_parquet[number]:
            return self.open(number).schema_arrow
        self._arrow[number] = self._guarded(number, lambda: self._map(self.paths[number]))
        return self._arrow[number].schema

    def _map(self, path: Path) -> Any:
        """Arrow's stream format, which Hugging Face datasets writes, or its file format."""
        source = self.pa.memory_map(str(path))
        try:
            return self.pa.ipc.open_stream(source).read_all()
        except self.pa.ArrowInvalid:
            source.seek(0)
            return self.pa.ipc.open_file(source).read_all()

    def _guarded(self, number: int, action: Any) -> Any:
        try:
            return action()
        except (OSError, self.pa.ArrowException) as error:
            raise InputError(
                f"{self.paths[number]} cannot be read ({error}): it is damaged, truncated, or no "
                ".parquet or .arrow file"
            ) from error


class InMemoryColumn:
    """Values from pieces that are in memory or memory-mapped."""

    def __init__(self, tables: Tables, key: str):
        self._chunks = tables.chunks(key)
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def values(self, indices: np.ndarray) -> list[Any]:
        """The values of rows `indices`, int64[n]."""
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        places = indices - self._starts[owners]
        return [
            self._chunks[owner][place].as_py() for owner, place in zip(owners.tolist(), places.tolist(), strict=True)
        ]


class RowGroupColumn:
    """Values read with the whole row group that holds them; each thread keeps the last few groups."""

    def __init__(self, tables: Tables, key: str):
        self._tables, self._key = tables, key
        self._groups: list[tuple[int, int]] = []
        lengths = []
        for number in range(len(tables.paths)):
            metadata = tables.open(number).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                lengths.append(metadata.row_group(group).num_rows)
        self._starts = np.cumsum([0, *lengths])
        self._own = threading.local()

    def values(self, indices: np.ndarray) -> list[Any]:
        """The values of rows `indices`, int64[n]; each row group that they need is read once."""
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        found: list[Any] = [None] * len(indices)
        for place in np.argsort(owners, kind="stable").tolist():
            owner = int(owners[place])
            found[place] = self._group(owner)[int(indices[place] - self._starts[owner])].as_py()
        return found

    def _group(self, owner: int) -> Any:
        kept: OrderedDict[int, Any] = self._own.__dict__.setdefault("kept", OrderedDict())
        if owner not in kept:
            number, group = self._groups[owner]
            files: dict[int, Any] = self._own.__dict__.setdefault("files", {})
            if number not in files:
                files[number] = self._tables.open(number)
            table = files[number].read_row_group(group, columns=[self._key])
            kept[owner] = table.column(self._key).combine_chunks()
            while len(kept) > _KEPT_GROUPS:
                kept.popitem(last=False)
        return kept[owner]


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
