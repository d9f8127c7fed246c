"""Parquet and Arrow files as Hugging Face datasets writes them: images, text or tokens, and labels."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.columns import Column, InMemoryColumn, RowGroupColumn, Tables
from dpscale.data.corrupt import CorruptExample, read_each
from dpscale.data.images import ImageDecoder
from dpscale.data.options import SourceOptions
from dpscale.data.source import FEATURES, LABEL, SAMPLED_ROWS, VALID, Batch, SourceMetadata, check_class_labels
from dpscale.data.text import build_tokenizer, tokenize_rows
from dpscale.data.tsv import LABEL_NAMES, TEXT_NAMES, find_column
from dpscale.errors import InputError

IMAGE_NAMES = ("image", "img")
TOKEN_NAMES = ("input_ids", "tokens")
# Needed columns below this (uncompressed) stay in memory; above, a row is read with its whole row group.
IN_MEMORY_BYTES = 2**31


class TableSource:
    """Rows of one or more files of one schema, in the order given.

    | type of the features' column | features |
    | --- | --- |
    | {bytes, path} or binary: compressed images | uint8[image_size, image_size, 3] |
    | string | int32[sequence_length] through `data.tokenizer` |
    | list of integers: token ids | int32[sequence_length], cut, or filled up with 0 |
    | numbers in lists of one fixed size | float32[size] |

    Token ids without a column of labels are documents: labels are the tokens that follow, -1 past a document's end.
    Arrow files are memory-mapped. Parquet up to 2 GiB is held in memory; a larger one costs a whole row group for each
    row, so convert it. Class names are those in the files' own metadata.

    Raises: InputError for columns that are missing or of another type, labels that are null or outside of the classes.
    """

    def __init__(self, paths: Sequence[Path], options: SourceOptions, name: str):
        self._options, self._name = options, name
        tables = Tables(paths, name)
        self._key = find_column(
            options.features_key, "features", IMAGE_NAMES + TEXT_NAMES + TOKEN_NAMES, tables.names, name
        )
        self._read_features(tables.schema.field(self._key).type)
        has_label = options.labels_key != "labels" or any(column in tables.names for column in LABEL_NAMES)
        self._documents = self._kind == "tokens" and not has_label
        self._features: Column = (
            InMemoryColumn(tables, self._key)
            if tables.column_bytes(self._key) <= IN_MEMORY_BYTES
            else RowGroupColumn(tables, self._key)
        )
        if not tables.num_rows:
            raise InputError(f"{name} holds no row: training needs at least one example")
        features = SourceMetadata(
            name=name,
            feature_shape=self._shape,
            feature_dtype=self._dtype,
            label_kind="tokens",
            full_scale=255.0 if self._kind == "image" else 1.0,
            vocabulary_size=self._tokenizer.vocabulary_size if self._tokenizer else self._vocabulary,
            padding_token=self._tokenizer.padding_token if self._tokenizer else (0 if self._kind == "tokens" else None),
        )
        self._metadata = self._next_tokens(features) if self._documents else self._read_labels(features, tables)
        self._length = tables.num_rows

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of rows of all files."""
        return self._length

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, int64[n], decoded or tokenised by the calling thread."""
        indices = np.asarray(indices)
        values = dict(zip(indices.tolist(), self._features.values(indices), strict=True))
        if self._tokenizer is not None:
            return self._text_rows(indices, values)
        if self._documents:
            return read_each(indices, lambda index: self._document(values[index]), self._metadata, self._options)
        return read_each(
            indices, lambda index: (self._one(values[index]), self._labels[index]), self._metadata, self._options
        )

    def fingerprint_parts(self) -> bytes:
        """A digest of all labels, of 1,024 evenly spaced rows as stored, and of how they are read."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(repr((self._kind, self._shape, self._options.image_resize, len(self))).encode())
        digest.update(self._tokenizer.digest if self._tokenizer else b"")
        if not self._documents:
            digest.update(np.ascontiguousarray(self._labels).view(np.uint8).data)
        chosen = np.unique(np.linspace(0, len(self) - 1, SAMPLED_ROWS).astype(np.int64))
        for value in self._features.values(chosen):
            digest.update(hashlib.blake2b(_stored_bytes(value)).digest())
        return digest.digest()

    def _next_tokens(self, features: SourceMetadata) -> SourceMetadata:
        if self._vocabulary is None:
            raise InputError(
                f"{self._name} holds tokens and no column of labels, so each row is a document whose next tokens are "
                "predicted: set data.vocabulary_size, or name the labels with data.labels_key"
            )
        return replace(features, num_classes=self._vocabulary, label_shape=self._shape)

    def _read_labels(self, features: SourceMetadata, tables: Tables) -> SourceMetadata:
        options, name = self._options, self._name
        label = find_column(options.labels_key, "labels", LABEL_NAMES, tables.names, name)
        self._labels = tables.numbers(label)
        class_names = _class_names(tables.schema, label)
        num_classes = _num_classes(options, class_names, name)
        if self._labels.dtype.kind == "f":
            return replace(features, label_kind="value")
        check_class_labels(self._labels, num_classes, name)
        return replace(features, label_kind="class", num_classes=num_classes, class_names=class_names)

    def _read_features(self, arrow_type: Any) -> None:
        """How a value of the features' column becomes an array, from its type."""
        self._decode = self._tokenizer = self._vocabulary = None
        self._kind, length = _kind(arrow_type, self._key, self._name)
        self._dtype = np.dtype({"image": np.uint8, "vector": np.float32}.get(self._kind, np.int32))
        if self._kind == "image":
            self._decode = ImageDecoder(self._options, self._name)
            self._shape: tuple[int, ...] = self._decode.shape
        elif self._kind == "text":
            self._tokenizer = build_tokenizer(self._options, self._name)
            self._shape = (self._tokenizer.length,)
        elif self._kind == "tokens":
            if self._options.sequence_length is None:
                raise InputError(
                    f"{self._name} holds lists of tokens, and every example must have one constant length: set "
                    "data.sequence_length"
                )
            self._shape, self._vocabulary = (self._options.sequence_length,), self._options.vocabulary_size
        else:
            self._shape = (length,)

    def _text_rows(self, indices: np.ndarray, values: dict[int, Any]) -> Batch:
        assert self._tokenizer is not None
        texts = [values[index] for index in indices.tolist()]
        ids, valid = tokenize_rows(self._tokenizer, texts, indices, self._name, self._options.on_corrupt)
        rows = {FEATURES: ids, LABEL: self._labels[indices].astype(self._metadata.label_dtype)}
        if self._options.on_corrupt == "error":
            return rows
        rows[LABEL][~valid] = 0
        return {**rows, VALID: valid}

    def _one(self, value: Any) -> np.ndarray:
        if value is None:
            raise CorruptExample(f"column {self._key} is null there")
        if self._decode is not None:
            return self._decode(_image_bytes(value))
        if self._kind == "tokens":
            return self._tokens(value, self._shape[0])
        if len(value) != self._shape[0] or any(x is None for x in value):
            raise CorruptExample(f"column {self._key} has a null or {len(value)} numbers there")
        return np.asarray(value, np.float32)

    def _document(self, value: Any) -> tuple[np.ndarray, np.ndarray]:
        """The first T tokens, and the one that follows each; -1 where the document has ended."""
        if value is None:
            raise CorruptExample(f"column {self._key} is null there")
        length = self._shape[0]
        window = self._tokens(value, length + 1)
        following = window[1:].copy()
        following[max(0, len(value) - 1) :] = -1
        return window[:-1], following

    def _tokens(self, value: Any, length: int) -> np.ndarray:
        """int32[length]: cut, or filled up with 0."""
        if any(token is None for token in value):
            raise CorruptExample(f"column {self._key} has a null in its list there")
        ids = np.asarray(value, np.int64)
        top = self._vocabulary or np.iinfo(np.int32).max
        if len(ids) and (ids.min() < 0 or ids.max() >= top):
            raise InputError(
                f"{self._name}: column {self._key} holds token {int(ids.max())}, but ids must lie "
                f"in 0 to {top - 1}: the "
                "data were made with another vocabulary, or data.vocabulary_size is wrong"
            )
        row = np.zeros(length, np.int32)
        row[: len(ids)] = ids[: len(row)]
        return row


def open_tables(path: Path, options: SourceOptions) -> TableSource:
    """What `table_files` finds. Raises: InputError as it and `TableSource` do."""
    return TableSource(table_files(path), options, str(path))


def table_files(path: Path) -> list[Path]:
    """A .parquet or .arrow file, a pattern such as DIR/train-*.parquet, or a folder whose files are all of one split.

    Raises: InputError where nothing matches, or a folder holds several splits.
    """
    if "*" in path.name:
        paths = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        paths = sorted([*path.glob("*.parquet"), *path.glob("*.arrow")])
        splits = sorted({file.name.partition("-")[0].partition(".")[0] for file in paths})
        if len(splits) > 1:
            raise InputError(
                f"{path} holds files of several names ({', '.join(splits[:5])}), which may be several splits: name one "
                f"with a pattern, for example {path}/{splits[0]}*{paths[0].suffix}"
            )
    else:
        paths = [path]
    if not paths:
        raise InputError(f"no file matches {path}: give a .parquet or .arrow file, a folder of them, or a pattern")
    return paths


def _kind(arrow_type: Any, key: str, name: str) -> tuple[str, int]:
    """("image" | "text" | "tokens" | "vector", length of a vector)."""
    import pyarrow.types as types

    if types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0:
        return "image", 0
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image", 0
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "text", 0
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        if types.is_integer(arrow_type.value_type):
            return "tokens", 0
        if types.is_fixed_size_list(arrow_type) and types.is_floating(arrow_type.value_type):
            return "vector", arrow_type.list_size
    raise InputError(
        f"{name}: column {key} is of type {arrow_type}, but features are images ({{bytes, path}}), "
        "text, lists of token ids, "
        "or numbers in lists of a fixed size: choose another column with data.features_key, or "
        "convert it to an .npz file"
    )


def _image_bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise CorruptExample(
            "the image is stored as a path without bytes: embed the images (datasets' embed_table_storage), or use "
            "the folder itself"
        )
    return data


def _stored_bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        return value.get("bytes") or b""
    return value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass")


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Of a ClassLabel, as Hugging Face datasets notes them in the schema."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(described) if isinstance(described, list) else None


def _num_classes(options: SourceOptions, class_names: tuple[str, ...] | None, name: str) -> int | None:
    if class_names is None:
        return options.num_classes
    if options.num_classes not in (None, len(class_names)):
        raise InputError(
            f"{name} names {len(class_names)} classes, but data.num_classes={options.num_classes}: leave it out"
        )
    return len(class_names)
