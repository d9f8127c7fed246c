"""Random small losses, and losses chosen to break the walk: every method gives the reference's sums and norms.

A program is a few blocks on a state h[T, D]. Each block takes its weights through a random function of a leaf, and
leaves are used again, so that the gradients are sums of products through scales, transposes, slices and scans.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import ROUNDING_SLACK, Flat, Method, Normalized, PerGroup, clipped_grad, split

PROGRAMS = int(os.environ.get("DPSCALE_FUZZ_PROGRAMS", "8"))  # `make fuzz` takes 60: some ten minutes of compiling

T, D, ROWS, MASKED = 3, 6, 4, 2
CLIP_NORM = 0.3
Array = jax.Array
View = tuple[str, tuple[int, ...], Callable[[Array], Array]]

VIEWS: list[View] = [  # (name, shape of the leaf, the [D, D] weight made of it)
    ("plain", (D, D), lambda w: w),
    ("plain again", (D, D), lambda w: w),
    ("transposed", (D, D), lambda w: w.T),
    ("scaled", (D, D), lambda w: 3.0 * w),
    ("divided", (D, D), lambda w: w / np.sqrt(D)),
    ("negated", (D, D), lambda w: -w),
    ("scaled transposed and negated", (D, D), lambda w: -(0.5 * w).T * 1.7),
    ("subtracted", (D, D), lambda w: w - 0.3 * w.T),
    ("doubled", (D, D), lambda w: w + w),
    ("sliced", (D + 2, D + 1), lambda w: w[1 : D + 1, :D]),
    ("dynamic slice", (D + 2, D), lambda w: jax.lax.dynamic_slice(w, (1, 0), (D, D))),
    ("chosen from a stack", (3, D, D), lambda w: w[1]),
    ("summed stack", (2, D, D), lambda w: w[0] - 2.0 * w[1]),
    ("joined", (2, D, D // 2), lambda w: jnp.concatenate([w[0], 2.0 * w[1]], 1)),
    ("folded heads", (D, 2, D // 2), lambda w: w.reshape(D, D)),
    ("padded", (D, D - 2), lambda w: jnp.pad(w, ((0, 0), (1, 1)))),
    ("repeated", (D, 2), lambda w: jnp.repeat(w, D // 2, axis=1)),
    ("broadcast", (D, 1), lambda w: w * jnp.ones((D, D))),
    ("flipped", (D, D), lambda w: w[::-1, :]),
    ("rolled", (D, D), lambda w: jnp.roll(w, 2, 0)),
    ("gathered rows", (D, D), lambda w: w[jnp.array([0, 2, 2, 5, -1, 1])]),
    ("masked", (D, D), jnp.tril),
    ("squared", (D, D), lambda w: w**2),
    ("low rank", (2, D, 2), lambda w: w[0] @ w[1].T),
    ("kronecker", (2, D // 2), lambda w: jnp.kron(w, jnp.outer(w[0], w[1]))[:D, :D]),
    ("standardised", (D, D), lambda w: (w - w.mean(0)) / jnp.sqrt(w.var(0) + 0.1)),
    ("half stopped", (D, D), lambda w: 0.5 * w + jax.lax.stop_gradient(w)),
    ("squeezed and swapped", (D, D), lambda w: jnp.swapaxes(w[None], 1, 2)[0]),
]  # fmt: skip


@jax.custom_vjp
def _louder(x):
    return x


_louder.defvjp(lambda x: (x, None), lambda _, g: (-2.5 * g,))


@dataclass
class Sketch:
    """The leaves so far and the steps of the loss."""

    rng: np.random.Generator
    params: dict[str, Array] = field(default_factory=dict)
    steps: list[Callable[[dict[str, Array], Array, Array], Array]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def leaf(self, shape: tuple[int, ...]) -> str:
        """A leaf of this shape: every other time one that is there already."""
        same = [name for name, x in self.params.items() if x.shape == shape]
        if same and self.rng.random() < 0.5:
            return str(self.rng.choice(same))
        name = f"p{len(self.params)}"
        self.params[name] = jnp.asarray(self.rng.standard_normal(shape)) / 2
        return name

    def weight(self) -> Callable[[dict[str, Array]], Array]:
        word, shape, view = VIEWS[self.rng.integers(len(VIEWS))]
        name = self.leaf(shape)
        self.words.append(f"{word} {name}")
        return lambda p: view(p[name])


def dense(s: Sketch):
    w, b = s.weight(), s.leaf((D,))
    return lambda p, h, ids: jnp.tanh(h @ w(p) + p[b])


def vmapped_dense(s: Sketch):
    w = s.weight()
    return lambda p, h, ids: h + jnp.sin(jax.vmap(lambda t: 2.0 * t @ w(p))(h))


def einsum_of_three(s: Sketch):
    w, v = s.weight(), s.weight()
    return lambda p, h, ids: jnp.einsum("td,de,fe->tf", h, w(p), v(p)) / 2


def experts(s: Sketch):
    name = s.leaf((2, D, D))
    return lambda p, h, ids: jnp.einsum("etd,edf->tf", jnp.stack([h, jnp.sin(h)]), p[name]) / 2


def heads_by_vmap(s: Sketch):
    name = s.leaf((2, D, D))
    return lambda p, h, ids: jnp.sum(jax.vmap(lambda w: jnp.tanh(h @ w))(p[name]), 0)


def bilinear_attention(s: Sketch):
    q, k = s.weight(), s.weight()
    return lambda p, h, ids: jax.nn.softmax((h @ q(p)) @ (h @ k(p)).T) @ h


def embedding(s: Sketch):
    w, axis, scale = s.weight(), int(s.rng.integers(2)), float(np.sqrt(D))
    return lambda p, h, ids: h + scale * (w(p)[ids] if axis == 0 else w(p)[:, ids].T)


def one_hot_embedding(s: Sketch):
    w = s.weight()
    return lambda p, h, ids: h - jax.nn.one_hot(ids, D, dtype=h.dtype) @ w(p)


def convolution(s: Sketch):
    name, groups = s.leaf((2, D // 2, D)), 2

    def step(p, h, ids):
        kernel = 1.5 * p[name]
        numbers = ("NWC", "WIO", "NWC")
        return jnp.tanh(
            jax.lax.conv_general_dilated(
                h[None], kernel, (1,), [(2, -1)], dimension_numbers=numbers, feature_group_count=groups
            )[0]
        )

    return step


def layer_norm(s: Sketch):
    name = s.leaf((D,))
    return lambda p, h, ids: (h - h.mean(-1, keepdims=True)) * p[name] / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)


def recurrence(s: Sketch):
    w, u, back = s.weight(), s.weight(), bool(s.rng.integers(2))

    def step(p, h, ids):
        def cell(c, t):
            c = jnp.tanh(0.5 * c @ w(p) - t @ u(p))
            return c, c

        return jax.lax.scan(cell, jnp.ones(D, h.dtype), h, reverse=back, unroll=1 + int(back))[1]

    return step


def scanned_layers(s: Sketch):
    name, shared = s.leaf((2, D, D)), s.weight()

    def step(p, h, ids):
        def layer(c, w):
            return jnp.tanh(c @ (2.0 * w).T) + c @ shared(p), None

        return jax.lax.scan(layer, h, -p[name])[0]

    return step


def nested_scans(s: Sketch):
    name, shared = s.leaf((2, D, D)), s.weight()

    def step(p, h, ids):
        def outer(c, w):
            def inner(r, t):
                return jnp.tanh(r @ w + t @ shared(p)), r @ w.T

            return jnp.sum(jax.lax.scan(inner, c[0], c)[1], 0) + c, None

        return jax.lax.scan(outer, h, p[name])[0]

    return step


def weight_in_the_carry(s: Sketch):
    name, decay = s.leaf((D, D)), float(s.rng.choice([1.0, 0.8]))

    def step(p, h, ids):
        def cell(c, t):
            r, w = c
            return (jnp.tanh(r @ w + t), w if decay == 1 else decay * w), r

        (_, w), out = jax.lax.scan(cell, (jnp.ones(D, h.dtype), p[name]), h)
        return out + h @ w

    return step


def checkpointed(s: Sketch):
    w = s.weight()
    policy = [None, jax.checkpoint_policies.dots_saveable][int(s.rng.integers(2))]
    return lambda p, h, ids: jax.checkpoint(lambda x, v: jnp.sin(x @ v) + x, policy=policy)(h, w(p))


def branch(s: Sketch):
    w = s.weight()
    return lambda p, h, ids: jax.lax.cond(h[0, 0] > 0, lambda: h @ w(p), lambda: jnp.sin(h))


def custom_backward(s: Sketch):
    w = s.weight()
    return lambda p, h, ids: _louder(h @ _louder(w(p)))


def sorted_rows(s: Sketch):
    w = s.weight()
    return lambda p, h, ids: jnp.sort(h @ w(p), 0) + jax.ops.segment_sum(h, ids % 2, T)


def outer_scalar(s: Sketch):
    name = s.leaf(())
    return lambda p, h, ids: jnp.tanh(h * p[name])


BLOCKS = [
    dense, dense, vmapped_dense, einsum_of_three, experts, heads_by_vmap, bilinear_attention, embedding, embedding,
    one_hot_embedding, convolution, layer_norm, recurrence, scanned_layers, nested_scans, weight_in_the_carry,
    checkpointed, branch, custom_backward, sorted_rows, outer_scalar,
]  # fmt: skip


def program(seed: int):
    """(loss, params, batch, words): two to four blocks, the last weight tied now and then, a penalty on a leaf."""
    rng = np.random.default_rng([2026, seed])
    sketch = Sketch(rng, {"unused": jnp.ones((2, 2))})
    for _ in range(rng.integers(2, 5)):
        block = BLOCKS[rng.integers(len(BLOCKS))]
        sketch.words.append(block.__name__)
        sketch.steps.append(block(sketch))
    head, penalty = sketch.weight(), float(rng.choice([0.0, 0.1]))
    params = dict(sketch.params)

    def loss(p, example):
        h, ids = example
        for step in sketch.steps:
            h = step(p, h, ids)
        return jnp.sum(jnp.sin(h @ head(p))) + penalty * jnp.sum(p["p0"] ** 2 if "p0" in p else 0.0)

    batch = (jnp.asarray(rng.standard_normal((ROWS, T, D))), jnp.asarray(rng.integers(0, D, (ROWS, T))))
    return loss, params, batch, " / ".join(sketch.words)


def variation(seed: int, loss, params):
    """(loss, options of clipped_grad, whether it takes keys): a random bound, frozen leaves, keys, auxiliary output."""
    rng = np.random.default_rng([11, seed])
    bounds = [
        Flat(CLIP_NORM),
        Normalized(CLIP_NORM),
        PerGroup({name: float(rng.uniform(0.05, 0.5)) for name in params}),
    ]
    options = {"bound": bounds[seed % 3], "has_aux": bool(rng.integers(2))}
    if rng.integers(2):
        options["trainable"] = {name: bool(rng.integers(2)) for name in params} | {list(params)[-1]: True}
    keyed = bool(rng.integers(2))

    def varied(p, example, *key):
        h, ids = example
        h = jnp.where(jax.random.bernoulli(key[0], 0.8, h.shape), h, 0) if keyed else h
        value = loss(p, (h, ids))
        return (value, {"mean": jnp.mean(h), "ids": ids}) if options["has_aux"] else value

    return varied, options, keyed


def assert_methods_agree(loss, params, batch, monkeypatch, rtol=1e-9, keys=None, **options):
    """In float64, each with the engine's own routes and with every layer on its tables where it may be."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    mask = jnp.arange(rows) != MASKED
    chosen = split.choose_routes
    options = options or {"bound": Flat(CLIP_NORM)}

    def everything(params, batch, mask):
        outs = [clipped_grad(loss, method="materialize", **options)(params, batch, mask, keys)]
        ways: list[tuple[Method, Any]] = [("bookkeeping", chosen), ("bookkeeping", _as_found), ("ghost", _as_found)]
        for method, routes in ways:
            monkeypatch.setattr(split, "choose_routes", routes)
            outs.append(clipped_grad(loss, method=method, **options)(params, batch, mask, keys))
        return outs

    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    expected, *others = jax.jit(everything).lower(params, batch, mask).compile(fast)(params, batch, mask)
    scale = max(float(jnp.max(jnp.abs(x), initial=0)) for x in jax.tree.leaves(expected.grad_sum))
    for out in others:
        np.testing.assert_array_equal(out.finite, expected.finite)
        np.testing.assert_allclose(out.norms, expected.norms, rtol=rtol, atol=1e-30)
        np.testing.assert_allclose(out.losses, expected.losses, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, out.aux, expected.aux)
        assert jax.tree.structure(out.grad_sum) == jax.tree.structure(expected.grad_sum)
        for x, y in zip(jax.tree.leaves(out.grad_sum), jax.tree.leaves(expected.grad_sum), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


def _as_found(layers, *_):
    return layers


FEW = (2, 4, 5)
SEEDS = [pytest.param(seed, marks=[] if seed in FEW else [pytest.mark.slow]) for seed in range(PROGRAMS)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_agree_with_the_reference(seed, monkeypatch):
    """rtol: some thousand roundings of 1e-16, conditioned by up to 1e4 by the blocks' own cancellation."""
    with jax.enable_x64(True):
        loss, params, batch, words = program(seed)
        loss, options, keyed = variation(seed, loss, params)
        keys = jax.random.split(jax.random.key(seed), ROWS) if keyed else None
        try:
            assert_methods_agree(loss, params, batch, monkeypatch, keys=keys, **options)
        except Exception as error:
            error.add_note(words)
            raise


def total(x):
    return jnp.sum(jnp.sin(x))


def pair(loss, *shape):
    """(loss, leaf, rows x[ROWS, T, 10])."""

    def make(rng):
        return loss, jnp.asarray(rng.standard_normal(shape)) / 2, jnp.asarray(rng.standard_normal((ROWS, T, 10)))

    return make


def ids(loss, *shape):
    """(loss, table, rows of ids, some negative or out of range)."""

    def make(rng):
        return loss, jnp.asarray(rng.standard_normal(shape)) / 2, jnp.asarray(rng.integers(-3, 12, (ROWS, T)))

    return make


def carried(update):
    """A weight in a scan's carry, changed by `update(carried, original)` in each round, and used after the scan."""

    def loss(w, x):
        def cell(c, t):
            return (jnp.tanh(c[0] @ c[1] + t), update(c[1], w)), None

        (h, last), _ = jax.lax.scan(cell, (jnp.ones(10, x.dtype), w), x)
        return total(h) + total(x @ last)

    return loss


def recurrent(w, x):
    return jax.lax.scan(lambda h, t: (jnp.tanh(h @ w + t), None), jnp.ones(10, x.dtype), x)[0]


def doubled(w, x):
    for _ in range(3):
        w = w + w
    return total(x @ w)


CORNERS = {
    "weight minus itself elsewhere": pair(lambda w, x: total(x @ w) + total(2 * x @ -w), 10, 10),
    "difference of two uses": pair(lambda w, x: total(x @ w - jnp.cos(x) @ w), 10, 10),
    "constant factor": pair(lambda w, x: total(x @ (3.0 * w)), 10, 10),
    "rows and columns of one table": ids(lambda w, i: total(w[i]) + total(2 * w[:, i]), 10, 10),
    "columns, tied to a decoder": ids(lambda w, i: total(jnp.tanh(w[:, i]).T @ w), 10, 10),
    "columns, tied to a wide decoder": ids(lambda w, i: total(jnp.tanh(w[:, i]).T @ w), 7, 10),
    "complex product": pair(lambda w, x: jnp.sum(jnp.abs((x * (1 + 2j)) @ w.astype(complex)) ** 2), 10, 10),
    "complex factor": pair(lambda w, x: jnp.sum(jnp.real(1j * x @ (w.astype(complex) * (2 - 1j))) ** 2), 10, 10),
    "no positions": pair(lambda w, x: total(x[:0] @ w), 10, 10),
    "no rounds": pair(lambda w, x: total(recurrent(w, x[:0])) + total(x @ w), 10, 10),
    "leaf of size zero": pair(lambda w, x: total(x[:, :0] @ w) + jnp.sum(x), 0, 10),
    "doubled three times": pair(doubled, 10, 10),
    "carried": pair(carried(lambda c, w: c), 10, 10),
    "carried and transposed": pair(carried(lambda c, w: c.T), 10, 10),
    "carried and doubled": pair(carried(lambda c, w: c + c), 10, 10),
    "carried, half and half": pair(carried(lambda c, w: 0.5 * c + w), 10, 10),
    "carried and negated": pair(carried(lambda c, w: -c), 10, 10),
    "mean carried twice": pair(carried(lambda c, w: 0.5 * (c + w) + c), 10, 10),
    "ids clipped": ids(lambda w, i: total(jnp.take(w, i, axis=0, mode="clip")), 10, 4),
    "ids wrapped": ids(lambda w, i: total(jnp.take(w, i, axis=0, mode="wrap")), 10, 4),
    "ids filled": ids(lambda w, i: total(w.at[i].get(mode="fill", fill_value=0)), 10, 4),
    "ids that make NaN": ids(lambda w, i: total(jnp.take(w, i, axis=0)), 10, 4),
    "small unsigned ids": ids(lambda w, i: total(w[jnp.abs(i).astype(jnp.uint8)]), 300, 4),
    "gradient without the example": pair(lambda w, x: jnp.sum((w @ w.T) ** 2) + 0 * jnp.sum(x), 10, 10),
}
QUICK = {"weight minus itself elsewhere", "columns, tied to a wide decoder", "complex product", "no positions"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CORNERS])
def test_corners_agree_with_the_reference(name, monkeypatch):
    with jax.enable_x64(True):
        loss, params, batch = CORNERS[name](np.random.default_rng(4))
        assert_methods_agree(loss, params, batch, monkeypatch)


def half(x):
    return x.astype(jnp.bfloat16)


ROUNDED = {
    "loss in half precision": lambda w, x: half(total(x @ w)),
    "half precision after the layer": lambda w, x: total(
        (half(jnp.tanh(x @ w)) * half(jnp.float32(1.3))).astype(x.dtype)
    ),
    "half precision in one of two uses": lambda w, x: total((half(x) @ half(w).T).astype(x.dtype)) + total(x @ w) / 1e3,
    "scaled": lambda w, x: total(x @ (3e3 * w)),
    "difference": lambda w, x: total(x @ (3.0 * w) - x @ (0.1 * w)),
}


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if "half" in x else pytest.mark.slow) for x in ROUNDED])
def test_one_example_alone_stays_within_its_bound(name, method):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((10, 10), (12, T, 10)))
    clipped = jax.jit(clipped_grad(ROUNDED[name], 0.1, method))
    for row in x:
        total = clipped(w, row[None], jnp.ones(1, bool)).grad_sum
        assert np.linalg.norm(np.asarray(total, np.float64)) <= 0.1 * (1 + ROUNDING_SLACK)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_a_large_leaf_without_a_rule_stays_within_its_bound_where_its_gradient_cancels(method):
    """The gradient is what rounding leaves of a sum of numbers near 1e3: a second pass rounds it otherwise."""
    x, g = np.random.default_rng(0).standard_normal((2, 1, 64, 20000))
    x, g = np.float32(x), np.float32(1e3 * (g - g.mean(1, keepdims=True)))
    clipped = jax.jit(clipped_grad(lambda b, e: jnp.sum((e[0] + b) * e[1]), 1e-3, method))
    alone = clipped(np.zeros(20000, np.float32), (x, g), jnp.ones(1, bool)).grad_sum
    assert np.linalg.norm(np.asarray(alone, np.float64)) <= 1e-3 * (1 + ROUNDING_SLACK)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
@pytest.mark.parametrize("seed", range(1000, 1000 + max(1, PROGRAMS // 3)))
def test_random_programs_stay_within_the_bound_and_forget_bad_rows(seed, method):
    """float32. Row 1 becomes NaN: the others keep their bits."""
    loss, params, (x, i), words = program(seed)
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    bound = (Flat(0.01), Normalized(0.01), PerGroup(dict.fromkeys(params, 0.01)))[seed % 3]
    clipped = jax.jit(clipped_grad(loss, method=method, bound=bound))
    mask = jnp.arange(ROWS) != MASKED
    for row in range(ROWS):
        alone = clipped(params, (x, i), jnp.arange(ROWS) == row).grad_sum
        squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(alone)]
        assert np.sqrt(sum(squares)) <= bound.max_norm * (1 + ROUNDING_SLACK), words
    out = clipped(params, (x.at[1].set(jnp.nan).at[MASKED].set(jnp.inf), i), mask)
    without = clipped(params, (x, i), mask.at[1].set(False))
    jax.tree.map(np.testing.assert_array_equal, out.grad_sum, without.grad_sum)
    np.testing.assert_array_equal(out.norms, without.norms)
    assert list(out.finite) == [True, False, True, True], words


@pytest.mark.slow
def test_a_weight_used_a_thousand_times_is_written_out():
    def loss(w, x):
        for _ in range(1200):
            x = jnp.tanh(x @ w)
        return total(x)

    w = jnp.ones((2, 2))
    layers = clipped_grad(loss).explain(w, jnp.ones((2, 1, 2))).layers
    assert [layer.route for layer in layers] == ["materialised"]
