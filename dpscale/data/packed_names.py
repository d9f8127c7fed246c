"""Millions of names in two arrays instead of as many Python objects."""

from collections.abc import Iterable

import numpy as np


class PackedNames:
    """Byte strings, by position: one blob and int64 offsets, 8 bytes a name besides its own.

    `groups`: lists of names, taken one after the other, so that only one list exists at a time.
    """

    def __init__(self, groups: Iterable[list[bytes]]):
        blobs, lengths = [], []
        for names in groups:
            blobs.append(b"".join(names))
            lengths.append(np.fromiter((len(name) for name in names), np.int64, len(names)))
        self.blob = b"".join(blobs)
        counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: int) -> bytes:
        return self.blob[self.offsets[position] : self.offsets[position + 1]]
