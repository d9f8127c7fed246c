"""Gaussian noise from a keyed stream: each value a pure function of (key of the step, global element index).

One ChaCha20 block of sixteen words serves five Box-Muller pairs, that is ten elements: pair p of block b takes
words 3p and 3p + 1 for a 64-bit radius (high word first) and word 3p + 2 for a 32-bit angle, and gives elements
10 b + 2 p (cosine) and 10 b + 2 p + 1 (sine). A key has 2**32 blocks: 4.29e10 elements.

The element index is the position in the flat vector of all leaves, so leaves lie in disjoint ranges, and the
words do not depend on the mesh. The floats made from them agree between compiled programs up to the last bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpscale.chacha import chacha20_words
from dpscale.errors import InputError

PAIRS_PER_BLOCK = 5
ELEMENTS_PER_BLOCK = 2 * PAIRS_PER_BLOCK
MAX_ELEMENTS = ELEMENTS_PER_BLOCK * 2**32

# Elements made at once: temporary memory is about twelve bytes for each of these, whatever the length of the vector.
CHUNK_ELEMENTS = 10 * 2**14

# Shapes are indexed with int32 while jax keeps to 32 bits.
_MAX_COUNT = 2**31 - 1 - ELEMENTS_PER_BLOCK

_SQRT_HALF_BITS = np.uint32(0x3F3504F3)  # sqrt(1/2) as float32
_SQRT_HALF_WORD = np.uint32(0xB504F334)  # sqrt(1/2) * 2**32
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts; the high one has nine bits, so its multiples are exact
_LN2_LOW = np.float32(-2.12194440e-4)
_TURN = np.float32(2 * np.pi / 2**32)

# Chebyshev fits to the remainders of the Taylor series, lowest order first: log(1 + f) = f - f**2/2 + f**3 P(f) for
# 1 + f in [sqrt(1/2), sqrt(2)]; sin x = x + x**3 P(x**2), cos x = 1 - x**2/2 + x**4 P(x**2) for |x| <= pi/4. Each is
# within half of 2**-24, relative.
_LOG = (
    0.333333286,
    -0.2500029655,
    0.2000146858,
    -0.166422476,
    0.1420217382,
    -0.1297223899,
    0.1271230768,
    -0.08101558334,
)
_SIN = (-0.1666666467, 0.008332748635, -0.0001958794987)
_COS = (0.04166666466, -0.001388830334, 2.454799131e-05)


class _Position(NamedTuple):
    """An element index beyond 32 bits: offset elements after the first of a block; both uint32 scalars."""

    block: jax.Array
    offset: jax.Array

    def after(self, elements: jax.Array) -> "_Position":
        ahead = self.offset + elements.astype(jnp.uint32)
        per_block = np.uint32(ELEMENTS_PER_BLOCK)
        return _Position(self.block + ahead // per_block, ahead % per_block)


def standard_normal(key: jax.Array | np.ndarray, start: int | jax.Array, count: int) -> jax.Array:
    """Return the standard normals of the global element indices [start, start + count).

    Args:
        key: uint32[8], from `chacha.key_words`; one key per step, an argument of the compiled program.
        start: a Python integer, or a traced integer below 2**32; a multiple of 10 is not needed.
        count: how many, static.

    Returns:
        float32[count].

    Guarantees: element i is made from words of (key, start + i) alone. Its relative error against the exact
    Box-Muller value of those words is below 2**-20 at every radius; the largest radius is 9.49. Temporary memory is
    constant (`CHUNK_ELEMENTS`).

    Raises:
        InputError: indices beyond the capacity of a key, 10 * 2**32, or more than 2**31 elements in one call.
    """
    position = _position(start, count)
    return _each_chunk(key, position, count, lambda normals, _: normals, (key[0], position.block))


def add_gaussian_noise(
    flat_sum: jax.Array, key: jax.Array | np.ndarray, stddev: jax.Array | float, start: int | jax.Array = 0
) -> jax.Array:
    """Return `flat_sum + stddev * normals`: the one draw of noise of a logical step.

    Args:
        flat_sum: float32[n], the sum over all leaves in one flat vector, after the reduction.
        key: uint32[8], the noise key of the step.
        stddev: float32 scalar, in the units of `flat_sum` (noise multiplier times clip norm).
        start: the global index of `flat_sum[0]`: 0, or where a device's shard begins (`shard_start`).

    Returns:
        float32[n]; the same noise for the same global index, whatever the mesh.

    Raises:
        InputError: `flat_sum` is not a float32 vector, or beyond the capacity of a key.
    """
    if flat_sum.dtype != jnp.float32 or flat_sum.ndim != 1:
        raise InputError(
            f"noise for {flat_sum.dtype}{list(flat_sum.shape)}: the sum must be one flat float32 vector, because "
            "noise in a narrower type has short tails; cast and ravel the sum before the noise"
        )
    stddev = jnp.asarray(stddev)
    if stddev.ndim != 0 or not jnp.issubdtype(stddev.dtype, jnp.floating) or stddev.dtype.itemsize < 4:
        raise InputError(f"stddev is {stddev.dtype}{list(stddev.shape)}: it must be one float32 number")
    stddev = stddev.astype(jnp.float32)
    count = flat_sum.shape[0]

    def noisy(normals: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_slice(flat_sum, (at,), normals.shape) + stddev * normals

    position = _position(start, count)
    return _each_chunk(key, position, count, noisy, (flat_sum, stddev, key[0], position.block))


def shard_start(axis_name: str | tuple[str, ...], shard_size: int) -> jax.Array:
    """Return where this device's shard begins in a flat vector cut into equal shards along `axis_name`.

    For the body of a `jax.shard_map`: `add_gaussian_noise(shard, key, stddev, shard_start("data", shard.shape[0]))`
    adds the same noise that one device would have added to the whole vector.

    Returns:
        uint32 scalar, varying over `axis_name`.

    Raises:
        InputError: the shards together hold more than 2**32 elements, whose indices uint32 cannot name: they would
            wrap, and elements would share their noise.
    """
    total = lax.axis_size(axis_name) * shard_size
    if total > 2**32:
        raise InputError(f"a flat vector of {total} elements in shards: at most {2**32} can be told apart; freeze some")
    return lax.axis_index(axis_name).astype(jnp.uint32) * np.uint32(shard_size)


def box_muller(high: jax.Array, low: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two independent normals that three uint32 words stand for, as float32 of the same shape.

    radius = sqrt(-2 ln U) with U = (high * 2**32 + low + 1/2) / 2**64, angle = 2 pi * angle / 2**32; the results are
    radius * cosine and radius * sine. Relative error below 2**-20 (noise that is exactly 0 excepted: a sine or cosine
    of a whole quadrant is exactly 0 or 1).

    Source: Box and Muller, "A note on the generation of random normal deviates" (1958).
    """
    radius = _radius(high, low)
    cosine, sine = _cosine_sine(angle)
    return radius * cosine, radius * sine


def _radius(high: jax.Array, low: jax.Array) -> jax.Array:
    # Near U = 1 the complement 1 - U carries the accuracy; it is exact from the inverted words.
    near_one = high >= _SQRT_HALF_WORD
    high, low = (jnp.where(near_one, ~word, word) for word in (high, low))
    u = high.astype(jnp.float32) * np.float32(2.0**-32)
    u = u + (low.astype(jnp.float32) + np.float32(0.5)) * np.float32(2.0**-64)

    # u = 2**exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)), so that mantissa - 1 is exact.
    bits = lax.bitcast_convert_type(u, jnp.uint32)
    exponent = lax.bitcast_convert_type(bits - _SQRT_HALF_BITS, jnp.int32) >> 23
    mantissa = lax.bitcast_convert_type(bits - (exponent << 23).astype(jnp.uint32), jnp.float32)
    exponent = jnp.where(near_one, 0, exponent).astype(jnp.float32)
    f = jnp.where(near_one, -u, mantissa - 1)

    square = f * f
    log = f - (np.float32(0.5) * square - f * square * _polynomial(_LOG, f))
    log = exponent * _LN2_HIGH + (log + exponent * _LN2_LOW)
    return jnp.sqrt(np.float32(-2) * log)


def _cosine_sine(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The nearest quadrant and the signed rest are exact integers; the rest is at most an eighth of a turn.
    quadrant = (angle + np.uint32(2**29)) >> np.uint32(30)
    rest = lax.bitcast_convert_type(angle - (quadrant << np.uint32(30)), jnp.int32)
    x = rest.astype(jnp.float32) * _TURN
    y = x * x
    sine = x + x * (y * _polynomial(_SIN, y))
    cosine = 1 - (np.float32(0.5) * y - y * y * _polynomial(_COS, y))
    odd = (quadrant & 1) != 0
    cosine, sine = jnp.where(odd, sine, cosine), jnp.where(odd, cosine, sine)
    return (
        jnp.where((quadrant == 1) | (quadrant == 2), -cosine, cosine),
        jnp.where(quadrant >= 2, -sine, sine),
    )


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + np.float32(coefficient)
    return result


def _blocks_to_normals(key: jax.Array | np.ndarray, first_block: jax.Array, blocks: int) -> jax.Array:
    """The normals of whole blocks, in the order of their indices: float32[10 * blocks]."""
    words = chacha20_words(key, first_block + lax.iota(jnp.uint32, blocks))
    high, low, angle = (jnp.stack(words[i : 3 * PAIRS_PER_BLOCK : 3]) for i in range(3))
    pairs = jnp.stack(box_muller(high, low, angle), axis=1)
    return pairs.reshape(ELEMENTS_PER_BLOCK, blocks).T.reshape(-1)


def _each_chunk(
    key: jax.Array | np.ndarray,
    start: _Position,
    count: int,
    value: Callable[[jax.Array, jax.Array], jax.Array],
    varies_with: tuple,
) -> jax.Array:
    """Fill float32[count] chunk by chunk with `value(normals of the chunk, index of the chunk's first element)`."""
    size = min(CHUNK_ELEMENTS, count)
    if size == 0:
        return jnp.zeros((0,), jnp.float32)
    blocks = -(-size // ELEMENTS_PER_BLOCK) + 1  # one more, for a start inside a block
    chunks = -(-count // size)

    def fill(chunk: jax.Array, filled: jax.Array) -> jax.Array:
        # The last chunk ends with the vector and may write what the one before it wrote, with the same values.
        at = jnp.minimum(chunk * size, count - size)
        here = start.after(at)
        normals = _blocks_to_normals(key, here.block, blocks)
        normals = lax.dynamic_slice(normals, (here.offset,), (size,))
        return lax.dynamic_update_slice(filled, value(normals, at), (at,))

    # Inside shard_map a loop's carry must vary, from the start, over every mesh axis that its result varies over.
    zeros = sum((jnp.zeros_like(x, jnp.float32) for x in varies_with), jnp.zeros((count,), jnp.float32))
    return lax.fori_loop(0, chunks, fill, zeros)


def _position(start: int | jax.Array, count: int) -> _Position:
    if not 0 <= count <= _MAX_COUNT:
        raise InputError(f"count={count}: one call makes 0 to {_MAX_COUNT} normals; use more shards or calls")
    if isinstance(start, int | np.integer):
        start = int(start)
        if start < 0 or start + count > MAX_ELEMENTS:
            raise InputError(
                f"elements {start} to {start + count} are asked for: one key has elements 0 to {MAX_ELEMENTS}"
            )
        block, offset = divmod(start, ELEMENTS_PER_BLOCK)
        return _Position(jnp.uint32(block), jnp.uint32(offset))
    if not jnp.issubdtype(start.dtype, jnp.integer):
        raise InputError(f"start is {start.dtype}: an element index must be an integer")
    return _Position(jnp.uint32(0), jnp.uint32(0)).after(start)
