"""Laws of the noise: its words, its accuracy, its independence of the mesh, and its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy import stats
from test_chacha import reference_block

from dpscale import noise
from dpscale.chacha import key_words
from dpscale.errors import InputError
from dpscale.noise import add_gaussian_noise, box_muller, shard_start, standard_normal

KEY = bytes(range(100, 132))
NEXT_KEY = bytes(range(101, 133))
# Of one Box-Muller value. In units of 2**-24: U carries 2 (one conversion, one sum), so ln U carries at most
# 2 / ln sqrt(2) = 5.8 where it is smallest, its polynomial and sums 3 more; the root halves the 8.8 and rounds:
# 5. The angle carries 2.5 (conversion, product, constant), its polynomial and sums 2. The product rounds: 10.5 < 16.
RELATIVE_ERROR = 2.0**-20

draw = jax.jit(standard_normal, static_argnums=2)
add = jax.jit(add_gaussian_noise)


def normals(count: int, key: bytes = KEY) -> np.ndarray:
    return np.asarray(draw(key_words(key), 0, count), np.float64)


def reference_words(key: bytes, index: int) -> tuple[int, int, int, bool]:
    """High, low and angle word of the element at a global index, and whether it is the sine."""
    block, inside = divmod(index, 10)
    words = reference_block(key, block)
    pair = inside // 2
    return words[3 * pair], words[3 * pair + 1], words[3 * pair + 2], inside % 2 == 1


def exact_pair(high, low, angle) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller in float64: the complement of U and the rest of the angle are taken from integers, as they must."""
    high, low, angle = (np.asarray(x, np.uint32) for x in (high, low, angle))
    upper = high >= 2**31
    h, l = (np.where(upper, ~x, x).astype(np.float64) for x in (high, low))
    tail = h * 2.0**-32 + (l + 0.5) * 2.0**-64
    radius = np.sqrt(-2 * np.where(upper, np.log1p(-tail), np.log(tail)))
    quadrant = (angle.astype(np.int64) + 2**29) >> 30
    rest = (angle.astype(np.int64) - (quadrant << 30)) * (2 * np.pi / 2**32)
    c, s = np.cos(rest), np.sin(rest)
    quadrant %= 4
    return radius * np.choose(quadrant, [c, -s, -c, s]), radius * np.choose(quadrant, [s, c, -s, -c])


def planted_words() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triples over every scale of U, of 1 - U and of the angle from each octant, and all pairs of extremes."""
    rng = np.random.default_rng(1)
    n = 2**18
    high, low, angle = (rng.integers(0, 2**32, n, dtype=np.uint32) for _ in range(3))
    shift = rng.integers(0, 32, n).astype(np.uint32)
    high[: n // 3] >>= shift[: n // 3]
    high[n // 3 : n // 2] = ~(high[n // 3 : n // 2] >> shift[n // 3 : n // 2])
    octant = rng.integers(0, 8, n // 2).astype(np.uint32) << np.uint32(29)
    angle[::2] = (angle[::2] >> shift[::-2]) * rng.choice(np.array([1, -1], np.int64), n // 2).astype(np.uint32)
    angle[::2] += octant
    edges = [0, 1, 2, 2**24, 2**31 - 1, 2**31, 0xB504F333, 0xB504F334, 0xB504F335, 2**32 - 2, 2**32 - 1]
    octants = [(k << 29) + d & 2**32 - 1 for k in range(8) for d in (-1, 0, 1)]
    mesh = np.meshgrid(edges, edges, edges + octants)
    return tuple(np.append(x, e.astype(np.uint32)) for x, e in zip((high, low, angle), mesh, strict=True))


def test_box_muller_is_accurate_at_every_radius_and_angle():
    words = planted_words()
    for value, exact in zip(jax.jit(box_muller)(*words), exact_pair(*words), strict=True):
        value = np.asarray(value, np.float64)
        np.testing.assert_array_equal(value[exact == 0], 0)
        away = exact != 0
        assert np.max(np.abs(value[away] / exact[away] - 1)) < RELATIVE_ERROR


def test_the_tails_reach_past_nine_sigma_and_the_smallest_radius_is_not_zero():
    top, quarter = np.uint32(2**32 - 1), np.uint32(2**30)
    words = [np.array(x, np.uint32) for x in ([0, 0, top], [0, 0, top], [0, quarter, 0])]
    cosine, sine = box_muller(*words)
    np.testing.assert_allclose(cosine[0], np.sqrt(2 * 65 * np.log(2)), rtol=RELATIVE_ERROR)
    np.testing.assert_allclose(sine[1], np.sqrt(2 * 65 * np.log(2)), rtol=RELATIVE_ERROR)
    assert cosine[0] > 9
    np.testing.assert_allclose(cosine[2], np.sqrt(2 * 2.0**-65), rtol=RELATIVE_ERROR)


def test_whole_quadrants_are_exact():
    angle = np.arange(4, dtype=np.uint32) << np.uint32(30)
    cosine, sine = box_muller(np.zeros(4, np.uint32), np.zeros(4, np.uint32), angle)
    radius = cosine[0]
    assert cosine.tolist() == [radius, 0, -radius, 0]
    assert sine.tolist() == [0, radius, 0, -radius]


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_words_equal_pure_python_chacha20_on_any_mesh(monkeypatch, devices, placement):
    assert jax.device_count() >= 8
    count = 8 * 4_003  # a shard's start is not a multiple of 10
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    spec = PartitionSpec("data") if placement == "sharded" else PartitionSpec()

    def shown(flat, key):
        start = shard_start("data", flat.shape[0]) if placement == "sharded" else 0
        return add_gaussian_noise(flat, key, 1.0, start)

    def digest(high, low, angle):
        # Words instead of normals: 24 bits of two sums in which every bit of every word counts.
        return high * 3 + low * 5 + angle * 7, high * 11 + low * 13 + angle * 17

    def shown_words(*words):
        return tuple((x >> 8).astype(jnp.float32) for x in digest(*words))

    monkeypatch.setattr(noise, "box_muller", shown_words)
    program = jax.shard_map(shown, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    got = np.asarray(jax.jit(program)(jnp.zeros(count, jnp.float32), key_words(KEY)))
    for index in [0, 1, 9, 10, 4_002, 4_003, 16_011, 16_012, count - 1, *range(37, count, 777)]:
        *words, sine = reference_words(KEY, index)
        assert got[index] == digest(*words)[sine] % 2**32 >> 8, index


@pytest.mark.parametrize("devices", [2, 8])
def test_shards_get_the_noise_of_the_whole_vector(devices):
    count = 8 * 1_001
    flat = jnp.arange(count, dtype=jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    cut = PartitionSpec("data")

    def shard(x, key):
        return add_gaussian_noise(x, key, 3.0, shard_start("data", x.shape[0]))

    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(cut, PartitionSpec()), out_specs=cut))
    got, whole = sharded(flat, key_words(KEY)), add(flat, key_words(KEY), 3.0)
    # Two programs: each normal within the bound, then one rounding of a sum of at most count + 3 * 9.5.
    np.testing.assert_allclose(got, whole, rtol=0, atol=2 * (3 * 9.5 * RELATIVE_ERROR + count * 2.0**-24))


def test_floats_are_box_muller_of_the_words_of_their_index():
    sampled = [0, 1, 2, 9, 10, 11, 19, 9_999]
    got = normals(10_000)[sampled]
    expected = []
    for index in sampled:
        high, low, angle, sine = reference_words(KEY, index)
        expected.append(float(exact_pair(high, low, angle)[int(sine)]))
    np.testing.assert_allclose(got, expected, rtol=RELATIVE_ERROR)


def test_a_start_is_an_offset_into_the_same_stream(monkeypatch):
    whole = normals(5_000)
    monkeypatch.setattr(noise, "CHUNK_ELEMENTS", 640)  # several chunks, the last one overlapping
    count = 2_000
    traced = jax.jit(lambda k, s: standard_normal(k, s, count))
    for start in (0, 1, 9, 10, 1_280, 2_345):
        part = traced(key_words(KEY), jnp.uint32(start))
        np.testing.assert_allclose(part, whole[start : start + count], rtol=2 * RELATIVE_ERROR, err_msg=str(start))
    np.testing.assert_allclose(
        standard_normal(key_words(KEY), 2_345, count), whole[2_345:4_345], rtol=2 * RELATIVE_ERROR
    )


def test_indices_past_32_bits_are_other_noise_up_to_the_capacity_and_refused_beyond():
    key = key_words(KEY)
    end = 10 * 2**32
    last = np.asarray(standard_normal(key, end - 20, 20))
    high, low, angle, _ = reference_words(KEY, end - 1)
    np.testing.assert_allclose(last[-1], exact_pair(high, low, angle)[1], rtol=RELATIVE_ERROR)
    for start, count in ((end - 19, 20), (-10, 20), (0, 2**31), (0, -1)):
        with pytest.raises(InputError):
            standard_normal(key, start, count)


def test_shards_whose_indices_would_wrap_are_refused():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    for size, refused in ((2**29, False), (2**29 + 10, True)):
        shard = jax.shard_map(
            lambda size=size: shard_start("data", size)[None], mesh=mesh, in_specs=(), out_specs=PartitionSpec("data")
        )
        if refused:
            with pytest.raises(InputError, match=str(8 * size)):
                shard()
        else:
            assert int(shard()[-1]) == 7 * size


def test_noise_is_added_to_the_sum_and_scales_exactly_with_stddev():
    key, zeros = key_words(KEY), jnp.zeros(1_000, jnp.float32)
    unit = add(zeros, key, jnp.float32(1))
    np.testing.assert_allclose(unit, normals(1_000), rtol=2 * RELATIVE_ERROR)
    np.testing.assert_array_equal(add(zeros, key, jnp.float32(8)), 8 * unit)
    planted = zeros.at[17].set(1)
    difference = add(planted, key, jnp.float32(1)) - unit
    assert difference[17] == pytest.approx(1, abs=2.0**-21)  # noise of at most 9.5: two roundings of half 2**-20
    assert not np.delete(np.asarray(difference), 17).any()
    np.testing.assert_array_equal(add(planted, key, jnp.float32(0)), planted)


def test_an_empty_vector_gets_no_noise():
    assert add(jnp.zeros(0, jnp.float32), key_words(KEY), 1.0).shape == (0,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_sum_or_stddev_that_is_not_float32_is_refused(dtype):
    with pytest.raises(InputError, match=jnp.dtype(dtype).name):
        add_gaussian_noise(jnp.zeros(10, dtype), key_words(KEY), 1.0)
    with pytest.raises(InputError, match=jnp.dtype(dtype).name):
        add_gaussian_noise(jnp.zeros(10), key_words(KEY), jnp.ones((), dtype))
    with pytest.raises(InputError, match=r"\[2, 5\]"):
        add_gaussian_noise(jnp.zeros((2, 5)), key_words(KEY), 1.0)


def test_the_program_holds_no_float_but_float32_and_values_are_many():
    text = add.lower(jnp.zeros(1_000), key_words(KEY), jnp.float32(1)).as_text()
    assert "f32" in text
    assert not [kind for kind in ("f16", "f8", "f64") if kind in text]  # f16 is part of bf16
    values = draw(key_words(KEY), 0, 20_000)
    assert values.dtype == jnp.float32
    assert len(np.unique(values)) > 19_900  # birthday bound: about 2e4**2 / 2 / 2**23 = 24 values drawn twice


def test_the_key_is_not_in_the_program():
    words = key_words(bytes(np.random.default_rng(2).bytes(32)))
    spelled = [f(int(w)) for w in words for f in (str, lambda w: str(w - 2**32), hex, "{:X}".format)]

    def texts(function, *args):
        lowered = jax.jit(function).lower(*args)
        return (lowered.as_text() + lowered.compile().as_text()).lower()

    zeros = jnp.zeros(100, jnp.float32)
    argument = texts(lambda x, k: add_gaussian_noise(x, k, 1.0), zeros, words)
    constant = texts(lambda x: add_gaussian_noise(x, words, 1.0), zeros)
    assert not [s for s in spelled if s.lower() in argument]
    assert [s for s in spelled if s.lower() in constant]


@pytest.mark.parametrize("count", [10**6, 10**8])
def test_temporary_memory_does_not_grow_with_the_vector(count):
    flat = jax.ShapeDtypeStruct((count,), jnp.float32)
    compiled = add.lower(flat, key_words(KEY), jnp.float32(1)).compile()
    # Measured: 11.3 bytes an element of a chunk, 1.9 MB; the shorter vector alone is 4 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 3_000_000


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1] * np.sqrt(len(x)))  # a standard normal if x and y are independent


def test_leaves_pairs_and_steps_are_uncorrelated_and_so_are_their_squares():
    chunk = noise.CHUNK_ELEMENTS
    n = 2 * chunk + 80_000
    drawn, following = normals(n), normals(n, NEXT_KEY)
    both = {
        "same-shape leaves": (drawn[: n // 2], drawn[n // 2 :]),
        "cosine and sine": (drawn[::2], drawn[1::2]),
        "chunks of one draw": (drawn[:chunk], drawn[chunk : 2 * chunk]),
        "neighbouring blocks": (drawn[:-10], drawn[10:]),
        "consecutive steps": (drawn, following),
    }
    for name, (x, y) in both.items():
        assert abs(correlation(x, y)) < 4.5, name
        assert abs(correlation(x**2, y**2)) < 4.5, name
    assert abs(correlation(drawn, drawn + 0.02 * following)) > 4.5
    assert abs(correlation(drawn, following + 0.02 * drawn)) > 4.5


def test_consecutive_keys_share_no_value():
    drawn, following = normals(20_000), normals(20_000, NEXT_KEY)
    assert np.mean(drawn == following) < 1e-3


@pytest.mark.statistical
def test_the_variance_is_sigma_squared_and_not_one_percent_off():
    n, sigma = 4_000_000, 2.5
    noisy = np.asarray(add(jnp.zeros(n, jnp.float32), key_words(KEY), jnp.float32(sigma)), np.float64)

    def accepted(claimed: float) -> bool:
        p = stats.chi2.cdf(np.sum((noisy / claimed) ** 2), n)
        return 1e-5 < p < 1 - 1e-5

    assert accepted(sigma)
    assert not accepted(1.01 * sigma)
    assert not accepted(0.99 * sigma)


@pytest.mark.slow
@pytest.mark.statistical
def test_ten_million_draws_have_the_moments_and_the_distribution_of_a_normal():
    n = 10_000_000
    drawn = normals(n)
    # The mean of z**k over n draws is normal with variance (E z**2k - (E z**k)**2) / n.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10_170)):
        assert abs(np.mean(drawn**power) - mean) < 4.5 * np.sqrt(variance / n), power
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert stats.kstest(drawn * 1.01, "norm").pvalue < 1e-4
    beyond = np.sum(np.abs(drawn) > 4.5)
    assert stats.binomtest(int(beyond), n, 2 * stats.norm.sf(4.5)).pvalue > 1e-4
