"""Text to token ids of one constant length: bytes without any package, or a Hugging Face tokenizer.json."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dpscale.data.corrupt import CorruptExample, unreadable
from dpscale.data.extras import needs
from dpscale.data.options import SourceOptions
from dpscale.errors import InputError

PADDING, START, END, FIRST_BYTE = 0, 1, 2, 3  # of the byte-level vocabulary
BYTE_VOCABULARY = FIRST_BYTE + 256
_PADDING_NAMES = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


class Tokenizer(Protocol):
    """`tokenizer(texts) -> int32[n, length]`: a constant function of each text alone."""

    vocabulary_size: int
    padding_token: int
    length: int
    digest: bytes  # of everything that decides the ids

    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


class ByteTokenizer:
    """UTF-8 bytes: 0 padding, 1 start, 2 end, byte b is b + 3; 259 ids. Longer texts lose their last bytes."""

    vocabulary_size = BYTE_VOCABULARY
    padding_token = PADDING

    def __init__(self, length: int):
        if length < 3:
            raise InputError(f"data.sequence_length={length} leaves no room between start and end: give at least 3")
        self.length = length
        self.digest = f"bytes:{length}".encode()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32[len(texts), length]."""
        ids = np.full((len(texts), self.length), PADDING, np.int32)
        for row, text in zip(ids, texts, strict=True):
            data = np.frombuffer(text.encode("utf-8", "surrogatepass")[: self.length - 2], np.uint8)
            row[0] = START
            row[1 : 1 + len(data)] = data.astype(np.int32) + FIRST_BYTE
            row[1 + len(data)] = END
        return ids


class VocabularyTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`, with its own normalisation and special tokens.

    Raises: InputError for a file that is none, a vocabulary of another size than `vocabulary_size`, or one without a
    padding token.
    """

    def __init__(self, path: Path, length: int, vocabulary_size: int | None):
        tokenizers = needs("tokenizers", "text", "a tokenizer.json")
        # Each asking thread encodes its own rows; a second pool of threads inside would only get in the way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            content = path.read_bytes()
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # The package raises plain Exception for bad JSON.
        except Exception as error:
            raise InputError(
                f"data.tokenizer={path} cannot be read ({error}): give a tokenizer.json as Hugging Face's tokenizers "
                'writes it, or "bytes"'
            ) from error
        self.vocabulary_size = tokenizer.get_vocab_size()
        if vocabulary_size not in (None, self.vocabulary_size):
            raise InputError(
                f"{path} has {self.vocabulary_size} tokens, but data.vocabulary_size={vocabulary_size}: the tokenizer "
                "belongs to another vocabulary. Take the one that the model was trained with, or correct the number"
            )
        self.padding_token = _padding_token(tokenizer, path)
        tokenizer.enable_truncation(length)
        tokenizer.no_padding()
        self._tokenizer, self.length = tokenizer, length
        self.digest = hashlib.blake2b(content + str(length).encode()).digest()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32[len(texts), length]."""
        ids = np.full((len(texts), self.length), self.padding_token, np.int32)
        for row, encoded in zip(ids, self._tokenizer.encode_batch(list(texts)), strict=True):
            row[: len(encoded.ids)] = encoded.ids
        return ids


def build_tokenizer(options: SourceOptions, what: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer` for `data.sequence_length` tokens.

    Raises: InputError where a key is missing or does not fit.
    """
    length = options.sequence_length
    if length is None:
        raise InputError(
            f"{what} holds text, and every example must have one constant length: set data.sequence_length, "
            "for example to 128"
        )
    if options.tokenizer != "bytes":
        return VocabularyTokenizer(Path(options.tokenizer).expanduser(), length, options.vocabulary_size)
    if options.vocabulary_size not in (None, BYTE_VOCABULARY):
        raise InputError(
            f"the byte-level tokenizer has {BYTE_VOCABULARY} tokens, but data.vocabulary_size="
            f"{options.vocabulary_size}: leave it out, or set data.tokenizer to the tokenizer.json of that vocabulary"
        )
    return ByteTokenizer(length)


def tokenize_rows(
    tokenizer: Tokenizer, texts: Sequence[str | CorruptExample | None], indices: np.ndarray, name: str, on_corrupt: str
) -> tuple[np.ndarray, np.ndarray]:
    """(int32[n, length], valid bool[n]) of texts, of which those that are none are errors, or rows of zeros."""
    valid = np.array([isinstance(text, str) for text in texts], bool)
    for place in np.flatnonzero(~valid).tolist():
        if on_corrupt == "error":
            text = texts[place]
            error = text if isinstance(text, CorruptExample) else CorruptExample("it has no text")
            raise unreadable(name, int(indices[place]), error)
    ids = np.zeros((len(texts), tokenizer.length), np.int32)
    good = [text for text in texts if isinstance(text, str)]
    if good:
        ids[valid] = tokenizer(good)
    return ids, valid


def _padding_token(tokenizer, path: Path) -> int:
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for name in _PADDING_NAMES:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return number
    raise InputError(
        f"{path} has no padding token ({', '.join(_PADDING_NAMES)}), and short texts must be filled up: add one to the "
        "vocabulary, or save the file with padding enabled"
    )
