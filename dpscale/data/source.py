"""ExampleSource: a data set as random access to rows, and the checks that every source shares."""

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dpscale.errors import InputError

FEATURES = "features"
LABEL = "label"
VALID = "valid"
PRESENT = "present"
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class SourceMetadata:
    """What is public about a data set besides its size: shapes, types and constants of the format.

    `feature_shape` and `feature_dtype` are one example's, as `rows` returns it. `label_kind` is "class"
    (int32 scalar in [0, num_classes)), "value" (float32 of `label_shape`) or "tokens" (int32 of `label_shape`
    [T]: the token that follows each of the T tokens of the features, negative where none does). `num_classes` is
    None where
    nobody said it: it is never counted from the labels, which are private; for "tokens" it is the
    vocabulary's size. `full_scale` is the largest value
    that the format can hold (255 for 8-bit pixels, 1 for floating point); dividing by it gives [0, 1].
    `class_names` are the classes in the order of their numbers, where the format names them.
    `vocabulary_size`: features are token ids in [0, vocabulary_size); `padding_token` fills up short texts,
    and a model must not attend to it. None where features are no tokens, or no text is short.
    `records`: where a row is a user, the most records in it, K; shapes stay those of one record.
    """

    name: str
    feature_shape: tuple[int, ...]
    feature_dtype: np.dtype
    label_kind: Literal["class", "value", "tokens"]
    num_classes: int | None = None
    label_shape: tuple[int, ...] = ()
    full_scale: float = 1.0
    class_names: tuple[str, ...] | None = None
    vocabulary_size: int | None = None
    padding_token: int | None = None
    records: int | None = None

    @property
    def label_dtype(self) -> np.dtype:
        """dtype of the labels that `rows` returns: int32 for classes and tokens, float32 for values."""
        return np.dtype(np.float32 if self.label_kind == "value" else np.int32)


@runtime_checkable
class ExampleSource(Protocol):
    """Random access to the examples of one data set; safe to call from several threads at once."""

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants; reading it touches no example."""
        ...

    def __len__(self) -> int:
        """Number of examples, at least 1."""
        ...

    def rows(self, indices: np.ndarray) -> Batch:
        """The examples at `indices` (int64[n], each in [0, len), repeats allowed), in that order.

        Returns {"features": feature_dtype[n, *feature_shape], "label": label_dtype[n, *label_shape]}, new
        arrays that the caller may keep; n may be 0. Row i depends on record indices[i] alone.

        A source that was told to replace unreadable examples (`data.on_corrupt = "replace"`) also returns
        {"valid": bool[n]}, False where it gives zeros in place of an example. Such a row keeps its index and
        must add nothing: whoever reads rows joins "valid" to the mask. How many there are is sensitive.
        """
        ...

    def fingerprint_parts(self) -> bytes:
        """A digest of the content, the same on every process and for every copy of the files.

        An unkeyed hash of private data is a membership test, so it must not leave the run: the caller keys
        it.
        """
        ...


def empty_rows(metadata: SourceMetadata, count: int) -> Batch:
    """`count` rows of zeros, with the shapes of `rows`: what fills the padded part of a physical batch.

    Rows of users have an axis of `metadata.records` records after the first, and "present": bool[count, records].
    """
    leading = (count,) if metadata.records is None else (count, metadata.records)
    rows = {
        FEATURES: np.zeros((*leading, *metadata.feature_shape), metadata.feature_dtype),
        LABEL: np.zeros((*leading, *metadata.label_shape), metadata.label_dtype),
    }
    return rows if metadata.records is None else {**rows, PRESENT: np.zeros(leading, bool)}


WHOLE_CONTENT_BYTES = 256 * 2**20
SAMPLED_ROWS = 1024


def content_digest(arrays: dict[str, np.ndarray]) -> bytes:
    """32 bytes over names, shapes, dtypes and content; arrays share their leading axis.

    Below 256 MiB in all every byte counts; above, 1024 evenly spaced rows of each array do, so that a
    larger-than-memory data set is not read whole at each start. File times are left out: a copy on another
    disk is the same data set.
    """
    digest = hashlib.blake2b(digest_size=32)
    whole = sum(array.nbytes for array in arrays.values()) <= WHOLE_CONTENT_BYTES
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape}:{whole};".encode())
        for block in _blocks(array, whole):
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.digest()


def _blocks(array: np.ndarray, whole: bool) -> Iterator[np.ndarray]:
    """Pieces of `array` of about 8 MiB, all of it or evenly spaced rows only."""
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    rows_at_once = max(1, 2**23 // row_bytes)
    if whole:
        for start in range(0, len(array), rows_at_once):
            yield array[start : start + rows_at_once]
    else:
        chosen = np.unique(np.linspace(0, len(array) - 1, SAMPLED_ROWS).astype(np.int64))
        for start in range(0, len(chosen), rows_at_once):
            yield array[chosen[start : start + rows_at_once]]


def expect_scattered_reads(array: np.ndarray) -> None:
    """Tells the system not to read ahead around small rows: a Poisson draw takes rows from all over the file.

    Rows of many pages keep the read-ahead, which then fetches the row's own next pages.
    """
    mapping = array.base
    small = array.nbytes // max(1, len(array)) <= 4 * mmap.PAGESIZE
    if isinstance(mapping, mmap.mmap) and small and hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)


def check_class_labels(labels: np.ndarray, num_classes: int | None, name: str) -> None:
    """Refuses negative labels and labels at or above `num_classes`, reading a million at a time.

    Raises: InputError that names the first such row.
    """
    for start in range(0, len(labels), 2**20):
        part = np.asarray(labels[start : start + 2**20])
        wrong = part < 0 if num_classes is None else (part < 0) | (part >= num_classes)
        if wrong.any():
            row = int(np.argmax(wrong))
            rule = "labels start at 0" if num_classes is None else f"labels must lie in 0 to {num_classes - 1}"
            raise InputError(
                f"{name}: row {start + row} has label {int(part[row])}, but {rule}: number the classes from "
                "0, or correct "
                "data.num_classes"
            )
