"""Poisson sampling of logical batches, in integers only: any two machines draw the same batch."""

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from math import inf, nextafter, sqrt

import numpy as np

from dpscale.errors import InputError

_TAG = b"dpscale/poisson-sampling/1"
_BLOCK_BYTES = 8 * 136  # eight permutations of SHAKE-256, whose rate is 136 bytes
_SIZE_BITS = 128  # resolution of the batch size's distribution
_GUARD_BITS = 64  # for the rounding errors of up to 2^32 table entries
_DENSE = 16  # above num_examples / _DENSE a bitmap is cheaper than sorting


class KeyedStream:
    """Uniform bytes from SHAKE-256: a pure function of (key, attempt, step), read once from front to back.

    The stream is the concatenation over block = 0, 1, ... of the first 1088 bytes of
    SHAKE-256(tag || key || attempt || step || block), numbers as 8 bytes little-endian. Every part has a
    fixed length, so no two (key, attempt, step, block) share an input. `bytes_read` counts what was used.
    """

    def __init__(self, key: bytes, attempt: int, step: int) -> None:
        self.bytes_read = 0
        self._prefix = _TAG + key + attempt.to_bytes(8, "little") + step.to_bytes(8, "little")
        self._block = 0
        self._rest = b""

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes."""
        parts, have = [self._rest], len(self._rest)
        while have < num_bytes:
            block = hashlib.shake_256(self._prefix + self._block.to_bytes(8, "little"))
            parts.append(block.digest(_BLOCK_BYTES))
            self._block += 1
            have += _BLOCK_BYTES
        data = b"".join(parts)
        self._rest = data[num_bytes:]
        self.bytes_read += num_bytes
        return data[:num_bytes]

    def below(self, bound: int, target: int) -> np.ndarray:
        """Up to `target`, rarely fewer, independent uniform int64 in [0, bound), by masked rejection."""
        mask = (1 << (bound - 1).bit_length()) - 1
        count = target * (mask + 1) // bound + target // 32 + 8
        word = np.dtype("<u4") if bound <= 1 << 32 else np.dtype("<u8")
        words = np.frombuffer(self.read(count * word.itemsize), word) & word.type(mask)
        return words[words < bound][:target].astype(np.int64)


class SizeTable:
    """Binomial(n, q) as integer thresholds: size <= k exactly when a uniform 128-bit word is < threshold(k).

    Guarantees: with F the distribution function of Binomial(n, q), q the exact rational,
    (1) P(size <= k) >= F(k) for every k, so the size is stochastically dominated by the binomial and the
    inclusion probability E[size] / n is never above q; (2) P(size <= k) - F(k) < 2^-125, so the total
    variation distance to the binomial is below 2^-125 times the number of entries, and q minus the inclusion
    probability is below 2^-125. Time and memory: about 27 standard deviations of entries, O(sqrt(n q (1 - q))).
    """

    # Proof. Let m = floor((n+1) q), a mode, and w(k) = 2^192 pmf(k) / pmf(m). From one k to the next one
    # away from m, w is multiplied by a rational r(k) <= 1, smaller the further from m; `_weights` rounds
    # each product down. If v <= w <= v + e then floor(r v) <= r w <= floor(r v) + 1 + e, so by induction
    # v(k) <= w(k) <= v(k) + |k - m|. Entries run from `first` to `last`, the sizes with v >= 2^64. Below
    # `first` the mass is at most `_lower_tail`, a geometric series. Let A(k) be the sum of w up to k, A'(k)
    # the tail bound plus the upper bounds of the entries up to k, W the sum of all w, W' the sum of all v:
    # A <= A' and W' <= W, hence threshold(k) = ceil(2^128 A'(k) / W') >= 2^128 F(k). Sizes below `first`
    # share the threshold of first - 1 and come out as 0; sizes above `last` never come out. Both lower it:
    # (1).
    # (2) Take one side of m with a cut, and r the ratio there. All earlier ratios are at least r and
    # multiply to about 2^-128, so W >= 2^192 (1 + r + r^2 + ...) up to a factor 1 - 2^-127, while the tail
    # is at most (2^64 + entries) (1 + r + r^2 + ...): a tail is one unit of 2^-128 W, up to a factor 1 +
    # 2^-40, and the entries^2 of rounding errors are nothing beside it (entries < 2^24). A' exceeds A by at
    # most one unit (the tail bound), W - W' is at most two, ceil adds one: in all less than 5, 6 where size
    # 0 stands for the tail, and 8 units are 2^-125. A point's mass is a difference of two F, and E[size]
    # sums P(size > k) over n values of k.

    def __init__(self, num_examples: int, sampling_rate: Fraction) -> None:
        n, a, b = num_examples, sampling_rate.numerator, sampling_rate.denominator
        mode = min((n + 1) * a // b, n)
        below = list(_weights(((mode - i) * (b - a), (n - mode + i + 1) * a) for i in range(mode)))
        above = list(_weights(((n - mode - i) * a, (mode + i + 1) * (b - a)) for i in range(n - mode)))
        self.first = mode - len(below)
        errors = list(range(len(below), 0, -1)) + list(range(len(above) + 1))
        weights = [*reversed(below), 1 << (_SIZE_BITS + _GUARD_BITS), *above]
        total = sum(weights)
        upper = _lower_tail(self.first, len(below), n, a, b)
        self.thresholds = [_ceil_div(upper << _SIZE_BITS, total)]
        for weight, error in zip(weights[:-1], errors[:-1], strict=True):
            upper += weight + error
            threshold = _ceil_div(upper << _SIZE_BITS, total)
            if threshold >> _SIZE_BITS:  # rounded up to certainty: larger sizes cannot come out
                break
            self.thresholds.append(threshold)

    @property
    def last(self) -> int:
        """The largest size that can come out."""
        return self.first + len(self.thresholds) - 1

    def size(self, word: int) -> int:
        """The size for a word in [0, 2^128)."""
        entry = bisect_right(self.thresholds, word)
        return self.first + entry - 1 if entry else 0

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """(sizes int64[m], probabilities float64[m]): size 0, then first, ..., last; 0 may come twice."""
        full = 1 << _SIZE_BITS
        edges = [0, *self.thresholds, full]
        masses = np.array([(hi - lo) / full for lo, hi in pairwise(edges)])
        return np.r_[0, np.arange(self.first, self.last + 1)], masses


def _weights(ratios: Iterator[tuple[int, int]]) -> Iterator[int]:
    """The weights beside the mode, rounded down, until they matter no more."""
    weight = 1 << (_SIZE_BITS + _GUARD_BITS)
    for numerator, denominator in ratios:
        weight = weight * numerator // denominator
        if weight < 1 << _GUARD_BITS:
            return
        yield weight


def _lower_tail(first: int, error: int, n: int, a: int, b: int) -> int:
    """Upper bound of the weights of all sizes below `first`."""
    if first == 0:
        return 0
    numerator, denominator = first * (b - a), (n - first + 1) * a
    heaviest = (1 << _GUARD_BITS) + error + 1
    return _ceil_div(heaviest * denominator, denominator - numerator)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class PoissonSampler:
    """Logical batches in which each of `num_examples` examples is included with probability `sampling_rate`.

    num_examples: N >= 1. sampling_rate: q in [0, 1]; a float stands for its exact binary value.
    key: 32 secret bytes, never shown. max_batch_size: cap of the batch size (truncated Poisson sampling; it
    must be accounted as such), or None.

    Guarantees: a batch is a pure function of (key, attempt, step), made of integer operations and SHAKE-256
    only, so equal on all processes, machines and library versions. Without a cap, inclusions are independent
    with probability q up to a total variation distance of 2^-125 per entry of `SizeTable` (below 1e-31 a
    step), and the inclusion probability is never above q. With a cap, a batch over it is replaced by a
    uniform subset of max_batch_size examples. Distinct (attempt, step) give independent batches. Time and
    memory of a draw are O(q N).

    | case | batch |
    | q = 0 | always empty |
    | q = 1 | always all examples, or a uniform subset of max_batch_size |
    | max_batch_size = 0 | always empty |

    Raises: InputError on arguments outside these ranges.
    """

    num_examples: int
    sampling_rate: float | Fraction
    key: bytes = field(repr=False)
    max_batch_size: int | None = None
    _table: SizeTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_integer("num_examples", self.num_examples, 1, 1 << 63)
        if self.max_batch_size is not None:
            _check_integer("max_batch_size", self.max_batch_size, 0, 1 << 63)
        if not isinstance(self.key, bytes) or len(self.key) != 32:
            seen = f"{len(self.key)} bytes" if isinstance(self.key, bytes) else type(self.key).__name__
            raise InputError(
                f"the sampling key is {seen}: it must be exactly 32 bytes; derive it from the run's secret"
            )
        object.__setattr__(self, "_table", SizeTable(self.num_examples, _exact_rate(self.sampling_rate)))

    @property
    def expected_batch_size(self) -> float:
        """q N, the mean batch size before any truncation: the public divisor of the noisy sum."""
        return float(Fraction(self.sampling_rate) * self.num_examples)

    @property
    def batch_size_std(self) -> float:
        """sqrt(N q (1 - q)), the standard deviation of the batch size before any truncation."""
        rate = Fraction(self.sampling_rate)
        return sqrt(rate * (1 - rate) * self.num_examples)

    @property
    def accounting_rate(self) -> float:
        """The smallest float64 that is not below q: what to account with when q is a Fraction."""
        nearest = float(self.sampling_rate)
        return nextafter(nearest, inf) if nearest < Fraction(self.sampling_rate) else nearest

    def indices(self, step: int, attempt: int = 0) -> np.ndarray:
        """The logical batch of a step: int64[batch size], ascending, distinct, in [0, num_examples).

        step, attempt: integers in [0, 2^64). An empty draw gives int64[0]. Raises InputError otherwise.
        """
        return self._draw(self._stream(step, attempt))

    def digest(self, step: int, attempt: int = 0) -> bytes:
        """16 bytes that identify the draw, for processes to compare.

        Keyed with the sampling key: an unkeyed hash of a batch would let others test who was in it.
        """
        indices = self.indices(step, attempt)
        header = b"".join(int(x).to_bytes(8, "little") for x in (self.num_examples, attempt, step))
        hashed = hashlib.blake2b(header, digest_size=16, key=self.key, person=b"dpscale draw")
        hashed.update(indices.astype("<i8").tobytes())
        return hashed.digest()

    def size_distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """(sizes int64[m], probabilities float64[m]) of a batch, truncation included; sizes can repeat."""
        sizes, masses = self._table.probabilities()
        return (sizes if self.max_batch_size is None else np.minimum(sizes, self.max_batch_size)), masses

    def _stream(self, step: int, attempt: int) -> KeyedStream:
        step, attempt = (
            _check_integer("step", step, 0, 1 << 64),
            _check_integer("attempt", attempt, 0, 1 << 64),
        )
        return KeyedStream(self.key, attempt, step)

    def _draw(self, stream: KeyedStream) -> np.ndarray:
        size = self._table.size(int.from_bytes(stream.read(_SIZE_BITS // 8), "little"))
        if self.max_batch_size is not None:
            size = min(size, self.max_batch_size)
        return uniform_subset(stream, self.num_examples, size)


def uniform_subset(stream: KeyedStream, num_examples: int, size: int) -> np.ndarray:
    """A uniformly random set of `size` of range(num_examples): int64[size], ascending.

    Words are taken until `size` distinct values were seen, which makes every set equally likely. A round
    asks for no more values than are missing, so it cannot overshoot.
    """
    if size * _DENSE <= num_examples:
        chosen = np.empty(0, np.int64)
        while len(chosen) < size:
            more = np.sort(np.r_[chosen, stream.below(num_examples, size - len(chosen))])
            chosen = more[np.diff(more, prepend=-1) > 0]  # much faster than np.unique
        return chosen
    # Of a batch larger than half of the data, draw what it lacks: rejection then always ends soon.
    complement = 2 * size > num_examples
    wanted, marked = (num_examples - size if complement else size), 0
    marks = np.zeros(num_examples, bool)
    while marked < wanted:
        marks[stream.below(num_examples, wanted - marked)] = True
        marked = int(np.count_nonzero(marks))
    return np.flatnonzero(~marks if complement else marks).astype(np.int64, copy=False)


def _check_integer(name: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value!r} is not an integer: give a whole number of at least {low}") from None
    if not low <= number < high:
        raise InputError(f"{name}={number} is out of range: give at least {low} and less than {high}")
    return number


def _exact_rate(rate: float | Fraction) -> Fraction:
    # The comparison is false for NaN.
    if not isinstance(rate, int | float | Fraction) or not 0 <= rate <= 1:
        raise InputError(
            f"sampling_rate={rate!r} is not a probability: give a number from 0 to 1, "
            "usually expected_batch_size / num_examples"
        )
    return Fraction(rate)
