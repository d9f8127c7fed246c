"""What `explain` says is so."""

import jax
import jax.numpy as jnp
import pytest

from dpscale.clipping import clipped_grad

ROWS = 4


def held(loss, params, batch, method="bookkeeping", keys=None):
    explained = clipped_grad(loss, method=method).explain(params, batch, keys)
    return {layer.name.strip("[']"): layer.bytes for layer in explained.layers}


def test_an_embedding_holds_ids_and_cotangents_and_no_vocabulary():
    ids = jnp.zeros((ROWS, 16), jnp.int32)
    assert held(lambda p, i: jnp.sum(jnp.sin(p[i])), jnp.ones((5000, 8)), ids) == {"": ROWS * 16 * (4 + 8 * 4)}


def test_a_convolution_holds_its_input_and_its_cotangent_and_no_patches():
    def loss(p, x):
        return jnp.sum(jnp.sin(jax.lax.conv(x[None], p, (1, 1), "SAME")))

    clipped = clipped_grad(loss)
    params, batch = jnp.ones((128, 64, 5, 5)), jnp.ones((ROWS, 64, 8, 8))
    (layer,) = clipped.explain(params, batch).layers
    assert (layer.route, layer.bytes, layer.sgd_bytes) == ("ghost", *(ROWS * 8 * 8 * n * 4 for n in (64 + 128, 64)))


@pytest.mark.parametrize("method", ["bookkeeping", "ghost"])
def test_plain_sgd_holds_the_inputs_of_layers_and_no_cotangents(method):
    """Those that jax.checkpoint makes again it does not hold either."""

    def loss(p, x):
        h = jnp.sin(x @ p["first"] + p["b"])  # [3, 6]
        h = jnp.sin(h @ p["left"]) * jnp.sin(h @ p["right"])  # one input for both
        again = jax.checkpoint(lambda h, w: jnp.sin(jnp.sin(h) @ w))(h, p["remade"])
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), again, p["stacked"])[0])

    square = jnp.eye(6)
    params = {"first": jnp.ones((5, 6)), "b": jnp.zeros(6), "left": square, "right": square, "remade": square}
    params["stacked"] = jnp.ones((4, 6, 6))
    explained = clipped_grad(loss, method=method).explain(params, jnp.ones((ROWS, 3, 5)))
    one = ROWS * 3 * 6 * 4
    sizes = {layer.name.strip("[']"): layer.sgd_bytes for layer in explained.layers}
    assert sizes == {"b": 0, "first": ROWS * 3 * 5 * 4, "left": one, "remade": 0, "right": 0, "stacked": 4 * one}
    assert f"{sum(sizes.values()) / 1e3:.3g}kB of inputs" in str(explained)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 2), (jnp.float32, 4), (jnp.float64, 8)])
def test_what_two_layers_read_is_counted_once_and_in_its_own_type(dtype, size):
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["q"]) * jnp.sin(x @ p["k"]) + p["b"]).astype(jnp.float32)

    with jax.enable_x64(dtype == jnp.float64):
        params = {"b": jnp.zeros(30, dtype), "k": jnp.ones((30, 30), dtype), "q": jnp.ones((30, 30), dtype)}
        found = held(loss, params, jnp.ones((ROWS, 3, 30), dtype))
    one = ROWS * 3 * 30 * size
    assert found == {"b": ROWS * 30 * max(size, 4), "k": 2 * one, "q": one}


def test_a_bias_that_is_its_layers_cotangent_holds_nothing_of_its_own():
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["w"] + p["b"]))

    params = {"b": jnp.zeros(6), "w": jnp.ones((5, 6))}
    assert held(loss, params, jnp.ones((ROWS, 5))) == {"b": 0, "w": ROWS * (5 + 6) * 4}
    assert held(loss, params, jnp.ones((ROWS, 5)), "ghost") == {"b": 0, "w": 0}


def test_the_reference_writes_everything_out():
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["w"] + p["b"]))

    params = {"b": jnp.zeros(6), "w": jnp.ones((5, 6))}
    explained = clipped_grad(loss, method="materialize").explain(params, jnp.ones((ROWS, 5)))
    assert [layer.route for layer in explained.layers] == ["materialised"] * 2
    assert [layer.bytes for layer in explained.layers] == [ROWS * 6 * 4, ROWS * 30 * 4]
    assert "method: materialize" in str(explained)


def test_a_loss_of_its_key_alone_is_explained():
    keys = jax.random.split(jax.random.key(0), ROWS)
    assert held(lambda p, _, key: jnp.sum(p * jax.random.normal(key, (3,))), jnp.ones(3), (), keys=keys) == {"": 48}
