"""Laws of the interface, checked on the reference method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpscale.clipping import Flat, Normalized, PerGroup, PerPattern, clipped_grad
from dpscale.errors import InputError

ROWS = 8


def loss(params, example):
    x, y = example
    return jnp.sum((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"b": jax.random.normal(keys[0], (4,)), "i": jnp.arange(3), "w": jax.random.normal(keys[1], (3, 4))}
    return params, (jax.random.normal(keys[2], (ROWS, 3)), jax.random.normal(keys[3], (ROWS, 4))), jnp.arange(ROWS) != 5


def by_hand(params, batch, mask, factor):
    total = {"b": np.zeros(4), "w": np.zeros((3, 4))}
    for i in range(ROWS):
        grad = jax.grad(loss, allow_int=True)(params, jax.tree.map(lambda x, i=i: x[i], batch))
        norm = float(np.sqrt(sum(np.sum(np.square(grad[k], dtype=np.float64)) for k in total)))
        for k in total:
            total[k] += float(mask[i]) * factor(norm) * np.asarray(grad[k], np.float64)
    return total


@pytest.mark.parametrize(
    "clip_norm", [0.0, 0.5, *(pytest.param(c, marks=pytest.mark.slow) for c in (1e-30, 3.0, 1e30, float("inf")))]
)
def test_sum_is_that_of_gradients_clipped_one_by_one(case, clip_norm):
    out = jax.jit(clipped_grad(loss, clip_norm, "materialize"))(*case)
    expected = by_hand(*case, lambda norm: min(1.0, clip_norm / norm))
    for k, value in expected.items():
        np.testing.assert_allclose(out.grad_sum[k], value, rtol=1e-5, atol=1e-6 * min(1.0, clip_norm))
    assert out.grad_sum["i"] is None
    assert out.norms[5] == out.losses[5] == 0
    assert out.finite.all()


def test_normalized_bound_divides_by_norm_plus_gamma_and_keeps_zero(case):
    out = clipped_grad(loss, bound=Normalized(2.0, gamma=0.5))(*case)
    expected = by_hand(*case, lambda norm: 2.0 / (norm + 0.5))
    np.testing.assert_allclose(out.grad_sum["w"], expected["w"], rtol=1e-5, atol=1e-6)
    flat = clipped_grad(lambda p, e: 0.0 * jnp.sum(p["w"]), bound=Normalized(2.0))(*case)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(flat.grad_sum))


def test_groups_are_clipped_apart_and_max_norm_is_their_root_sum_of_squares(case):
    params, batch, _ = case
    bound = PerGroup({"b": 0.3, "i": 0.0, "w": 0.4})
    one = jnp.arange(ROWS) == 2
    out = clipped_grad(loss, bound=bound)(params, batch, one)
    assert np.linalg.norm(out.grad_sum["b"]) == pytest.approx(0.3, rel=1e-5)
    assert np.linalg.norm(out.grad_sum["w"]) == pytest.approx(0.4, rel=1e-5)
    assert bound.max_norm == pytest.approx(0.5)


@pytest.mark.parametrize("garbage", [jnp.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (jnp.inf, 1e30))])
def test_bad_rows_and_padding_give_the_bits_of_the_batch_without_them(case, garbage):
    params, (x, y), mask = case
    clipped = jax.jit(clipped_grad(loss, 0.7, "materialize"))
    out = clipped(params, (x.at[1].set(0).at[1].set(garbage), y.at[1].set(garbage).at[5].set(garbage)), mask)
    without = clipped(params, (x, y), mask.at[1].set(False))
    assert jax.tree.all(jax.tree.map(np.array_equal, out.grad_sum, without.grad_sum))
    assert list(np.flatnonzero(~out.finite)) == [1]


def test_grouped_convolution_does_not_carry_nan_to_other_rows():
    weight = jax.random.normal(jax.random.key(0), (3, 1, 8))
    images = jax.random.normal(jax.random.key(1), (6, 9, 8))

    def conv_loss(w, x):
        out = jax.lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=8
        )
        return jnp.sum(jnp.sin(out))

    clipped = jax.jit(clipped_grad(conv_loss, 1.0, "materialize"))
    mask = jnp.ones(6, bool)
    out = clipped(weight, images.at[2, 3].set(jnp.nan), mask)
    np.testing.assert_array_equal(out.grad_sum, clipped(weight, images, mask.at[2].set(False)).grad_sum)
    assert list(np.flatnonzero(~out.finite)) == [2]


@pytest.mark.parametrize("method", ["auto", "ghost", "materialize"])
def test_batches_without_any_good_row_give_zero(case, method):
    """No good row is there to stand in for the bad ones, so what they hold is selected away, not multiplied by zero."""
    params, (x, y), mask = case
    clipped = jax.jit(clipped_grad(loss, method=method))
    for out in (
        clipped(params, (x * jnp.nan, y), mask),
        clipped(params, (x, y), mask & False),
        clipped(params, (x * jnp.nan, y), mask & False),
    ):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(out.grad_sum))
        assert not out.norms.any()


def test_frozen_leaves_have_no_gradient_and_no_share_in_the_norm(case):
    params, batch, mask = case
    out = clipped_grad(loss, 1e9, trainable={"b": False, "i": True, "w": True})(params, batch, mask)
    assert out.grad_sum["b"] is None
    assert out.norms[0] == pytest.approx(
        np.linalg.norm(jax.grad(lambda w: loss(params | {"w": w}, (batch[0][0], batch[1][0])))(params["w"])), rel=1e-5
    )


def test_keys_and_auxiliary_outputs_are_per_example(case):
    params, batch, mask = case
    keys = jax.random.split(jax.random.key(3), ROWS)

    def noisy(p, example, key):
        return loss(p, example) * jax.random.uniform(key), {"u": jax.random.uniform(key)}

    out = clipped_grad(noisy, has_aux=True)(params, batch, mask, keys)
    expected = jnp.where(mask, jax.vmap(jax.random.uniform)(keys), 0)
    np.testing.assert_array_equal(out.aux["u"], expected)


def test_low_precision_parameters_are_summed_in_float32(case):
    params, batch, mask = case
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, params)
    out = clipped_grad(loss)(low, batch, mask)
    assert out.grad_sum["w"].dtype == out.norms.dtype == jnp.float32


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_under_shard_map_each_device_sums_its_own_rows_without_collectives(case, check_vma):
    params, batch, mask = case
    assert jax.device_count() >= 4
    clipped = clipped_grad(loss, 0.8)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    @jax.jit
    def sharded(params, batch, mask):
        def local(params, batch, mask):
            out = clipped(params, batch, mask)
            return jax.tree.map(lambda x: x[None], out.grad_sum), out.norms

        spec = (P(), P("data"), P("data"))
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(P("data"), P("data")), check_vma=check_vma)(
            params, batch, mask
        )

    sums, norms = sharded(params, batch, mask)
    out = clipped(params, batch, mask)
    np.testing.assert_allclose(norms, out.norms, rtol=1e-6)
    np.testing.assert_allclose(sums["w"].sum(0), out.grad_sum["w"], rtol=1e-5, atol=1e-6)
    assert "all-reduce" not in sharded.lower(params, batch, mask).compile().as_text()


def test_wrong_input_is_refused_with_the_remedy(case):
    params, batch, mask = case
    with pytest.raises(InputError, match="one float scalar"):
        clipped_grad(lambda p, e: p["w"])(params, batch, mask)
    with pytest.raises(InputError, match="same leading axis"):
        clipped_grad(loss)(params, batch, mask[:4])
    with pytest.raises(InputError, match="choose one of"):
        clipped_grad(loss, method="fast")
    with pytest.raises(InputError, match="no parameter is trainable"):
        clipped_grad(loss, trainable=False)(params, batch, mask)
    with pytest.raises(InputError, match="prefix"):
        clipped_grad(loss, bound=PerGroup({"a": 1.0}))(params, batch, mask)
    for make in (lambda: Flat(-1.0), lambda: Flat(float("nan")), lambda: Normalized(1.0, gamma=0.0)):
        with pytest.raises(InputError):
            make()


NESTED = {"encoder": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}, "head": {"bias": jnp.zeros(1)}}


def test_a_leaf_belongs_to_the_first_pattern_that_matches_its_path():
    assert PerPattern((("*/bias", 0.3), ("encoder/*", 0.4))).groups(NESTED) == [0, 1, 0]
    assert PerPattern((("encoder/*", 0.3), ("*", 0.4))).groups(NESTED) == [0, 0, 1]
    assert PerPattern((("encoder/*", 0.3), ("*", 0.4))).max_norm == pytest.approx(0.5)


def test_each_group_of_a_pattern_is_clipped_to_its_own_norm():
    def loss(params, example):
        return sum(jnp.sum(leaf) * example for leaf in jax.tree.leaves(params))

    bound = PerPattern((("*/bias", 0.3), ("*", 0.4)))
    out = clipped_grad(loss, bound=bound, method="materialize")(NESTED, jnp.array([5.0]), jnp.array([True]))
    encoder, head = out.grad_sum["encoder"], out.grad_sum["head"]
    np.testing.assert_allclose(jnp.linalg.norm(jnp.concatenate([encoder["bias"], head["bias"]])), 0.3, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(encoder["kernel"]), 0.4, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        ((("encoder/*", 1.0),), "matches head/bias"),
        ((("*", 1.0), ("head/*", 1.0)), r"head/\*: no parameter is left"),
        ((), "no clip groups"),
        ((("*", -1.0),), "clip_norm=-1"),
    ],
)
def test_patterns_that_leave_a_parameter_or_a_norm_out_are_refused(groups, part):
    with pytest.raises(InputError, match=part):
        PerPattern(groups).groups(NESTED)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
@pytest.mark.parametrize("frozen", ["a", "b", "c", "bc", "ac"])
def test_groups_of_frozen_parameters_have_no_part(method, frozen):
    limits = {"a": 0.1, "b": 0.2, "c": 0.3}
    params = {name: jnp.ones((2, 2)) for name in limits}
    trainable = {name: name not in frozen for name in limits}

    def deep(p, x):
        return jnp.sum(x @ p["a"] @ p["b"] @ p["c"])

    step = clipped_grad(deep, bound=PerGroup(limits), method=method, trainable=trainable)
    sums = step(params, jnp.ones((1, 2)), jnp.ones(1, bool)).grad_sum
    for name, limit in limits.items():
        if trainable[name]:
            assert float(jnp.linalg.norm(sums[name])) == pytest.approx(limit, rel=1e-5)
        else:
            assert sums[name] is None
