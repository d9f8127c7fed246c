"""Laws of Poisson sampling. Statistical tests have fixed keys, and each also rejects what it must."""

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from decimal import Decimal, localcontext
from fractions import Fraction
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dpscale.errors import InputError
from dpscale.sampling import KeyedStream, PoissonSampler, SizeTable

KEY = bytes(range(32))
GOLDEN = Path(__file__).parent / "golden" / "sampling.json"
UNIT = Fraction(1, 1 << 128)


# Draws


GOLDEN_CASES = [
    # num_examples, sampling_rate, max_batch_size, attempt, step
    (1, 0.5, None, 0, 0),
    (10, 0.3, None, 0, 0),
    (10, 0.3, None, 0, 1),
    (10, 0.3, None, 1, 0),
    (10, 0.9, None, 0, 5),
    (4500, 1024 / 4500, None, 0, 149),
    (4500, 1024 / 4500, 1000, 0, 149),
    (60_000, 256 / 60_000, None, 3, 2**64 - 1),
    (10**9, 2.5e-5, None, 0, 7),
    (2**32, 1e-7, None, 0, 7),
    (2**32 + 1, 1e-7, None, 0, 7),
]


def describe_draw(num_examples, sampling_rate, max_batch_size, attempt, step):
    sampler = PoissonSampler(num_examples, sampling_rate, KEY, max_batch_size)
    indices = sampler.indices(step, attempt)
    return {
        "num_examples": num_examples,
        "sampling_rate": sampling_rate.hex(),
        "max_batch_size": max_batch_size,
        "attempt": attempt,
        "step": step,
        "size": len(indices),
        "first": indices[:8].tolist(),
        "sha256": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        "digest": sampler.digest(step, attempt).hex(),
    }


def test_draws_equal_the_golden_draws():
    seen = [describe_draw(*case) for case in GOLDEN_CASES]
    if os.environ.get("DPSCALE_ACCEPT_GOLDEN"):
        GOLDEN.write_text(json.dumps(seen, indent=1) + "\n")
    assert seen == json.loads(GOLDEN.read_text()), (
        "the sampler draws other batches than before, so runs under way cannot be resumed with this code. If "
        "that is meant, change the tag in dpscale/sampling.py, say so in the release notes, and accept the new "
        "draws with: DPSCALE_ACCEPT_GOLDEN=1 python -m pytest tests/test_sampling.py -k golden"
    )


def plain_python_draw(sampler, step, attempt):
    """The specified algorithm once more, from the text of the docstrings, with sets and no numpy."""
    position = 0
    prefix = b"dpscale/poisson-sampling/1" + sampler.key + attempt.to_bytes(8, "little") + step.to_bytes(8, "little")

    def read(count):
        nonlocal position
        blocks = range(position // 1088, (position + count) // 1088 + 1)
        data = b"".join(hashlib.shake_256(prefix + b.to_bytes(8, "little")).digest(1088) for b in blocks)
        start = position - blocks[0] * 1088
        position += count
        return data[start : start + count]

    n, q = sampler.num_examples, Decimal(sampler.sampling_rate)
    word, size = int.from_bytes(read(16), "little"), 0
    with localcontext() as context:
        context.prec = 80
        below = mass = (1 - q) ** n
        while word >= below * 2**128:
            mass *= q * (n - size) / ((1 - q) * (size + 1))
            size += 1
            below += mass
    drawn = n - size if 16 * size > n and 2 * size > n else size
    values, width = set(), 4 if n <= 2**32 else 8
    mask = 2 ** (n - 1).bit_length() - 1
    while len(values) < drawn:
        missing = drawn - len(values)
        data = read(width * (missing * (mask + 1) // n + missing // 32 + 8))
        words = [int.from_bytes(data[i : i + width], "little") & mask for i in range(0, len(data), width)]
        values |= set([w for w in words if w < n][:missing])
    return sorted(values if drawn == size else set(range(n)) - values)


@pytest.mark.parametrize(("n", "q"), [(1, 0.5), (10, 0.3), (33, 0.97), (500, 0.01), (2**33, 2.0**-31)])
def test_draws_equal_a_plain_python_reading_of_the_specification(n, q):
    sampler = PoissonSampler(n, q, KEY)
    for step in range(20):
        assert sampler.indices(step, attempt=step % 3).tolist() == plain_python_draw(sampler, step, step % 3)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3000),
    q=st.floats(0, 1),
    key=st.binary(min_size=32, max_size=32),
    step=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**64 - 1),
    cap=st.none() | st.integers(0, 3000),
)
def test_draws_are_sorted_distinct_in_range_and_within_the_cap(n, q, key, step, attempt, cap):
    indices = PoissonSampler(n, q, key, cap).indices(step, attempt)
    assert indices.dtype == np.int64
    assert indices.ndim == 1
    assert np.all(np.diff(indices) > 0)
    assert np.all((indices >= 0) & (indices < n))
    assert cap is None or len(indices) <= cap


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_rates_zero_and_one_draw_nothing_and_everything(n):
    for step in range(5):
        assert len(PoissonSampler(n, 0, KEY).indices(step)) == 0
        assert PoissonSampler(n, 1.0, KEY).indices(step).tolist() == list(range(n))
        assert len(PoissonSampler(n, 1.0, KEY, max_batch_size=0).indices(step)) == 0


def test_empty_draws_are_draws_like_any_other():
    sampler = PoissonSampler(10**9, 1e-9, KEY)
    sizes = [len(sampler.indices(step)) for step in range(200)]
    assert 40 < sizes.count(0) < 110  # e^-1 of 200 is 74 with standard deviation 6.8: five of them each way


def test_a_draw_does_not_depend_on_process_history_or_copy():
    sampler = PoissonSampler(10_000, 0.01, KEY)
    forward = [sampler.indices(t) for t in range(5)]
    backward = [PoissonSampler(10_000, 0.01, KEY).indices(t) for t in reversed(range(5))][::-1]
    copied = [pickle.loads(pickle.dumps(sampler)).indices(t) for t in range(5)]
    for a, b, c in zip(forward, backward, copied, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


def test_another_process_without_jax_draws_the_same():
    code = (
        "import sys; from dpscale.sampling import PoissonSampler as P; "
        "print(P(10**9, 2.5e-5, bytes(range(32))).digest(3, 1).hex(), 'jax' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == [PoissonSampler(10**9, 2.5e-5, KEY).digest(3, 1).hex(), "False"]


def test_digest_is_keyed_and_names_one_draw():
    sampler = PoissonSampler(100, 0.0, KEY)  # every draw is empty, so only the header and the key differ
    digests = {sampler.digest(s, a) for s in range(4) for a in range(4)}
    digests |= {PoissonSampler(100, 0.0, bytes(32)).digest(0), PoissonSampler(101, 0.0, KEY).digest(0)}
    assert len(digests) == 18
    assert all(len(d) == 16 for d in digests)
    assert sampler.digest(2, 1) == PoissonSampler(100, 0.0, KEY).digest(2, 1)


# The size table


def exact_cumulative(n, q):
    """F(0), ..., F(n) of Binomial(n, q), exactly: integers over a common denominator, and that."""
    a, b = q.numerator, q.denominator
    masses = (comb(n, k) * a**k * (b - a) ** (n - k) for k in range(n + 1))
    return list(itertools.accumulate(masses)), b**n


def table_cumulative(table, n):
    """2^128 P(size <= k) for k = 0, ..., n as the table has it."""
    entries = [max(k - table.first + 1, 0) for k in range(n + 1)]
    return [table.thresholds[e] if e < len(table.thresholds) else 2**128 for e in entries]


EXACT_CASES = [
    *itertools.product([1, 2, 7, 64], [0.0, 1e-9, 0.1, 0.5, 1 - 2**-53, 1.0]),
    (50, 5e-324),
    (200, Fraction(1, 3)),
    (400, 0.25),
    (700, 0.75),
    (300, 1e-9),
    (300, 0.99),
    (3000, Fraction(1, 64)),
]


@pytest.mark.parametrize(("n", "q"), EXACT_CASES)
def test_size_table_equals_exact_rational_arithmetic_from_the_safe_side(n, q):
    exact, denominator = exact_cumulative(n, Fraction(q))
    table = table_cumulative(SizeTable(n, Fraction(q)), n)
    excess = [t * denominator - (e << 128) for t, e in zip(table, exact, strict=True)]
    assert min(excess) >= 0
    assert max(excess) < 8 * denominator  # the bound that SizeTable's comment proves: 8 units of 2^-128
    inclusion = Fraction(sum(2**128 - t for t in table), n << 128)  # E[size] / n
    assert Fraction(q) - 8 * UNIT <= inclusion <= Fraction(q)


@pytest.mark.parametrize(("n", "q"), [(400, 0.25), (700, 0.7), (2000, Fraction(1, 7))])
def test_rounding_errors_never_raise_the_inclusion_probability(n, q, monkeypatch):
    # With 6 guard bits in place of 64 the errors of the recurrence are many units, and must all be on the safe side.
    monkeypatch.setattr("dpscale.sampling._GUARD_BITS", 6)
    exact, denominator = exact_cumulative(n, Fraction(q))
    table = table_cumulative(SizeTable(n, Fraction(q)), n)
    excess = [t * denominator - (e << 128) for t, e in zip(table, exact, strict=True)]
    assert min(excess) >= 0
    assert max(excess) > 8 * denominator  # else this test would show nothing


@pytest.mark.parametrize(("n", "q"), [(10**9, 1e-9), (10**9, 2.5e-5), (4500, 1024 / 4500), (60_000, 0.5)])
def test_large_size_tables_equal_120_digit_arithmetic(n, q):
    table, start = SizeTable(n, Fraction(q)), 0
    with localcontext() as context:
        context.prec = 120
        rate = Decimal(q)  # exact
        mass = (1 - rate) ** n if n * q < 28_000 else None
        if mass is None:  # too far from 0 to go through every size: begin with a central coefficient, exactly
            start = table.first
            mass = Decimal(comb(n, start)) * rate**start * (1 - rate) ** (n - start)
        below, worst_low, worst_high = Decimal(0), Decimal(0), Decimal(0)
        unit = Decimal(2) ** -128
        for k in range(start, table.last):
            below += mass
            mass *= rate * (n - k) / ((1 - rate) * (k + 1))
            if k >= table.first:
                excess = table.thresholds[k - table.first + 1] * unit - below
                worst_low, worst_high = min(worst_low, excess), max(worst_high, excess)
        never_drawn = 1 - below - mass
    assert worst_low > -(Decimal(10) ** -100)
    assert worst_high < 9 * unit  # 8, and one for the tail left out below `start`
    assert never_drawn < 9 * unit


def test_size_table_lookup_inverts_the_thresholds():
    table = SizeTable(60_000, Fraction(0.01))
    assert table.first > 0
    assert table.size(0) == 0  # the whole lower tail
    for k, threshold in enumerate(table.thresholds, start=table.first - 1):
        assert table.size(threshold - 1) <= k < table.size(threshold) <= table.last
    assert table.size(2**128 - 1) == table.last


@pytest.mark.parametrize("cap", [None, 0, 40, 60])
def test_size_distribution_is_a_probability_with_the_binomials_moments(cap):
    sampler = PoissonSampler(500, 0.1, KEY, max_batch_size=cap)
    sizes, masses = sampler.size_distribution()
    totals, denominator = exact_cumulative(500, Fraction(0.1))
    pmf = np.diff([0.0, *(t / denominator for t in totals)])
    capped = np.minimum(np.arange(501), 501 if cap is None else cap)
    assert masses.sum() == pytest.approx(1, abs=1e-12)
    assert masses @ sizes == pytest.approx(pmf @ capped, abs=1e-9)
    assert masses @ sizes**2 == pytest.approx(pmf @ capped**2, abs=1e-9)
    assert sampler.expected_batch_size == 50
    assert sampler.batch_size_std == pytest.approx(sqrt(45))


# Frequencies. Every chi-square test accepts below the 1 - 1e-4 quantile; keys are fixed, so it cannot flicker.


def subset_counts(draws, n):
    return np.bincount([sum(1 << int(i) for i in draw) for draw in draws], minlength=1 << n)


def poisson_law(n, q):
    sizes = np.array([s.bit_count() for s in range(1 << n)])
    return q**sizes * (1 - q) ** (n - sizes)


def chi_square(counts, law):
    expected = counts.sum() * law
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.statistical
@pytest.mark.parametrize(("n", "q"), [(4, 0.3), (3, 0.75)])
def test_every_subset_has_its_poisson_frequency(n, q):
    steps = 20_000
    sampler = PoissonSampler(n, q, KEY)
    counts = subset_counts([sampler.indices(t) for t in range(steps)], n)
    limit = chi2.ppf(1 - 1e-4, 2**n - 1)
    assert chi_square(counts, poisson_law(n, q)) < limit
    # A rate off by d adds about steps n d^2 / (q (1 - q)) to the statistic's mean; three limits' worth is out of
    # the reach of chance. For n = 4, q = 0.3 that is d = 0.018.
    off = sqrt(3 * limit * q * (1 - q) / (steps * n))
    assert chi_square(counts, poisson_law(n, q + off)) > limit
    assert chi_square(counts, poisson_law(n, q - off)) > limit


@pytest.mark.statistical
def test_truncation_keeps_a_fresh_uniform_subset():
    n, q, cap, steps = 5, 0.6, 2, 20_000
    sizes = np.array([s.bit_count() for s in range(1 << n)])
    over = sum(comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(cap, n + 1))
    law = np.where(sizes < cap, poisson_law(n, q), np.where(sizes == cap, over / comb(n, cap), 0))
    possible = law > 0
    limit = chi2.ppf(1 - 1e-4, possible.sum() - 1)
    sampler = PoissonSampler(n, q, KEY, max_batch_size=cap)
    counts = subset_counts([sampler.indices(t) for t in range(steps)], n)
    assert counts[~possible].sum() == 0
    assert chi_square(counts[possible], law[possible]) < limit
    whole = PoissonSampler(n, q, KEY)
    first_of_sorted = subset_counts([whole.indices(t)[:cap] for t in range(steps)], n)
    assert chi_square(first_of_sorted[possible], law[possible]) > 10 * limit


@pytest.mark.statistical
@pytest.mark.parametrize("size", [3, 40, 70, 120])  # sorted and bitmap, direct and complement
def test_truncated_draws_include_every_index_equally_often(size):
    n, steps = 128, 4000
    sampler = PoissonSampler(n, 1.0, KEY, max_batch_size=size)
    counts = np.bincount(np.concatenate([sampler.indices(t) for t in range(steps)]), minlength=n)
    # Counts have variance steps p (1 - p), and covariance from the fixed size: a scaled chi-square, n - 1 d.f.
    p = size / n
    statistic = ((counts - steps * p) ** 2).sum() / (steps * p * (1 - p)) * (n - 1) / n
    assert chi2.ppf(1e-4, n - 1) < statistic < chi2.ppf(1 - 1e-4, n - 1)


def inclusion_matrix(draws, n):
    matrix = np.zeros((len(draws), n))
    for row, draw in zip(matrix, draws, strict=True):
        row[draw] = 1
    return matrix


@pytest.mark.statistical
def test_inclusion_is_uncorrelated_within_and_across_shard_boundaries():
    n, shards, q, steps = 64, 8, 0.25, 10_000
    sampler = PoissonSampler(n, q, KEY)
    draws = [sampler.indices(t) for t in range(steps)]

    def shard_correlations(matrix):
        per_shard = matrix.reshape(steps, shards, -1).sum(2)
        return steps * (np.corrcoef(per_shard, rowvar=False)[np.triu_indices(shards, 1)] ** 2).sum()

    def pair_correlations(matrix):
        return steps * (np.corrcoef(matrix, rowvar=False)[np.triu_indices(n, 1)] ** 2).sum()

    # steps * r^2 of each independent pair is a chi-square with one degree of freedom.
    whole = inclusion_matrix(draws, n)
    shard_limit, pair_limit = chi2.ppf(1 - 1e-4, shards * (shards - 1) / 2), chi2.ppf(1 - 1e-4, n * (n - 1) / 2)
    assert shard_correlations(whole) < shard_limit
    assert pair_correlations(whole) < pair_limit
    # One generator on every rank for that rank's shard, and a batch of constant size, must both be seen.
    one_shard = PoissonSampler(n // shards, q, KEY)
    split = np.tile(inclusion_matrix([one_shard.indices(t) for t in range(steps)], n // shards), (1, shards))
    assert shard_correlations(split) > 100 * shard_limit
    fixed_size = PoissonSampler(n, 1.0, KEY, max_batch_size=16)
    fixed = inclusion_matrix([fixed_size.indices(t) for t in range(steps)], n)
    assert shard_correlations(fixed) > 2 * shard_limit


@pytest.mark.statistical
def test_steps_and_attempts_are_independent():
    n, q, steps = 64, 0.5, 3000
    sampler = PoissonSampler(n, q, KEY)
    first = inclusion_matrix([sampler.indices(t, 0) for t in range(steps + 1)], n) - q
    second = inclusion_matrix([sampler.indices(t, 1) for t in range(steps + 1)], n) - q
    scale = q * (1 - q) * sqrt(n * steps)  # standard deviation of the sums below
    for a, b in [(first[1:], first[:-1]), (first[1:], second[1:]), (first[1:], second[:-1])]:
        assert abs((a * b).sum()) < 4 * scale
    assert (first[1:] * first[1:]).sum() > 100 * scale


def test_attempt_step_and_key_are_separate_domains():
    def draw(key, attempt, step):
        return PoissonSampler(10**6, 1e-4, key).indices(step, attempt).tobytes()

    numbers = [0, 1, 2, 255, 256, 2**32, 2**63, 2**64 - 1]
    seen = {draw(KEY, a, s) for a in numbers for s in numbers} | {draw(bytes(32), 0, 0)}
    assert len(seen) == len(numbers) ** 2 + 1


@pytest.mark.statistical
def test_realised_rate_at_one_in_a_million_is_not_rounded():
    n, q, steps = 10**9, 1e-6, 1000
    sampler = PoissonSampler(n, q, KEY)
    draws = [sampler.indices(t) for t in range(steps)]
    sizes = np.array([len(d) for d in draws])
    std = sqrt(steps * n * q)
    assert abs(sizes.sum() - steps * n * q) < 4 * std
    # A float32 uniform below q has rate 9 / 2^23 = 1.073e-6: 73 standard deviations away.
    assert abs(sizes.sum() - steps * n * 9 / 2**23) > 60 * std
    assert abs(sizes.var(ddof=1) / (n * q) - 1) < 4 * sqrt(2 / steps)
    counts = np.bincount(np.concatenate(draws) * 100 // n, minlength=100)
    assert chi_square(counts, np.full(100, 0.01)) < chi2.ppf(1 - 1e-4, 99)


# Cost, counted and not timed


@pytest.mark.parametrize("n", [10**5, 10**7, 2**30, 2**30 + 1, 10**9, 2**40 + 1])
def test_a_draw_reads_and_allocates_in_proportion_to_its_size(n):
    expected = 5000
    sampler = PoissonSampler(n, expected / n, KEY)
    stream = KeyedStream(KEY, 0, 0)
    size = len(sampler._draw(stream))
    words = (stream.bytes_read - 16) / (4 if n <= 2**32 else 8)
    # At worst every second word is rejected, one in 16 repeats, 1/32 is spare, and a dozen rounds spare 8 more.
    assert size <= words <= 2 * size * 17 / 16 * 33 / 32 * 1.03 + 100
    tracemalloc.start()
    sampler.indices(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * size + 50_000


def test_nearly_full_batches_draw_what_they_lack():
    stream = KeyedStream(KEY, 0, 0)
    size = len(PoissonSampler(10**6, 0.99, KEY)._draw(stream))
    assert stream.bytes_read < 4 * 1.2 * (10**6 - size)


def test_size_tables_stay_small():
    for n, q in [(10**9, 2.5e-5), (10**9, 1e-9), (10**12, 1e-8), (60_000, 0.5)]:
        assert len(SizeTable(n, Fraction(q)).thresholds) < 28 * sqrt(n * q * (1 - q)) + 40


# Input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_examples": -3}, "num_examples=-3"),
        ({"num_examples": 2.5}, "num_examples=2.5"),
        ({"sampling_rate": -0.1}, "sampling_rate=-0.1"),
        ({"sampling_rate": 1.0000001}, "sampling_rate=1.0000001"),
        ({"sampling_rate": float("nan")}, "sampling_rate=nan"),
        ({"sampling_rate": float("inf")}, "sampling_rate=inf"),
        ({"sampling_rate": "0.1"}, "sampling_rate='0.1'"),
        ({"sampling_rate": Fraction(5, 4)}, "sampling_rate=Fraction"),
        ({"max_batch_size": -1}, "max_batch_size=-1"),
        ({"key": b"short"}, "5 bytes"),
        ({"key": "k" * 32}, "str"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(arguments, words):
    with pytest.raises(InputError, match=words):
        PoissonSampler(**({"num_examples": 10, "sampling_rate": 0.5, "key": KEY} | arguments))


@pytest.mark.parametrize("bad", [-1, 2**64, 1.0, None])
def test_steps_and_attempts_out_of_range_are_refused(bad):
    sampler = PoissonSampler(10, 0.5, KEY)
    with pytest.raises(InputError, match=f"step={bad}"):
        sampler.indices(bad)
    with pytest.raises(InputError, match=f"attempt={bad}"):
        sampler.indices(0, attempt=bad)
    with pytest.raises(InputError, match=f"step={bad}"):
        sampler.digest(bad)


def test_no_text_about_the_sampler_shows_its_key():
    key = hashlib.sha256(b"secret").digest()
    sampler = PoissonSampler(10, 0.5, key)
    with pytest.raises(InputError) as refused:
        PoissonSampler(10, 0.5, key + b"x")
    for text in (repr(sampler), str(sampler), str(refused.value)):
        assert key.hex() not in text
        assert repr(key)[2:-1] not in text
        assert str(int.from_bytes(key, "little")) not in text


def test_the_rate_to_account_with_is_never_below_the_sampled_rate():
    assert PoissonSampler(10, 0.1, KEY).accounting_rate == 0.1
    for q in (Fraction(1, 3), Fraction(2, 3), Fraction(1, 10), Fraction(7, 60_000), Fraction(0), Fraction(1)):
        rate = PoissonSampler(10, q, KEY).accounting_rate
        assert Fraction(rate) >= q
        assert rate == 0 or Fraction(np.nextafter(rate, 0)) < q
