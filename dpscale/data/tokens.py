"""A long sequence of token ids in one memory-mapped file: each window of T + 1 tokens is one example."""

import hashlib
from pathlib import Path

import numpy as np

from dpscale.data.options import SourceOptions
from dpscale.data.source import FEATURES, LABEL, Batch, SourceMetadata, content_digest, expect_scattered_reads
from dpscale.errors import InputError


class TokenFileSource:
    """Disjoint windows of `sequence_length` + 1 ids (uint16 or uint32, little-endian, no header).

    Row i is made of tokens [i (T + 1), (i + 1) (T + 1)): features are its first T, labels the T that follow each of
    them. Windows are disjoint, so that changing one token changes one example; up to T tokens at the end of the file
    belong to none. A window may hold parts of several documents: the unit of privacy is the window.

    Raises: InputError for a missing key or a file that does not fit; `rows` raises it for ids outside of the
    vocabulary.
    """

    def __init__(self, path: Path, options: SourceOptions):
        length, vocabulary = options.sequence_length, options.vocabulary_size
        if length is None or vocabulary is None:
            missing = "data.sequence_length" if length is None else "data.vocabulary_size"
            raise InputError(
                f"{path} is a file of token ids, and nothing in it says how they are to be read: set {missing}, for "
                f"example to {1024 if length is None else 50257}"
            )
        dtype = np.dtype(options.token_dtype).newbyteorder("<")
        try:
            size = path.stat().st_size
            if size % dtype.itemsize:
                raise InputError(
                    f"{path} has {size} bytes, which is no whole number of {options.token_dtype} "
                    "ids: it is truncated, or "
                    "data.token_dtype is wrong"
                )
            count = size // dtype.itemsize // (length + 1)
            if count == 0:
                raise InputError(
                    f"{path} holds {size // dtype.itemsize} tokens, fewer than one example of "
                    "data.sequence_length + 1 = "
                    f"{length + 1}"
                )
            tokens = np.memmap(path, dtype, mode="r", shape=(count, length + 1))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}): give a file of token ids") from error
        expect_scattered_reads(tokens)
        self._tokens = tokens
        self._metadata = SourceMetadata(
            name=str(path),
            feature_shape=(length,),
            feature_dtype=np.dtype(np.int32),
            label_kind="tokens",
            num_classes=vocabulary,
            label_shape=(length,),
            vocabulary_size=vocabulary,
        )

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of whole windows."""
        return len(self._tokens)

    def rows(self, indices: np.ndarray) -> Batch:
        """The windows at `indices`, int64[n]."""
        windows = np.asarray(self._tokens[indices])
        vocabulary = self._metadata.vocabulary_size or 0
        wrong = windows >= vocabulary
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise InputError(
                f"{self._metadata.name}: example {int(np.asarray(indices)[row])} holds token "
                f"{int(windows[row, place])}, "
                f"but data.vocabulary_size={vocabulary}: the file was made with another vocabulary, or "
                "data.token_dtype is wrong"
            )
        windows = windows.astype(np.int32)
        return {FEATURES: windows[:, :-1].copy(), LABEL: windows[:, 1:].copy()}

    def fingerprint_parts(self) -> bytes:
        """A digest of the content (`dpscale.data.source.content_digest`) and of how it is read."""
        digest = content_digest({"tokens": self._tokens})
        return hashlib.blake2b(digest + str(self._metadata.vocabulary_size).encode(), digest_size=32).digest()
