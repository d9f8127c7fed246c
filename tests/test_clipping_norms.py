"""No example contributes more than its bound, whatever float32 does to its norm."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import ROUNDING_SLACK, Normalized, clipped_grad, layers, norms, split
from dpscale.errors import InputError

POSITIONS, INPUTS, OUTPUTS = 64, 96, 96
TRIALS = 40


def adversarial(offset: float):
    """One example whose gradient's ghost norm cancels: inputs share an offset, cotangents sum to zero.

    The loss is linear in the layer's output, so that the cotangents are the example's own numbers.
    """
    rng = np.random.default_rng(3)
    a = rng.standard_normal((TRIALS, POSITIONS, INPUTS)) + offset * rng.standard_normal((TRIALS, 1, INPUTS))
    g = rng.standard_normal((TRIALS, POSITIONS, OUTPUTS))
    g -= g.mean(axis=1, keepdims=True)
    return a.astype(np.float32), g.astype(np.float32)


def linear_loss(w, example):
    a, g = example
    return jnp.sum((a @ w) * g)


def contributions(method: str, a, g, clip_norm: float):
    """The norm, in float64, of what each example adds to the sum when it is alone in the batch."""
    clipped = jax.jit(clipped_grad(linear_loss, clip_norm, method))
    w = jnp.zeros((INPUTS, OUTPUTS), jnp.float32)
    one = jnp.ones(1, bool)
    sums = [clipped(w, (a[i : i + 1], g[i : i + 1]), one).grad_sum for i in range(TRIALS)]
    return np.array([np.linalg.norm(np.asarray(x, np.float64)) for x in sums])


def exact_contributions(method: str, a, g, clip_norm: float):
    """factor * |true gradient| in float64: what the proof bounds."""
    clipped = jax.jit(clipped_grad(linear_loss, clip_norm, method))
    w = jnp.zeros((INPUTS, OUTPUTS), jnp.float32)
    probe = clipped(w, (a, g), jnp.ones(TRIALS, bool))
    truth = np.einsum("btd,btp->bdp", a.astype(np.float64), g.astype(np.float64))
    return np.asarray(probe.norms), np.linalg.norm(truth, axis=(1, 2))


@pytest.fixture
def ghost_only(monkeypatch):
    """Keeps the layer on its ghost route, where the cancellation is."""
    monkeypatch.setattr(split, "choose_routes", lambda found, *_: found)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_contribution_stays_within_the_bound_where_ghost_norms_cancel(ghost_only, offset):
    a, g = adversarial(offset)
    for method in ("bookkeeping", "ghost"):
        assert contributions(method, a, g, 1.0).max() <= 1 + ROUNDING_SLACK


def test_without_the_rounding_terms_the_same_examples_break_the_bound(ghost_only, monkeypatch):
    monkeypatch.setattr(layers, "kappa", lambda *_: 0.0)
    monkeypatch.setattr(layers, "delta", lambda *_: 0.0)
    a, g = adversarial(1e4)
    assert contributions("bookkeeping", a, g, 1.0).max() > 1.5


def test_rounding_terms_cost_little_on_ordinary_examples(ghost_only):
    """T kappa / 2 with kappa = (96 + 96 + 187) 6e-8 and T = 64 is 7e-4 of the norm."""
    a, g = adversarial(0.0)
    seen = contributions("bookkeeping", a, g, 1.0)
    assert seen.min() >= 1 - 1.5e-3
    norms, truth = exact_contributions("bookkeeping", a, g, 1.0)
    np.testing.assert_allclose(norms, truth, rtol=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-30, 1e30, float("inf")])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_extreme_clip_norms(method, clip_norm):
    a, g = adversarial(0.0)
    w = jnp.zeros((INPUTS, OUTPUTS), jnp.float32)
    out = jax.jit(clipped_grad(linear_loss, clip_norm, method))(w, (a[:3], g[:3]), jnp.ones(3, bool))
    if clip_norm >= 1e30:
        truth = np.einsum("btd,btp->dp", a[:3].astype(np.float64), g[:3].astype(np.float64))
        np.testing.assert_allclose(out.grad_sum, truth, atol=1e-4 * np.abs(truth).max())
    else:
        assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 3 * clip_norm * (1 + ROUNDING_SLACK)
        assert np.all(np.asarray(out.grad_sum) == 0) == (clip_norm == 0)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_low_precision_compute_keeps_float32_sums_and_the_bound(method):
    """bf16 operands: each g c is rounded once, which the bound must cover too (delta)."""

    def loss(w, example):
        a, g = (x.astype(jnp.bfloat16) for x in example)
        return jnp.sum(((a @ w.astype(jnp.bfloat16)) * g).astype(jnp.float32))

    a, g = adversarial(0.0)
    clipped = jax.jit(clipped_grad(loss, 1.0, method))
    for dtype in (jnp.float32, jnp.bfloat16):
        w = jnp.zeros((INPUTS, OUTPUTS), dtype)
        out = clipped(w, (a[:1], g[:1]), jnp.ones(1, bool))
        assert out.grad_sum.dtype == jnp.float32
        size = np.linalg.norm(np.asarray(out.grad_sum, np.float64))
        assert 0.9 <= size <= 1 + ROUNDING_SLACK
        rounded = out.grad_sum.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.mean(np.asarray(out.grad_sum != rounded)) > 0.9  # a sum rounded to bf16 would be equal


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("positions", [1, 5])
def test_8_bit_floats_are_summed_in_float32_within_the_bound(method, dtype, positions):
    """jax.grad rounds the weight's gradient to 8 bits; the sums of the rules are not rounded."""

    def loss(w, x):
        y = jax.lax.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
        return jnp.sum(jnp.sin(y))

    w, x = jax.random.normal(jax.random.key(0), (6, 7)), jax.random.normal(jax.random.key(1), (4, positions, 6))
    expected = jax.jit(clipped_grad(loss, 0.7, "materialize"))(w, x, jnp.ones(4, bool))
    assert float(expected.norms.min()) > 0.7
    out = jax.jit(clipped_grad(loss, 0.7, method))(w, x, jnp.ones(4, bool))
    np.testing.assert_allclose(out.norms, expected.norms, rtol=float(jnp.finfo(dtype).eps) / 2)
    for row in range(4):
        one = jax.jit(clipped_grad(loss, 0.7, method))(w, x, jnp.arange(4) == row).grad_sum
        assert one.dtype == jnp.float32
        assert 0.5 <= np.linalg.norm(np.asarray(one, np.float64)) <= 0.7 * (1 + ROUNDING_SLACK)


def test_one_row_batches_and_batches_without_good_rows():
    a, g = adversarial(0.0)
    w = jnp.zeros((INPUTS, OUTPUTS), jnp.float32)
    for method in ("bookkeeping", "ghost"):
        clipped = jax.jit(clipped_grad(linear_loss, 1.0, method))
        assert np.linalg.norm(clipped(w, (a[:1], g[:1]), jnp.ones(1, bool)).grad_sum) > 0.9
        for out in (
            clipped(w, (a[:1], g[:1]), jnp.zeros(1, bool)),
            clipped(w, (a[:1] * np.nan, g[:1]), jnp.ones(1, bool)),
            clipped(w, (a[:1], 0 * g[:1]), jnp.ones(1, bool)),
        ):
            assert not np.any(out.grad_sum)
            assert out.norms[0] == 0


def layer_norm(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


WIDTH = 48


def sizes_alone(loss, params, method):
    """What each of eight rows [8, WIDTH] contributes at clip norm 1."""
    rows = 8
    x = jax.random.normal(jax.random.key(2), (rows, 8, WIDTH))
    clipped = jax.jit(clipped_grad(loss, 1.0, method))
    for i in range(rows):
        out = clipped(params, x, jnp.arange(rows) == i)
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(out.grad_sum)]
        yield np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))


def block_weights(*lead):
    keys = jax.random.split(jax.random.key(1), 2)
    w, v = (jax.random.normal(key, (*lead, WIDTH, WIDTH)) * 0.3 for key in keys)
    return {"w": w, "b": jnp.zeros((*lead, WIDTH)), "v": v, "c": jnp.zeros((*lead, WIDTH))}


def block(x, p):
    return jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_where_gradients_are_nothing_but_rounding_the_norm_is_of_what_is_summed(method):
    """The gradient of a sum behind a layer normalisation is zero but for rounding, here times 1e9. A compiler that made
    the cotangents twice, for the norm and for the sum, gave contributions of twice the bound."""
    sizes = list(sizes_alone(lambda p, x: 1e9 * jnp.sum(layer_norm(block(x, p))), block_weights(), method))
    assert min(sizes) >= 0.9
    assert max(sizes) <= 1 + ROUNDING_SLACK


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_where_gradients_of_attention_are_rounding_the_norm_is_of_what_is_summed(method, heads):
    """As above; the operands of these layers are products, which are not held."""

    def loss(p, x):
        h = layer_norm(x)
        q, k, v = (jnp.einsum("td,dhk->htk", h, p[name]) * 3.0 for name in "qkv")
        attended = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
        return 1e9 * jnp.sum(layer_norm(x + jnp.einsum("htk,hkd->td", attended, p["out"])))

    keys = dict(zip(("q", "k", "v", "out"), jax.random.split(jax.random.key(1), 4), strict=True))
    size = WIDTH // heads
    params = {name: jax.random.normal(keys[name], (WIDTH, heads, size)) * 0.3 for name in "qkv"}
    params["out"] = jax.random.normal(keys["out"], (heads, size, WIDTH)) * 0.3
    sizes = list(sizes_alone(loss, params, method))
    assert min(sizes) >= 0.9
    assert max(sizes) <= 1 + ROUNDING_SLACK


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_where_gradients_of_a_stack_in_a_scan_are_rounding_the_norm_is_of_what_is_summed(method, checkpointed):
    """As above. A second pass that was the gradient of the weighted losses gave 3.4 times the bound."""

    def loss(layers, x):
        def step(x, p):
            return x + layer_norm(block(x, p)), None

        return 1e9 * jnp.sum(layer_norm(jax.lax.scan(jax.checkpoint(step) if checkpointed else step, x, layers)[0]))

    sizes = list(sizes_alone(loss, block_weights(3), method))
    assert min(sizes) >= 0.9
    assert max(sizes) <= 1 + ROUNDING_SLACK


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_what_is_flushed_to_zero_beside_huge_cotangents_is_in_the_norm(method, positions):
    """Squares of inputs below 1e-19 are zero in float32; their products with huge cotangents are not."""

    def loss(w, example):
        return jnp.sum((example[0] @ w) * example[1])

    a = jnp.full((2, positions, 64), 3e-20 / 8)
    g = jnp.full((2, positions, 64), 1e18 / 8)
    out = jax.jit(clipped_grad(loss, 1e-3, method))(jnp.zeros((64, 64)), (a, g), jnp.asarray([True, False]))
    assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 1e-3 * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("kind", ["dense", "convolution", "scan", "embedding"])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_tiny_clip_norms_bound_what_is_flushed_when_factors_scale_operands(method, kind):
    """Of 16 cotangents one is 1, the others add up to -0.9: times a factor of 1e-37 only these are flushed to zero."""
    width, positions, size = 256, 16, 1.0 if kind == "embedding" else 3e17
    factor, weights = 1.25e-37, jnp.full(positions, -0.9 / 15).at[0].set(1.0)
    clip_norm = factor * 0.1 * size * width**0.5 * (2**0.5 if kind == "scan" else 1)

    def loss(w, g):
        x = jnp.full((positions, width), size / width**0.5)
        if kind == "convolution":
            spec = ("NHWC", "HWIO", "NHWC")
            x = jnp.full((1, 6, 6, width), size / (9 * width) ** 0.5)  # in each window the same
            y = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=spec).reshape(positions, width)
        elif kind == "scan":
            y = jax.lax.scan(jax.checkpoint(lambda h, layer: (h + x @ layer, None)), 0 * x, w)[0]
        else:
            y = w[jnp.zeros(positions, int)] if kind == "embedding" else x @ w
        return jnp.sum(y * g)

    shape = {"convolution": (3, 3, width, width), "scan": (2, width, width)}.get(kind, (width, width))
    g = jnp.broadcast_to(weights[:, None], (2, positions, width))
    out = jax.jit(clipped_grad(loss, clip_norm, method))(jnp.zeros(shape), g, jnp.asarray([True, False]))
    np.testing.assert_allclose(out.norms[0], clip_norm / factor, rtol=1e-3)
    assert 0.99 * clip_norm <= np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= clip_norm * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
@pytest.mark.parametrize("shape", [(3, 3, 128, 256), (7, 11, 13, 512), (2, 700, 700), (300_000,)])
def test_norms_of_many_equal_numbers_are_not_too_small(method, shape):
    """Added up one after the other, half a million equal squares gave 4e-4 too little (jax 0.10.0)."""
    for value in (0.1, 0.7812):
        clipped = jax.jit(clipped_grad(lambda w, x: jnp.sum(jnp.sin(w)) * x, 1.0, method))
        out = clipped(jnp.zeros(shape), jnp.full(2, value), jnp.asarray([True, False]))
        np.testing.assert_allclose(out.norms[0], value * np.prod(shape) ** 0.5, rtol=4e-6)
        assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 1 + ROUNDING_SLACK


@pytest.mark.parametrize("width", [norms.BLOCK, 2 * norms.BLOCK + 500])
def test_long_dot_products_between_positions_are_made_in_blocks_that_lose_nothing(width):
    x, y = (np.random.default_rng(seed).standard_normal((2, length, width)) for seed, length in ((1, 3), (2, 5)))
    x, y = x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
    table = jax.jit(norms.cross_gram)(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    lengths = np.linalg.norm(x, axis=-1)[:, :, None] * np.linalg.norm(y, axis=-1)[:, None, :]
    error = np.abs(np.asarray(table, np.float64) - x @ np.swapaxes(y, 1, 2))
    np.testing.assert_array_less(error, norms.effective_length(width) * norms.roundoff(np.float32) * lengths)


@pytest.mark.parametrize("route", ["ghost", "instantiated"])
@pytest.mark.parametrize("positions", [700, 40])
def test_norms_of_equal_products_are_not_too_small(route, positions, monkeypatch):
    """As above, for tables and for gradients that a layer's rule writes out."""
    monkeypatch.setattr(split, "choose_routes", lambda found, *_: [replace(layer, route=route) for layer in found])
    x, g = jnp.full((2, positions, 300), 0.7812), jnp.full((2, positions, 700), 0.1)
    clipped = jax.jit(clipped_grad(lambda w, e: jnp.sum((e[0] @ w) * e[1]), 1.0, "bookkeeping"))
    out = clipped(jnp.zeros((300, 700)), (x, g), jnp.asarray([True, False]))
    np.testing.assert_allclose(out.norms[0], positions * 0.7812 * 0.1 * (300 * 700) ** 0.5, rtol=1e-5)
    assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 1 + ROUNDING_SLACK


def test_convolutions_and_scans_bound_what_is_flushed_too():
    def convolved(w, example):
        x, g = example
        y = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(y * g)

    def stacked(w, example):
        x, g = example
        step = jax.checkpoint(lambda h, layer: (h + h @ layer, None))
        return jnp.sum(jax.lax.scan(step, x, w)[0] * g)

    x, one = jnp.full((1, 12, 12, 8), 3e-20 / 8), jnp.ones(1, bool)
    for loss, w in ((convolved, jnp.zeros((3, 3, 8, 8))), (stacked, jnp.zeros((2, 8, 8)))):
        out = jax.jit(clipped_grad(loss, 1e-3, "ghost"))(w, (x, jnp.full_like(x, 1e18 / 8)), one)
        assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 1e-3 * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("first", ["x @ w", "w @ x"])
def test_what_is_flushed_from_a_weight_that_is_used_twice_is_in_the_norm(method, first):
    """8.2 times the bound was seen where the lengths of the two tables were taken for each other's."""

    def loss(w, row):
        x, scale = row
        w = w if first == "x @ w" else w.T
        return scale * (jnp.sum(x @ w) + jnp.sum(x[::-1] @ w))

    shape = (1000, 1) if first == "x @ w" else (1, 1000)
    row = jnp.full((2, 1000), 1e-20, jnp.float32), jnp.full(2, 5e18, jnp.float32)
    out = jax.jit(clipped_grad(loss, 1.0, method))(jnp.zeros(shape), row, jnp.array([True, False]))
    assert np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 1 + ROUNDING_SLACK


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_the_upper_bound_is_finite_where_the_norms_are(method):
    """Its square of many large cotangents overflowed: the row counted, with nothing."""
    row = jnp.full((2, 20, 2000), 1e-12, jnp.float32), jnp.full(2, 1e17, jnp.float32)
    clipped = jax.jit(clipped_grad(lambda w, row: row[1] * jnp.sum(row[0] @ w), 0.7, method))
    out = clipped(jnp.zeros((2000, 500)), row, jnp.array([True, False]))
    assert 0.69 < np.linalg.norm(np.asarray(out.grad_sum, np.float64)) <= 0.7 * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_gradients_of_8_bit_parameters_are_rounded_as_the_loss_says(method, dtype):
    def loss(w, x):
        return jnp.sum(jnp.sin((x @ w).astype(jnp.float32)))

    x = jax.random.normal(jax.random.key(1), (4, 3, 5)).astype(dtype)
    w = jax.random.normal(jax.random.key(2), (5, 6)).astype(dtype)
    arguments = w, x, jnp.ones(4, bool)
    out, expected = (jax.jit(clipped_grad(loss, 0.5, name))(*arguments) for name in (method, "materialize"))
    np.testing.assert_allclose(out.grad_sum, expected.grad_sum, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.norms, expected.norms, rtol=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.int2, jnp.float8_e8m0fnu])
def test_the_smallest_types_are_features_as_any_other(method, dtype):
    """float8_e8m0fnu has no zero: a row that does not count had NaN in its place."""

    def loss(w, x):
        return jnp.sum(jnp.sin(jax.lax.dot(x, w, preferred_element_type=jnp.float32)))

    numbers = jax.random.randint(jax.random.key(1), (4, 3, 5), -2, 2) if "int" in dtype.__name__ else 1.0
    x, w = jnp.broadcast_to(jnp.abs(jnp.asarray(numbers)), (4, 3, 5)).astype(dtype), jnp.eye(5, 6)
    mask = jnp.arange(4) != 2
    out = jax.jit(clipped_grad(loss, 0.5, method))(w, x, mask)
    each = jax.vmap(jax.grad(loss), (None, 0))(w, x).astype(jnp.float32)
    norms = np.linalg.norm(np.asarray(each).reshape(4, -1), axis=1)
    expected = np.tensordot(np.minimum(1, 0.5 / np.maximum(norms, 1e-30)) * mask, each, 1)
    np.testing.assert_allclose(out.grad_sum, expected, rtol=2e-2, atol=1e-6)  # tables give an upper bound
    np.testing.assert_allclose(out.norms, np.where(mask, norms, 0), rtol=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.3])
def test_float16_factors_do_not_fall_among_its_few_smallest_numbers(method, share):
    def loss(w, x):
        return jnp.sum((x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)) * 3e4

    w, x, mask = jnp.zeros((8, 8)), jnp.full((2, 1, 8), 1.2e-7), jnp.asarray([True, False])
    norm = float(jax.jit(clipped_grad(loss, np.inf, "materialize"))(w, x, mask).norms[0])
    out = jax.jit(clipped_grad(loss, share * norm, method))(w, x, mask)
    size = np.linalg.norm(np.asarray(out.grad_sum, np.float64))
    assert 0.9 * share * norm <= size <= share * norm * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "auto"])
def test_an_input_whose_square_overflows_spoils_nobody_elses_sum(method, checkpointed):
    def loss(w, x):
        def flattened(x):
            return jnp.tanh(x @ w)

        return jnp.sum((jax.checkpoint(flattened) if checkpointed else flattened)(x))

    w = jax.random.normal(jax.random.key(0), (8, 8))
    x = jax.random.normal(jax.random.key(1), (4, 40, 8))
    clipped = jax.jit(clipped_grad(loss, 1.0, method))
    out = clipped(w, x.at[2].set(1e20), jnp.ones(4, bool))  # its tanh is flat: the gradient is zero
    without = clipped(w, x, jnp.arange(4) != 2)
    np.testing.assert_array_equal(out.grad_sum, without.grad_sum)
    assert np.linalg.norm(out.grad_sum) > 0.1


def test_keys_whose_draws_depend_on_other_rows_are_refused():
    def loss(w, x, key):
        return jnp.sum(w * x * jax.random.bernoulli(key, 0.5, x.shape))

    for impl in ("rbg", "unsafe_rbg"):
        keys = jax.random.split(jax.random.key(0, impl=impl), 3)
        with pytest.raises(InputError, match="first row's key"):
            clipped_grad(loss)(jnp.ones(2), jnp.ones((3, 2)), jnp.ones(3, bool), keys)


def from_raw_words(w, x):
    return jnp.sum(w * jax.random.normal(jax.random.wrap_key_data(jnp.uint32(x[:4]), impl="rbg"), (8,)))


def made_of_a_number(w, x):
    return jnp.sum(w * jax.random.normal(jax.random.key(jnp.int32(x[0]), impl="unsafe_rbg"), (8,)))


def folded_into_a_key(w, x):
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), jnp.int32(x[0]))
    return jax.lax.cond(x[1] > 0, lambda: jnp.sum(w * jax.random.normal(key, (8,))), lambda: jnp.sum(w))


@pytest.mark.parametrize("method", ["auto", "ghost", "materialize"])
@pytest.mark.parametrize("loss", [from_raw_words, made_of_a_number, folded_into_a_key])
def test_keys_whose_draws_depend_on_other_rows_are_refused_when_the_loss_makes_them(loss, method):
    """A masked row's key changed the other rows' norms, and one row moved the sum by five times the bound."""
    with pytest.raises(InputError, match="first row's key"):
        clipped_grad(loss, method=method)(jnp.ones(8), jnp.ones((3, 8)), jnp.ones(3, bool))


def test_a_key_that_no_example_decides_may_be_of_any_kind():
    def loss(w, x):
        return jnp.sum(w * x * jax.random.normal(jax.random.key(0, impl="rbg"), (8,)))

    x = jax.random.normal(jax.random.key(1), (3, 8))
    for method in ("auto", "ghost", "materialize"):
        norms = clipped_grad(loss, method=method)(jnp.ones(8), x, jnp.ones(3, bool)).norms
        drawn = jax.random.normal(jax.random.key(0, impl="rbg"), (8,))
        np.testing.assert_allclose(norms, jnp.linalg.norm(x * drawn, axis=1), rtol=1e-5)


@pytest.mark.parametrize(("clip_norm", "gamma"), [(1e25, 1e-20), (1.0, 1e-20)])
def test_normalised_factors_that_would_overflow_are_refused(clip_norm, gamma):
    with pytest.raises(InputError, match="larger gamma"):
        Normalized(clip_norm, gamma)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_the_largest_normalised_factor_spoils_nobody_elses_sum(method):
    """Of a row without any gradient, whose inputs are huge."""
    x = jnp.array([1e18, 1.0])[:, None, None] * jnp.ones((2, 16, 64))
    scale = jnp.array([0.0, 1.0])
    clipped = jax.jit(
        clipped_grad(lambda w, row: row[1] * jnp.sum(row[0] @ w), method=method, bound=Normalized(1, 2e-19))
    )
    out = clipped(jnp.zeros((64, 64)), (x, scale), jnp.ones(2, bool))
    assert out.finite.all()
    np.testing.assert_allclose(jnp.linalg.norm(out.grad_sum), 1, rtol=1e-2)
