"""Sums of written-out gradients: right for every form, and programs that do not grow with the number of layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpscale.clipping import clipped_grad
from dpscale.clipping.row_sum import SHORT_ROW, row_sums

ROWS = 6
GOOD = np.arange(ROWS) != 1
FORMS = [((ROWS, 3, 5), 0), ((ROWS, SHORT_ROW), 0), ((2, ROWS, 3), 1), ((2, ROWS, SHORT_ROW), 1)]


def row_sum(each, axis, factor):
    return row_sums([each], [axis], [factor], [0])[0]


def test_each_array_has_its_groups_factors():
    arrays = [jnp.full((*shape[:axis], ROWS, *shape[axis + 1 :]), j + 1.0) for j, (shape, axis) in enumerate(FORMS)]
    axes, factors = [axis for _, axis in FORMS], [jnp.arange(ROWS) * 1.0, jnp.ones(ROWS)]
    found = row_sums(arrays, axes, factors, [0, 1, 1, 0])
    for total, expected in zip(found, (1 * 15, 2 * 6, 3 * 6, 4 * 15), strict=True):
        np.testing.assert_array_equal(total, np.full(total.shape, expected))
    onto = [jnp.full(x.shape, 100.0) for x in found]
    for total, more in zip(found, row_sums(arrays, axes, factors, [0, 1, 1, 0], onto), strict=True):
        np.testing.assert_array_equal(more, total + 100)
    assert row_sums([], [], factors, []) == []


@pytest.mark.parametrize(("shape", "axis"), FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_scaled_and_added_and_those_with_factor_zero_are_nothing(shape, axis, dtype):
    rng = np.random.default_rng(3)
    each, factor = jnp.asarray(rng.normal(size=shape), dtype), np.where(GOOD, rng.uniform(size=ROWS), 0)
    factor = factor.astype(np.float32)
    expected = np.tensordot(factor.astype(float), np.asarray(each, float), ((0,), (axis,)))
    index = tuple(1 if i == axis else slice(None) for i in range(len(shape)))
    for garbage in (jnp.nan, jnp.inf, 0):
        found = row_sum(each.at[index].set(garbage), axis, jnp.asarray(factor))
        assert found.dtype == jnp.float32
        # at most ROWS + 1 roundings of sums of at most ROWS terms below 5
        np.testing.assert_allclose(found, expected, rtol=0, atol=(ROWS + 1) * ROWS * 5 * 2.0**-24)


@pytest.mark.parametrize("width", [3, SHORT_ROW])
def test_each_device_sums_its_own_rows(width):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    each, factor = jnp.ones((4, width)), jnp.arange(4.0)
    both = jax.shard_map(lambda x, f: row_sum(x, 0, f)[None], mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(both)(each, factor), np.stack([np.full(width, 1.0), np.full(width, 5.0)]))


def test_a_gpu_takes_one_product_and_a_cpu_one_pass():
    args = jnp.ones((4, SHORT_ROW)), 0, jnp.ones(4)
    traced = jax.jit(row_sum, static_argnums=1).trace(*args)
    for platform, product in (("cuda", True), ("cpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.dot_general" in text, "stablehlo.while" in text) == (product, not product)


def test_more_layers_of_one_kind_need_no_more_different_kernels():
    """Compile time is that of the different kernels: XLA's CPU backend compiles equal ones once."""
    assert different_kernels(6) == different_kernels(3)


def different_kernels(depth: int) -> int:
    width, positions, rows = 16, 12, 4
    keys = iter(jax.random.split(jax.random.key(depth), 3 * depth))

    def block():
        return {
            "in": jax.random.normal(next(keys), (width, width)),  # written out
            "out": jax.random.normal(next(keys), (width, width)),
            "scale": jnp.ones(width),
            "bias": jnp.zeros(width),
            "mix": jax.random.normal(next(keys), (8 * width, 8 * width)),  # tables, then one product
        }

    def loss(params, x):
        for layer in params:
            h = jnp.tanh(x @ layer["in"]) @ layer["out"]
            x = jnp.tanh(x) + h * layer["scale"] + layer["bias"]  # a plain residual sum grows kernels in SGD too
            x = x + (jnp.tile(x[:3], (1, 8)) @ layer["mix"])[:, :width].sum()
        return jnp.sum(x**2)

    args = [block() for _ in range(depth)], jnp.ones((rows, positions, width)), jnp.ones(rows, bool)
    text = jax.jit(lambda *a: clipped_grad(loss, 1.0, "bookkeeping")(*a).grad_sum).lower(*args).compile().as_text()
    bodies = re.findall(r"^%\S*computation\S* .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    found = {nameless(body) for body in bodies}
    assert len(found) > 10
    return len(found)


def nameless(body: str) -> str:
    """A kernel's text with its values numbered in order, and nothing of where it came from."""
    names: dict[str, str] = {}
    body = re.sub(r", metadata=\{.*?\}|, backend_config=\{.*\}", "", body)
    return re.sub(r"%[\w.-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), body)
