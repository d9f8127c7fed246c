"""ChaCha20: the RFC's own vectors, and a pure-Python reference that other tests sample from."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.chacha import chacha20_words, key_words
from dpscale.errors import InputError

ZERO_KEY = bytes(32)
# (key, counter, nonce, key stream): RFC 8439 section 2.3.2, then appendix A.1, vectors 1 to 5.
VECTORS = [
    (
        bytes(range(32)),
        1,
        bytes.fromhex("000000090000004a00000000"),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        ZERO_KEY,
        0,
        bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        ZERO_KEY,
        1,
        bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\1",
        1,
        bytes(12),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\0\xff" + bytes(30),
        2,
        bytes(12),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        ZERO_KEY,
        0,
        bytes(11) + b"\2",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


def reference_block(key: bytes, counter: int, nonce: bytes = bytes(12)) -> list[int]:
    """The sixteen words of one block with Python integers, step by step as RFC 8439 section 2.3 tells them."""

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for into, other, target, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[into] = (s[into] + s[other]) % 2**32
            mixed = s[target] ^ s[into]
            s[target] = (mixed << left | mixed >> 32 - left) % 2**32

    start = list(struct.unpack("<16I", b"expand 32-byte k" + key + struct.pack("<I", counter) + nonce))
    state = list(start)
    for _ in range(10):
        for i in range(4):
            quarter(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(x + y) % 2**32 for x, y in zip(state, start, strict=True)]


def blocks(key: bytes, counters: list[int], nonce: bytes = bytes(12)) -> np.ndarray:
    nonce_words = jnp.asarray(np.frombuffer(nonce, "<u4").astype(np.uint32))
    return np.stack(jax.jit(chacha20_words)(key_words(key), jnp.asarray(counters, jnp.uint32), nonce_words), axis=1)


@pytest.mark.parametrize("vector", VECTORS)
def test_the_block_function_gives_the_vectors_of_the_rfc(vector):
    key, counter, nonce, stream = vector
    expected = struct.unpack("<16I", bytes.fromhex(stream))
    assert tuple(reference_block(key, counter, nonce)) == expected
    assert tuple(blocks(key, [counter], nonce)[0]) == expected


def test_blocks_equal_the_reference_for_random_keys_nonces_and_counters():
    rng = np.random.default_rng(0)
    counters = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, *map(int, rng.integers(0, 2**32, 11))]
    for _ in range(4):
        key, nonce = rng.bytes(32), rng.bytes(12)
        assert blocks(key, counters, nonce).tolist() == [reference_block(key, c, nonce) for c in counters]


def test_without_a_nonce_the_nonce_is_zero():
    words = chacha20_words(key_words(ZERO_KEY), jnp.zeros(1, jnp.uint32))
    assert [int(w[0]) for w in words] == reference_block(ZERO_KEY, 0)


def test_key_words_are_little_endian():
    assert key_words(bytes(range(32)))[:2].tolist() == [0x03020100, 0x07060504]
    assert key_words(ZERO_KEY).dtype == np.uint32


@pytest.mark.parametrize("size", [0, 8, 31, 33])
def test_a_key_of_another_size_is_refused(size):
    with pytest.raises(InputError, match="32"):
        key_words(bytes(size))
