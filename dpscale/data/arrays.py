"""Examples held in NumPy arrays: given from Python, in an .npz file, or memory-mapped from .npy files."""

import zipfile
from pathlib import Path

import numpy as np

from dpscale.data.source import (
    FEATURES,
    LABEL,
    Batch,
    SourceMetadata,
    check_class_labels,
    content_digest,
    expect_scattered_reads,
)
from dpscale.errors import InputError

# What jax takes without 64-bit mode goes through as stored; the wider types are narrowed row by row.
_AS_STORED = ("?", "b", "B", "h", "H", "i", "e", "f")
_NARROWED = {"d": np.float32, "I": np.int32, "l": np.int32, "L": np.int32, "q": np.int32, "Q": np.int32}


class ArraySource:
    """Rows of two equally long arrays, in memory or memory-mapped; nothing is copied or read ahead.

    `features` is [N, ...] of bool, integers or floats; `labels` is integers [N] (classes) or floats [N, ...]
    (values). float64 is given out as float32 and wide integers as int32, row by row. `num_classes` enables
    the range check of the labels. Guarantees: row i depends on record i alone; features above 2^31 in
    magnitude are an error, never wrapped.

    Raises: InputError for an empty set, unequal lengths, object or text arrays, and labels outside the
    classes.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int | None = None,
        name: str = "arrays",
        full_scale: float | None = None,
    ):
        _check_pair(features, labels, name)
        classes = labels.dtype.kind in "biu"
        if classes and labels.ndim != 1:
            raise InputError(
                f"{name}: integer labels have shape {labels.shape}, but class labels are one number a row: "
                "flatten them, turn one-hot rows into class numbers, or store real-valued targets as float32"
            )
        if classes:
            check_class_labels(labels, num_classes, name)
        elif num_classes is not None:
            raise InputError(
                f"{name}: labels are {labels.dtype}, but num_classes={num_classes} means integer classes: "
                "store the labels as integers, or leave num_classes out for regression"
            )
        self._features, self._labels = features, labels
        dtype = np.dtype(_NARROWED.get(features.dtype.char, features.dtype))
        if full_scale is None:
            full_scale = float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0
        self._metadata = SourceMetadata(
            name=name,
            feature_shape=tuple(features.shape[1:]),
            feature_dtype=dtype,
            label_kind="class" if classes else "value",
            num_classes=num_classes,
            label_shape=tuple(labels.shape[1:]),
            full_scale=full_scale,
        )

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._features)

    def rows(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, int64[n], as new arrays."""
        features = np.asarray(self._features[indices])
        if features.dtype != self._metadata.feature_dtype:
            features = _narrow(features, self._metadata)
        labels = np.asarray(self._labels[indices]).astype(self._metadata.label_dtype, copy=False)
        return {FEATURES: features, LABEL: labels}

    def fingerprint_parts(self) -> bytes:
        """A digest of the content (`dpscale.data.source.content_digest`)."""
        return content_digest({FEATURES: self._features, LABEL: self._labels})


def _narrow(features: np.ndarray, metadata: SourceMetadata) -> np.ndarray:
    if metadata.feature_dtype.kind == "f":
        # A float64 beyond float32's range becomes inf, which the clipping treats as a non-finite example.
        with np.errstate(over="ignore", invalid="ignore"):
            return features.astype(np.float32)
    narrow = features.astype(np.int32)
    if (narrow != features).any():
        raise InputError(
            f"{metadata.name}: a feature of type {features.dtype} does not fit into int32: "
            "store it as float32, or renumber it"
        )
    return narrow


def _check_pair(features: np.ndarray, labels: np.ndarray, name: str) -> None:
    for role, array in (("features", features), ("labels", labels)):
        if array.dtype.char not in (*_AS_STORED, *_NARROWED):
            raise InputError(
                f"{name}: {role} have dtype {array.dtype}, but rows are numbers of a fixed size "
                "(bool, integers, float16, float32, float64): convert them before saving"
            )
        if array.ndim == 0:
            raise InputError(f"{name}: {role} are a single number, but the first axis must count the examples")
    if len(features) != len(labels):
        raise InputError(
            f"{name}: {len(features)} rows of features and {len(labels)} labels, but each example has one "
            "of both: "
            "save arrays of equal length"
        )
    if len(features) == 0:
        raise InputError(f"{name}: the data set is empty, but training needs at least one example")


def open_npz(path: Path, *, features_key: str, labels_key: str, num_classes: int | None = None) -> ArraySource:
    """The arrays `features_key` and `labels_key` of an .npz file, read into memory; pickled objects are
    refused.

    Raises: InputError for a file that cannot be read, missing keys (naming those present) and what
    ArraySource refuses.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        _check_format(path)
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path} is a single array, but .npz must hold two: save it with numpy.savez")
            for key in (features_key, labels_key):
                if key not in archive.files:
                    raise InputError(_missing_key(path, key, archive.files, features_key))
                arrays[key] = archive[key]
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(_unreadable(path, error)) from error
    return ArraySource(arrays[features_key], arrays[labels_key], num_classes=num_classes, name=str(path))


def open_npy_pair(features: Path, labels: Path, *, num_classes: int | None = None) -> ArraySource:
    """Two .npy files, memory-mapped read-only: only the rows that are asked for are read.

    Raises: InputError for a file that cannot be read or mapped (object arrays, truncated files) and what
    ArraySource refuses.
    """
    name = str(features.parent) if features.parent == labels.parent else str(features)
    rows = _map(features)
    expect_scattered_reads(rows)
    return ArraySource(rows, _map(labels), num_classes=num_classes, name=name)


def _map(path: Path) -> np.ndarray:
    if path.is_dir():
        raise InputError(f"{path} is a folder, but a .npy file was expected")
    try:
        _check_format(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(_unreadable(path, error)) from error


def _check_format(path: Path) -> None:
    """numpy takes any unknown file for a pickle; say what it really is."""
    with path.open("rb") as file:
        start = file.read(6)
    if not start.startswith((b"PK", b"\x93NUMPY")):
        raise InputError(f"{path} is not a NumPy file, whatever its name says: write it with numpy.save or savez")


def _missing_key(path: Path, key: str, present: list[str], features_key: str) -> str:
    option = "features_key" if key == features_key else "labels_key"
    return (
        f"{path} holds no array {key!r}; it holds {', '.join(sorted(present)) or 'nothing'}: "
        f"set data.{option} to one of them"
    )


def _unreadable(path: Path, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "pickle" in text.lower() or "object" in text.lower():
        return (
            f"{path} holds Python objects, and reading those could run code: "
            "save plain numeric arrays (array.astype('float32'), not dtype=object)"
        )
    return f"{path} cannot be read ({text}): check that the file is whole, readable and written by numpy.save or savez"
