"""Random examples computed from their index: any number of rows without storing one, for benchmarks and
scaling runs."""

import numpy as np

from dpscale.data.source import FEATURES, LABEL, Batch, SourceMetadata
from dpscale.errors import InputError

FORMS = "made_up:images:N:HEIGHT:WIDTH:CHANNELS:CLASSES or made_up:vectors:N:WIDTH:CLASSES"


class MadeUpSource:
    """`num_examples` rows of uniform random bytes with uniform random classes, a pure function of the index.

    Row i is the same on every machine: splitmix64 of a counter (Steele, Lea and Flood 2014). Nothing can be
    learnt from it.
    """

    def __init__(self, num_examples: int, feature_shape: tuple[int, ...], num_classes: int, name: str = "made_up"):
        if num_examples < 1 or num_classes < 1 or min(feature_shape, default=1) < 1:
            raise InputError(f"{name}: every number must be at least 1; the form is {FORMS}")
        self._length = num_examples
        self._words = -(-int(np.prod(feature_shape)) // 8)
        self._metadata = SourceMetadata(
            name=name,
            feature_shape=feature_shape,
            feature_dtype=np.dtype(np.uint8),
            label_kind="class",
            num_classes=num_classes,
            full_scale=255.0,
        )

    @classmethod
    def parse(cls, spec: str) -> "MadeUpSource":
        """From its text form, "made_up:images:N:H:W:C:classes" or "made_up:vectors:N:D:classes".

        Raises: InputError for anything else.
        """
        fields = spec.split(":")
        lengths = {"images": 7, "vectors": 5}
        if len(fields) < 2 or len(fields) != lengths.get(fields[1]) or not all(f.isdecimal() for f in fields[2:]):
            raise InputError(f"{spec!r} is not a made-up data set: the forms are {FORMS}")
        count, *shape, classes = (int(field) for field in fields[2:])
        return cls(count, tuple(shape), classes, name=spec)

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of examples."""
        return self._length

    def rows(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, int64[n]; O(n) time and memory."""
        indices = np.asarray(indices, np.uint64)
        stride = np.uint64(self._words + 1)
        counters = indices[:, None] * stride + np.arange(self._words + 1, dtype=np.uint64)
        words = _splitmix64(counters)
        shape = self._metadata.feature_shape
        pixels = np.ascontiguousarray(words[:, 1:]).view(np.uint8)[:, : int(np.prod(shape))]
        classes = np.uint64(self._metadata.num_classes or 1)
        return {
            FEATURES: np.ascontiguousarray(pixels).reshape(len(indices), *shape),
            LABEL: (words[:, 0] % classes).astype(np.int32),
        }

    def fingerprint_parts(self) -> bytes:
        """The parameters, which determine every row."""
        m = self._metadata
        return f"made_up:{self._length}:{m.feature_shape}:{m.num_classes}".encode()


def _splitmix64(counter: np.ndarray) -> np.ndarray:
    word = (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word
