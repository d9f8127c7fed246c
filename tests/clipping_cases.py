"""Losses of every kind that the clipping engine must get right, each with the routes that it should take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array


@dataclass(frozen=True)
class Case:
    """`make(rng)` gives (loss, params, batch); `routes` are the routes of some leaves, by part of their name."""

    name: str
    make: Callable[[np.random.Generator], tuple[Callable[..., Any], Any, Any]]
    routes: dict[str, str] = field(default_factory=dict)
    keys: bool = False
    has_aux: bool = False
    rtol: float = 1e-11


CASES: list[Case] = []


def case(routes: dict[str, str] | None = None, **options):
    def register(make):
        CASES.append(Case(make.__name__, make, routes or {}, **options))
        return make

    return register


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def linen(module, rng, x, *, outputs=None):
    params = module.init(jax.random.key(int(rng.integers(1 << 30))), x[0])["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(rng, *leaf.shape), params)
    loss = outputs or (lambda out: jnp.sum(jnp.sin(out)))
    return lambda p, example: loss(module.apply({"params": p}, example)), params, x


@case({"kernel": "outer", "bias": "materialised"})
def dense_without_positions(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.tanh(nn.Dense(7)(x)))

    return linen(Net(), rng, normal(rng, 5, 4))


@case({"Dense_0']['kernel": "ghost", "Dense_1']['kernel": "instantiated"})
def dense_with_positions(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(nn.Dense(40)(x))
            return nn.Dense(2)(h)

    return linen(Net(), rng, normal(rng, 5, 14, 30))


@case({"kernel": "ghost"})
def linen_attention_and_norms(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("position", nn.initializers.normal(), x.shape)
            x = jnp.concatenate([self.param("token", nn.initializers.normal(), (1, x.shape[1])), x])
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
            return nn.RMSNorm()(x) * self.param("temperature", nn.initializers.ones, ())

    return linen(Net(), rng, normal(rng, 4, 3, 16))


@case({"kernel": "ghost"}, rtol=1e-5)  # its softmax is float32 whatever the inputs: some hundred roundings of 6e-8
def nnx_attention(rng):
    kind = jnp.result_type(float)
    attention = nnx.MultiHeadAttention(2, 16, 16, 16, decode=False, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    rest = jax.tree.map(lambda x: x, rest)

    def loss(p, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, p, rest)(x)))

    return loss, params, normal(rng, 4, 3, 16)


@case({"weight": "outer"})
def equinox_mlp(rng):
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, x: jnp.sum(jnp.sin(eqx.combine(p, static)(x))), params, normal(rng, 4, 4)


@case({"'a'": "ghost", "'b'": "ghost"})
def lora_with_a_frozen_integer_leaf(rng):
    base = normal(rng, 20, 20)
    params = {"a": normal(rng, 20, 16), "b": normal(rng, 16, 20), "steps": jnp.arange(3)}

    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ base + 0.5 * (x @ p["a"]) @ p["b"]) ** 2)

    return loss, params, normal(rng, 4, 2, 20)


def conv(rng, layout, kernel, image, *, rows=4, route="instantiated", **options):
    options = {"window_strides": (1,) * (len(kernel) - 2), "padding": "SAME"} | options

    def loss(p, x):
        out = jax.lax.conv_general_dilated(x[None], p["w"], dimension_numbers=layout, **options)
        return jnp.sum(jnp.sin(out + p["b"]))

    del route
    return loss, {"w": normal(rng, *kernel), "b": normal(rng, kernel[-1])}, normal(rng, rows, *image)


NWC, NHWC, NDHWC = ("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC"), ("NDHWC", "DHWIO", "NDHWC")


@case({"w": "ghost"})
def conv_1d_strided_valid(rng):
    return conv(rng, NWC, (3, 4, 5), (9, 4), window_strides=(2,), padding="VALID")


@case({"w": "ghost"})
def conv_2d_same_many_channels(rng):
    return conv(rng, NHWC, (3, 3, 20, 24), (3, 4, 20))


@case({"w": "instantiated"})
def conv_2d_dilated_explicit_padding(rng):
    return conv(rng, NHWC, (3, 2, 3, 5), (7, 6, 3), padding=((1, 2), (0, 3)), rhs_dilation=(2, 1))


@case({"w": "instantiated"})
def conv_2d_grouped_strided(rng):
    return conv(rng, NHWC, (3, 3, 2, 6), (6, 5, 4), feature_group_count=2, window_strides=(2, 1))


@case({"w": "instantiated"})
def conv_2d_depthwise(rng):
    return conv(rng, NHWC, (3, 3, 1, 8), (5, 4, 4), feature_group_count=4)


@case({"w": "instantiated"})
def conv_2d_of_one_channel(rng):
    """Its written-out gradients are made of four places of the window at a time."""
    return conv(rng, NHWC, (3, 4, 1, 5), (9, 8, 1), window_strides=(2, 1))


@case({"w": "instantiated"})
def conv_2d_transposed(rng):
    return conv(rng, NHWC, (3, 3, 3, 5), (4, 5, 3), lhs_dilation=(2, 2), padding=((1, 2), (2, 2)))


@case({"w": "instantiated"})
def conv_3d(rng):
    return conv(rng, NDHWC, (2, 3, 2, 2, 3), (4, 5, 3, 2), window_strides=(1, 2, 1))


@case({"w": "ghost"})
def conv_patches_of_an_image(rng):
    return conv(rng, NHWC, (4, 4, 3, 30), (8, 8, 3), window_strides=(4, 4), padding="VALID")


@case({"Conv_0']['kernel": "instantiated"})
def conv_group_norm_network(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x[None])))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.max_pool(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x), (2, 2), (2, 2))
            return nn.Dense(3)(x.reshape(-1))

    return linen(Net(), rng, normal(rng, 4, 6, 6, 3))


@case({"": "instantiated"})
def weight_standardised_conv(rng):
    def loss(w, x):
        standard = (w - w.mean((0, 1), keepdims=True)) / jnp.sqrt(w.var((0, 1), keepdims=True) + 1e-3)
        out = jax.lax.conv_general_dilated(x[None], standard, (1,), "SAME", dimension_numbers=NWC)
        return jnp.sum(jnp.sin(out))

    return loss, normal(rng, 3, 4, 8), normal(rng, 4, 9, 4)


@case({"": "ghost"})
def embedding_with_repeated_ids(rng):
    def loss(table, ids):
        return jnp.sum(jnp.cumsum(jnp.sin(table[ids])) ** 2)

    return loss, normal(rng, 40, 6), jnp.asarray(rng.integers(0, 3, (5, 7)))


@case({"embedding": "ghost"})
def tied_embedding_as_decoder(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(60, 24)
            return embed.attend(nn.tanh(embed(ids)))

    ids = jnp.asarray(rng.integers(0, 9, (4, 5)))
    return linen(Net(), rng, ids, outputs=lambda out: jnp.sum(jnp.sin(out) * jnp.arange(60)))


@case({"embedding": "instantiated"})
def tied_embedding_of_a_small_vocabulary(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(5, 4)
            return embed.attend(nn.tanh(embed(ids)))

    return linen(Net(), rng, jnp.asarray(rng.integers(0, 5, (4, 6))))


@case({"": "ghost"})
def one_weight_used_three_times(rng):
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w)

    return loss, normal(rng, 30, 30), normal(rng, 4, 2, 30)


@case({"'a'": "ghost", "'b'": "materialised", "'k'": "ghost"})
def scan_over_layers(rng):
    params = {
        "a": normal(rng, 3, 16, 20),
        "b": normal(rng, 3, 20),
        "c": normal(rng, 3, 20, 16),
        "k": normal(rng, 3, 2, 16, 16) / 4,
    }

    def loss(p, x):
        def block(h, w):
            h = jnp.tanh(h @ w["a"] + w["b"]) @ w["c"]
            out = jax.lax.conv_general_dilated(h[None], w["k"], (1,), "SAME", dimension_numbers=NWC)
            return h + out[0], None

        return jnp.sum(jax.lax.scan(block, x, p)[0] ** 2) / 100

    return loss, params, normal(rng, 4, 5, 16)


@case({"'w'": "ghost"})
def recurrent_cell_in_a_scan_over_time(rng):
    params = {"w": normal(rng, 12, 12) / 4, "u": normal(rng, 3, 12)}

    def loss(p, x):
        def step(h, token):
            return jnp.tanh(h @ p["w"] + token @ p["u"]), None

        return jnp.sum(jax.lax.scan(step, jnp.ones(12), x)[0] ** 2)

    return loss, params, normal(rng, 4, 5, 3)


@case({"'w'": "outer"})
def checkpoint_inside_a_scan_and_jit_inside_the_loss(rng):
    def loss(p, x):
        @jax.checkpoint
        def block(h, w):
            return jnp.sin(h @ w)

        h = jax.lax.scan(lambda h, w: (block(h, w), None), x, p["w"])[0]
        return jax.jit(lambda h: jnp.sum(jax.checkpoint(jnp.tanh)(h @ p["v"]) ** 2))(h)

    return loss, {"w": normal(rng, 3, 6, 6), "v": normal(rng, 6, 2)}, normal(rng, 4, 6)


@jax.custom_vjp
def _attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def _attention_forward(q, k, v):
    return _attention(q, k, v), (q, k, v)


def _attention_backward(kept, g):
    q, k, v = kept
    p = jax.nn.softmax(q @ k.T)  # computed again, as flash attention does
    d = p * (g @ v.T - jnp.sum((g @ v.T) * p, -1, keepdims=True))
    return d @ k, d.T @ q, p.T @ g


_attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_jvp
def _soft(x):
    return jnp.logaddexp(x, 0.0)


@_soft.defjvp
def _soft_jvp(primals, tangents):
    return _soft(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]


@case({"": "ghost"})
def custom_derivatives(rng):
    def loss(p, x):
        h = _attention(x @ p["q"], x @ p["k"], x @ p["v"])
        return jnp.sum(_soft(h @ p["o"]))

    return loss, {name: normal(rng, 10, 10) / 3 for name in "qkvo"}, normal(rng, 4, 3, 10)


@case({"w": "ghost"})
def experts_and_boolean_inputs(rng):
    def loss(p, example):
        x, on = example["x"], example["on"]
        h = jnp.einsum("td,edh->eth", x, p["w"])
        return jnp.sum(jnp.where(on[:, None, None], jnp.sin(h), 0))

    batch = {"x": normal(rng, 5, 3, 12), "on": jnp.asarray(rng.integers(0, 2, (5, 2)), bool)}
    return loss, {"w": normal(rng, 2, 12, 10)}, batch


@case({"w": "ghost"}, keys=True, has_aux=True)
def dropout_key_and_auxiliary_output(rng):
    def loss(p, x, key):
        kept = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        out = jnp.tanh(kept @ p["w"])
        return jnp.sum(out**2), {"accuracy": jnp.max(out), "count": jnp.int32(3)}

    return loss, {"w": normal(rng, 12, 12)}, normal(rng, 5, 3, 12)


@case({"w": "materialised"})
def operations_without_a_rule(rng):
    def loss(p, x):
        inverse = jnp.linalg.inv(p["w"] + 3 * jnp.eye(4))
        branch = jax.lax.cond(x[0] > 0, lambda w: jnp.sum(w * x), lambda w: jnp.sum(jnp.sin(w) * x), p["w"])
        return jnp.sum(inverse @ x) + branch + jnp.sum(p["unused"][:0])

    return loss, {"w": normal(rng, 4, 4), "unused": normal(rng, 2)}, normal(rng, 5, 4)


@case({"w": "materialised"})
def per_example_kernel(rng):
    """Both operands of the forward convolution follow the example, so vmap alone would group it."""

    def loss(p, x):
        kernel = jnp.tanh(p["w"] * x[:3, :, None])
        out = jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=NWC)
        return jnp.sum(jnp.sin(out))

    return loss, {"w": normal(rng, 3, 4, 2)}, normal(rng, 4, 8, 4)


@case({"w": "materialised"})
def grouped_conv_whose_kernel_follows_the_example(rng):
    """Its every convolution has both operands from the example: under vmap XLA's CPU compiler mixes their rows."""

    def loss(p, x):
        kernel = jnp.tanh(p["w"] * (1 + jnp.mean(x)))
        out = jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=NWC, feature_group_count=2)
        return jnp.sum(jnp.sin(out))

    return loss, {"w": normal(rng, 3, 1, 4)}, normal(rng, 4, 9, 2)


@case({"w": "materialised"})
def grouped_conv_in_a_branch(rng):
    """Under vmap both branches are taken, and XLA's CPU compiler mixes the rows of their convolutions."""

    def conv(w, x):
        return jax.lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=NWC, feature_group_count=2)

    def loss(p, x):
        out = jax.lax.cond(x[0, 0] > 0, lambda: conv(p["w"], x), lambda: conv(p["w"], 2 * x))
        return jnp.sum(jnp.sin(out))

    return loss, {"w": normal(rng, 3, 1, 4)}, normal(rng, 4, 4, 2)


@case({"w": "instantiated"})
def tied_autoencoders_side_by_side(rng):
    def loss(p, x):
        return jnp.sum(jax.vmap(lambda w: jnp.sin(jnp.tanh(x @ w) @ w.T))(p["w"]))

    return loss, {"w": normal(rng, 3, 5, 5)}, normal(rng, 4, 3, 5)


def _forth_and_back(p, x):
    def apply(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(apply, x, p["w"])
    return jnp.sum(jax.lax.scan(apply, h, jnp.swapaxes(p["w"], 1, 2), reverse=True)[0])


@case({"w": "instantiated"})
def a_stack_scanned_forth_and_back_transposed(rng):
    return _forth_and_back, {"w": normal(rng, 2, 5, 5)}, normal(rng, 4, 3, 5)


@case({"w": "ghost"})
def a_stack_of_one_scanned_forth_and_back_transposed(rng):
    return _forth_and_back, {"w": normal(rng, 1, 9, 9)}, normal(rng, 4, 3, 9)


@case({"w": "ghost"})
def one_expert_applied_twice(rng):
    def loss(p, x):
        h = jnp.einsum("etd,edf->etf", x[None], p["w"])
        return jnp.sum(jnp.sin(jnp.einsum("etd,edf->etf", h, p["w"])))

    return loss, {"w": normal(rng, 1, 9, 9)}, normal(rng, 4, 3, 9)


@case()
def ids_of_a_type_that_does_not_hold_the_vocabulary(rng):
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))

    def loss(p, ids):
        rows = [jax.lax.gather(p[mode], ids[:, None], numbers, (1, 4), mode=mode) for mode in ("clip", "fill")]
        return jnp.sum(jnp.sin(jnp.stack(rows)))

    params = {"clip": normal(rng, 300, 4), "fill": normal(rng, 300, 4)}
    return loss, params, jnp.asarray(rng.integers(0, 256, (4, 6)), jnp.uint8)


@case()
def integer_features_without_a_cast(rng):
    def loss(p, x):
        rows = {"wide": x, "narrow": x, "one": x[:1]}
        out = [jax.lax.dot(rows[name], w, preferred_element_type=w.dtype) for name, w in p.items()]
        return sum(jnp.sum(jnp.sin(y)) for y in out)

    params = {"wide": normal(rng, 5, 14), "narrow": normal(rng, 5, 2), "one": normal(rng, 5, 4)}
    return loss, params, jnp.asarray(rng.integers(-5, 5, (4, 3, 5)), jnp.int8)


@jax.custom_vjp
def _quarters(w):
    return w


_quarters.defvjp(lambda w: (w, None), lambda _, g: ((g * 4).astype(jnp.int32).astype(g.dtype) / 4,))


@case({"w": "materialised"})
def gradients_cut_to_integers(rng):
    """What is cut off is not rounding: the gradient must be as the loss says."""
    return lambda p, x: jnp.sum(jnp.sin(x @ _quarters(p["w"]))), {"w": normal(rng, 5, 7)}, 3 * normal(rng, 4, 3, 5)


@jax.custom_vjp
def _coarse(x, w):
    return x @ w


def _coarse_backward(kept, g):
    x, w = kept
    sides = [jnp.round(jnp.clip(side * 20, -127, 127)).astype(jnp.int8) for side in (x, g)]
    return g @ w.T, jax.lax.dot_general(*sides, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype)


_coarse.defvjp(lambda x, w: (x @ w, (x, w)), _coarse_backward)


@case({"w": "ghost"}, rtol=2e-5)  # integers say nothing of float64: tables and sums are float32
def a_gradient_that_is_a_product_of_integers(rng):
    return lambda p, x: jnp.sum(jnp.sin(_coarse(x, p["w"]))), {"w": normal(rng, 5, 4)}, normal(rng, 4, 3, 5)


@case({"w": "materialised"})
def weights_of_eight_bits(rng):
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["w"].astype(jnp.float8_e4m3fn).astype(x.dtype)))

    return loss, {"w": normal(rng, 5, 7)}, normal(rng, 4, 3, 5)


@case({"w": "ghost"})
def state_in_a_reference(rng):
    def loss(p, x):
        h, total = jnp.tanh(x @ p["w"]), jax.new_ref(jnp.zeros(12, x.dtype))
        for t in range(3):
            total[...] += h[t] * total[...] + h[t]
        return jnp.sum(total[...] ** 2)

    return loss, {"w": normal(rng, 12, 12)}, normal(rng, 4, 3, 12)
