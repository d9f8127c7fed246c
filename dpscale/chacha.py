"""ChaCha20 words on any device: the cryptographic bit source of the noise.

The key is always an argument of the compiled program, never a constant in it, so that no program text, cache or
dump holds a secret.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpscale.errors import InputError

KEY_BYTES = 32
KEY_WORDS = 8
NONCE_WORDS = 3
WORDS_PER_BLOCK = 16

_CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4").astype(np.uint32)
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))

State = tuple[jax.Array, ...]


def key_words(key: bytes) -> np.ndarray:
    """Turn a 256-bit key into the eight uint32 words that ChaCha20 takes (little-endian, RFC 8439 section 2.3).

    Raises:
        InputError: `key` is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise InputError(
            f"a ChaCha20 key of {len(key)} bytes: it must have {KEY_BYTES}; derive one per purpose and step"
        )
    return np.frombuffer(key, dtype="<u4").astype(np.uint32)


def chacha20_words(
    key: jax.Array | np.ndarray, counters: jax.Array, nonce: tuple[int, int, int] | jax.Array = (0, 0, 0)
) -> State:
    """Return the ChaCha20 blocks of `counters` as sixteen arrays, word by word.

    Args:
        key: uint32[8], from `key_words`; may be traced (and should be: see the module).
        counters: uint32[n], the block counters, one per block.
        nonce: the three 32-bit words of the nonce. A key that serves one step only needs no nonce.

    Returns:
        Sixteen uint32[n]: `words[w][i]` is word w of the block with counter `counters[i]`.

    Guarantees: integers only, so the same words on every device, mesh and jax version.

    Source: RFC 8439, sections 2.1 to 2.3.
    """
    key = jnp.asarray(key, jnp.uint32)
    nonce = jnp.asarray(nonce, jnp.uint32)
    # Gives every word the shape and, inside shard_map, the device-varying type of a word of the result.
    zeros = counters ^ counters ^ key[0] ^ key[0] ^ nonce[0] ^ nonce[0]
    rows = [*_CONSTANTS, *(key[i] for i in range(KEY_WORDS)), counters, *(nonce[i] for i in range(NONCE_WORDS))]
    initial = tuple(zeros + jnp.asarray(row, jnp.uint32) for row in rows)
    # Rolled: unrolled, the ten double rounds compile ten times as long (5 s, not 0.5 s) and XLA's fusion recomputes
    # the whole block once for each word that is used.
    mixed = lax.fori_loop(0, 10, lambda _, state: _double_round(state), initial)
    return tuple(a + b for a, b in zip(mixed, initial, strict=True))


def _double_round(state: State) -> State:
    words = list(state)
    for a, b, c, d in (*_COLUMNS, *_DIAGONALS):
        words[a], words[b], words[c], words[d] = _quarter_round(words[a], words[b], words[c], words[d])
    return tuple(words)


def _quarter_round(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> State:
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


def _rotate_left(x: jax.Array, bits: int) -> jax.Array:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
