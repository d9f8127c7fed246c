"""Text and labels in a tab-separated file with a header line, as GLUE's SST-2 comes; memory-mapped."""

import hashlib
import mmap
from pathlib import Path

import numpy as np

from dpscale.data.corrupt import CorruptExample
from dpscale.data.options import SourceOptions
from dpscale.data.source import FEATURES, LABEL, SAMPLED_ROWS, VALID, Batch, SourceMetadata, check_class_labels
from dpscale.data.text import build_tokenizer, tokenize_rows
from dpscale.errors import InputError

TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = ("label", "labels")
_BLOCK = 2**26  # bytes looked through at once
_TAB, _NEWLINE, _RETURN = 9, 10, 13
_LONGEST_LABEL = 24


class TsvSource:
    """One example a line, `features_key` and `labels_key` naming the header's columns (or "text" and "label", ..).

    Quotes mean nothing, as in GLUE. Whole numbers are classes, other numbers values. The index takes 16 bytes a line
    and no Python object; texts are read and tokenised when asked for.

    Raises: InputError for lines of another number of columns, labels that are no numbers or outside of the classes, and
    what `build_tokenizer` refuses.
    """

    def __init__(self, path: Path, options: SourceOptions):
        self._name = str(path)
        self._tokenizer = build_tokenizer(options, self._name)
        self._options = options
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): give a tab-separated file with a header") from error
        header, start = self._header()
        text = find_column(options.features_key, "features", TEXT_NAMES, header, self._name)
        label = find_column(options.labels_key, "labels", LABEL_NAMES, header, self._name)
        bounds = _cells(self._data, start, len(header), self._name)
        if not len(bounds):
            raise InputError(f"{path} has a header and no line below it: training needs at least one example")
        self._bounds = bounds[:, [header.index(text), header.index(text) + 1]]
        column = header.index(label)
        self._labels = self._parse_labels(bounds[:, column] + 1, bounds[:, column + 1])
        classes = self._labels.dtype.kind == "i"
        if classes:
            check_class_labels(self._labels, options.num_classes, self._name)
        self._metadata = SourceMetadata(
            name=self._name,
            feature_shape=(self._tokenizer.length,),
            feature_dtype=np.dtype(np.int32),
            label_kind="class" if classes else "value",
            num_classes=options.num_classes,
            vocabulary_size=self._tokenizer.vocabulary_size,
            padding_token=self._tokenizer.padding_token,
        )

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of lines below the header."""
        return len(self._bounds)

    def rows(self, indices: np.ndarray) -> Batch:
        """The texts at `indices`, int64[n], as token ids."""
        indices = np.asarray(indices)
        texts = [self._text(index) for index in indices.tolist()]
        ids, valid = tokenize_rows(self._tokenizer, texts, indices, self._name, self._options.on_corrupt)
        rows = {FEATURES: ids, LABEL: self._labels[indices].astype(self._metadata.label_dtype)}
        if self._options.on_corrupt == "error":
            return rows
        rows[LABEL][~valid] = 0
        return {**rows, VALID: valid}

    def fingerprint_parts(self) -> bytes:
        """A digest of the labels, the lines' places, 1,024 evenly spaced lines, and the tokenizer."""
        digest = hashlib.blake2b(self._tokenizer.digest, digest_size=32)
        for array in (self._bounds, self._labels):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        for index in np.unique(np.linspace(0, len(self) - 1, SAMPLED_ROWS).astype(np.int64)):
            before, end = self._bounds[index]
            digest.update(self._data[before + 1 : end])
        return digest.digest()

    def _header(self) -> tuple[list[str], int]:
        end = self._data.find(b"\n")
        line = self._data[: end if end >= 0 else len(self._data)].rstrip(b"\r")
        try:
            return line.decode("utf-8-sig").split("\t"), end + 1 if end >= 0 else len(self._data)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._name}: the first line is no text ({error}): give a UTF-8 file") from error

    def _text(self, index: int) -> str | CorruptExample:
        before, end = self._bounds[index]
        try:
            return self._data[before + 1 : end].rstrip(b"\r").decode()
        except UnicodeDecodeError as error:
            return CorruptExample(f"line {index + 2} is not UTF-8: {error}")

    def _parse_labels(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64[N], or float64[N] where one label is no whole number."""
        data = np.frombuffer(self._data, np.uint8)
        lengths = ends - starts
        wrong = (lengths < 1) | (lengths > _LONGEST_LABEL)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{self._name}: line {row + 2} has a label of {int(lengths[row])} characters, but labels are numbers: "
                "map names to numbers first"
            )
        text = np.zeros((len(starts), int(lengths.max())), np.uint8)
        for place in range(text.shape[1]):
            inside = place < lengths
            text[inside, place] = data[starts[inside] + place]
        text[text == _RETURN] = 0
        words = text.view(f"S{text.shape[1]}")[:, 0]
        for dtype in (np.int64, np.float64):
            try:
                return words.astype(dtype)
            except ValueError:
                continue
        row = next(row for row, word in enumerate(words) if not _is_number(word))
        raise InputError(
            f"{self._name}: line {row + 2} has the label {words[row].decode(errors='replace')!r}, but labels are "
            "numbers: map names to numbers first"
        )


def find_column(wanted: str, default: str, known: tuple[str, ...], present: list[str], name: str) -> str:
    """The column that `data.features_key` or `data.labels_key` names; where it was left alone, the one known name.

    Raises: InputError that lists the columns.
    """
    if wanted in present:
        return wanted
    found = [column for column in known if column in present]
    if wanted == default and len(found) == 1:
        return found[0]
    raise InputError(
        f"{name} has no column {wanted!r}; its columns are {', '.join(present)}: set data.{default}_key to one of them"
    )


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _cells(data: mmap.mmap, start: int, columns: int, name: str) -> np.ndarray:
    """int64[lines, columns + 1]: the place before each line's first cell, and where each of its cells ends."""
    view = np.frombuffer(data, np.uint8)
    tabs, ends = [], []
    for block in range(start, len(view), _BLOCK):
        part = view[block : block + _BLOCK]
        tabs.append(np.flatnonzero(part == _TAB) + block)
        ends.append(np.flatnonzero(part == _NEWLINE) + block)
    tab, end = (np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in (tabs, ends))
    if len(view) > start and (not len(end) or end[-1] != len(view) - 1):
        end = np.append(end, len(view))
    before = np.concatenate([np.array([start - 1]), end[:-1]]) if len(end) else end
    counts = np.searchsorted(tab, end) - np.searchsorted(tab, before, side="right")
    if (counts != columns - 1).any():
        line = int(np.argmax(counts != columns - 1))
        raise InputError(
            f"{name}: line {line + 2} has {int(counts[line]) + 1} columns, but the header has {columns}: every line "
            "needs as many; empty lines and tabs inside a text are not allowed"
        )
    return np.concatenate([before[:, None], tab.reshape(len(end), columns - 1), end[:, None]], axis=1).astype(np.int64)
