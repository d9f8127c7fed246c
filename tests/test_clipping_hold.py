"""What is made once, and how bad rows leave the operands."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.clipping import clipped_grad
from dpscale.clipping.hold import cleared, held

WIDTH, POSITIONS, ROWS = 16, 24, 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_values_are_held_by_the_means_that_each_compiler_respects():
    means = {"cpu": "stablehlo.while", "cuda": "stablehlo.optimization_barrier"}
    traced = jax.jit(jax.vmap(held, (0, None))).trace(jnp.ones((4, 3)), jnp.ones(4, bool))
    for platform in means:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert [name for name in means.values() if name in text] == [means[platform]]
    for x in (jnp.asarray([1.5, -0.0, jnp.nan]), jnp.asarray([True, False])):
        np.testing.assert_array_equal(jax.jit(held)(x, jnp.ones(4, bool)), x)


@pytest.mark.parametrize("good", [[True] * 4, [True, False, True, False], [False] * 4])
def test_bad_rows_are_zero_and_the_others_untouched_wherever_their_axis_is(good):
    arrays = [normal(1, 4, 3), normal(2, 2, 4, 3), normal(3, 5, 4).astype(jnp.bfloat16)]
    spoilt = [arrays[0].at[1].set(jnp.nan), arrays[1].at[:, 1].set(jnp.inf), arrays[2].at[:, 3].set(jnp.nan)]
    good = np.array(good)
    out = jax.jit(cleared, static_argnums=2)(arrays if good.all() else spoilt, jnp.asarray(good), (0, 1, 1))
    for x, y, axis in zip(arrays, out, (0, 1, 1), strict=True):
        assert x.dtype == y.dtype
        kept = good.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        np.testing.assert_array_equal(y, np.where(kept, x, 0))


def attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    x = x + jax.nn.softmax(q @ k.T) @ v @ p["out"]
    return jnp.sum(jnp.square(jax.nn.gelu(x @ p["up"]) @ p["down"]))


def attention_weights():
    params = {name: normal(i, WIDTH, WIDTH) for i, name in enumerate(("q", "k", "v", "out"))}
    return params | {"up": normal(7, WIDTH, 4 * WIDTH), "down": normal(8, 4 * WIDTH, WIDTH)}


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_the_compiler_makes_no_product_twice(method):
    """Operands that are products are not held for that reason (`_is_made_once`)."""
    x = normal(9, ROWS, POSITIONS, WIDTH)
    step = jax.jit(lambda p, x, mask: clipped_grad(attention, 1.0, method)(p, x, mask).grad_sum)
    lowered = step.lower(attention_weights(), x, jnp.ones(ROWS, bool))
    asked = lowered.as_text().count("stablehlo.dot_general")
    made = re.findall(r"= \S+ dot\(", lowered.compile().as_text())
    assert 0 < len(made) <= asked


def loops(loss, params, method="bookkeeping"):
    """How many loops there are in the compiled step: one for each time something is held, or summed row by row."""
    step = jax.jit(lambda p, x, mask: clipped_grad(loss, 1.0, method)(p, x, mask).grad_sum)
    compiled = step.lower(params, normal(9, ROWS, WIDTH), jnp.ones(ROWS, bool)).compile().as_text()
    return len(re.findall(r" while\(", compiled))


def test_a_bias_at_one_position_is_held_as_its_layers_cotangent():
    params = {"w": normal(1, WIDTH, WIDTH), "b": normal(2, WIDTH)}
    with_bias = loops(lambda p, x: jnp.sum(jnp.sin(x @ p["w"] + p["b"])), params)
    assert with_bias == loops(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])), {"w": params["w"]})


def test_inputs_need_not_be_held():
    """They are made already."""
    w = normal(1, WIDTH, WIDTH)
    moved = loops(lambda w, x: jnp.sum(jnp.sin(x.reshape(1, WIDTH) @ w)), w)
    assert moved < loops(lambda w, x: jnp.sum(jnp.sin(jnp.cos(x) @ w)), w)
