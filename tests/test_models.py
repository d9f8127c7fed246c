"""Laws of the models: no operation reaches across examples, any flax module becomes (params, apply)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from dpscale.errors import InputError
from dpscale.losses import classification_loss
from dpscale.models import as_functional, build_model, model_names, registry
from dpscale.models.functional import seed_key

SHAPE = (14, 14, 1)
EXAMPLE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
# Small versions of every model, dropout included.
SMALL = {
    "mlp": {"widths": [8], "dropout": 0.2},
    "cnn": {"channels": [4, 4], "width": 8},
    "cnn_groupnorm": {"channels": [4, 8], "groups": 2},
    "vit": {"width": 8, "depth": 1, "heads": 2, "patch_size": 7, "dropout": 0.2},
}
KEY = seed_key(7)


def _slow_ones_marked():
    return [pytest.param(name, marks=pytest.mark.slow) if name == "vit" else name for name in sorted(SMALL)]


@pytest.fixture(scope="module", params=_slow_ones_marked())
def model(request):
    return as_functional(build_model(request.param, 10, **SMALL[request.param]), EXAMPLE)


class LinenUser(linen.Module):
    """A user's module in flax's older convention, with a batch axis."""

    @linen.compact
    def __call__(self, x, deterministic: bool = True):
        x = x.reshape((x.shape[0], -1))
        x = linen.Dropout(0.5, deterministic=deterministic)(linen.Dense(8)(x))
        return linen.Dense(10)(x)


class NnxUser(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(196 if i == 0 else 8, 8, rngs=rngs) for i in range(11)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(-1)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(self.dropout(x))


def images(count, seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def test_every_registered_model_is_tested_here():
    assert set(SMALL) <= set(model_names())
    assert {name for name in model_names() if registry._REGISTRY[name].__module__ != __name__} == set(SMALL)


@pytest.mark.parametrize(
    ("name", "options", "shape", "count"),
    [
        # 8*8*1*16+16 + 4*4*16*32+32 + 512*32+32 + 32*10+10
        ("cnn", {}, (28, 28, 1), 26_010),
        ("mlp", {}, (28, 28, 1), 784 * 256 + 256 + 256 * 256 + 256 + 2570),
        ("mlp", {"widths": []}, (28, 28, 1), 7850),
        # three convolutions with bias, scale and bias of each GroupNorm, dense
        ("cnn_groupnorm", {}, (28, 28, 1), 320 + 64 + 18_496 + 128 + 73_856 + 256 + 1290),
        # patches, positions, blocks of (two norms, attention, two dense), norm, head
        (
            "vit",
            {"width": 8, "depth": 2, "heads": 2},
            (28, 28, 1),
            (16 * 8 + 8) + 49 * 8 + 2 * (32 + 4 * 72 + 8 * 32 + 32 + 32 * 8 + 8) + 16 + 90,
        ),
    ],
)
def test_parameter_counts(name, options, shape, count):
    module = build_model(name, 10, **options)
    variables = jax.eval_shape(module.init, KEY, jnp.zeros(shape))
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_an_examples_gradient_does_not_change_when_the_others_do(model):
    loss = classification_loss(model.apply)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    keys = jax.random.split(KEY, 4)
    first = images(4)
    labels = jnp.arange(4)
    before = gradients(model.params, {"features": first, "label": labels}, keys)
    other = images(4, seed=1) * 100
    other[2] = first[2]
    after = gradients(model.params, {"features": other, "label": labels.at[0].set(9)}, keys)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a[2], b[2])
        assert not np.array_equal(a[0], b[0])


def test_a_hand_made_batch_gives_what_mapping_gives(model, request):
    name = request.node.callspec.params["model"]
    options = {**SMALL[name], "example_ndim": 3} if name == "mlp" else SMALL[name]
    module = build_model(name, 10, **options) if name != "mlp" else registry._REGISTRY["mlp"](10, (8,), example_ndim=3)
    batch = images(3)
    together = jax.jit(module.apply)({"params": model.params}, batch)
    mapped = jax.jit(jax.vmap(lambda x: model.apply(model.params, x, None)))(batch)
    assert together.shape == mapped.shape == (3, 10)
    np.testing.assert_allclose(together, mapped, rtol=1e-4, atol=1e-5)


def test_low_precision_changes_the_computation_and_not_the_parameters():
    half = as_functional(build_model("mlp", 10, compute_dtype="bfloat16", widths=[8]), EXAMPLE)
    full = as_functional(build_model("mlp", 10, widths=[8]), EXAMPLE)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.float32)}
    x = images(1)[0]
    a, b = half.apply(half.params, x, None), full.apply(full.params, x, None)
    assert a.dtype == jnp.float32
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.1)  # 8 bits of mantissa on logits of order 1


def test_initial_weights_follow_all_64_bits_of_the_seed_alone():
    words = [tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in (5, 6, 5 + 2**32, 2**63 - 1)]
    assert words == [(0, 5), (0, 6), (1, 5), (2**31 - 1, 2**32 - 1)]

    def weights(seed):
        functional = as_functional(build_model("mlp", 3, widths=[]), EXAMPLE, seed=seed)
        return functional.params["Dense_0"]["kernel"]

    first = weights(5)
    np.testing.assert_array_equal(first, weights(5))
    assert not np.array_equal(first, weights(5 + 2**32))


@pytest.mark.parametrize(
    ("module", "options"), [(LinenUser(), {"batch_axis": True}), (NnxUser, {}), (NnxUser(nnx.Rngs(0)), {})]
)
def test_a_users_module_trains_with_the_key_and_evaluates_without(module, options):
    functional = as_functional(module, EXAMPLE, **options)
    apply = jax.jit(functional.apply)
    x = images(1)[0]
    evaluated = apply(functional.params, x, None)
    assert evaluated.shape == (10,)
    np.testing.assert_array_equal(evaluated, apply(functional.params, x, None))
    one, two = jax.random.split(KEY)
    trained = apply(functional.params, x, one)
    np.testing.assert_array_equal(trained, apply(functional.params, x, one))
    assert not np.array_equal(trained, apply(functional.params, x, two))
    gradients = jax.jit(jax.grad(classification_loss(functional.apply)))(
        functional.params, {"features": x, "label": 1}, KEY
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(functional.params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_nnx_parameters_are_nested_dicts_of_strings_that_reach_their_own_layer():
    functional = as_functional(NnxUser, EXAMPLE)
    # "10" sorts before "2": each must still go to its own block.
    assert sorted(functional.params["blocks"], key=int) == [str(i) for i in range(11)]
    module = NnxUser(nnx.Rngs(seed_key(0)))
    module.eval()
    x = images(1)[0]
    np.testing.assert_allclose(functional.apply(functional.params, x, None), module(x), rtol=1e-5, atol=1e-6)
    changed = {**functional.params, "head": jax.tree.map(jnp.zeros_like, functional.params["head"])}
    assert not functional.apply(changed, x, None).any()


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        return linen.Dense(10)(linen.BatchNorm(use_running_average=not train)(x.reshape(-1)))


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(196, rngs=rngs)
        self.blocks = nnx.List([nnx.BatchNorm(196, rngs=rngs)])

    def __call__(self, x):
        return self.norm(x.reshape(-1))


@pytest.mark.parametrize("module", [LinenBatchNorm(), NnxBatchNorm, NnxBatchNorm(nnx.Rngs(0))])
def test_batch_norm_is_refused_with_a_message_that_names_group_norm(module):
    with pytest.raises(InputError, match="GroupNorm"):
        as_functional(module, EXAMPLE)


@pytest.mark.parametrize(
    ("name", "num_classes", "options", "pattern"),
    [
        ("cn", 10, {}, "did you mean cnn"),
        ("resnet", 10, {}, "the models are cnn, cnn_groupnorm, mlp"),
        ("vit", 10, {"deph": 3}, "model.deph is not an option of vit .did you mean depth"),
        ("vit", 10, {"depth": "three"}, "must be of type int"),
        ("vit", 10, {"depth": True}, "must be of type int"),
        ("vit", 10, {"depth": 0}, "at least 1"),
        ("vit", 10, {"dropout": 1.0}, "at least 0 and below 1"),
        ("mlp", 10, {"widths": 3}, "must be a list"),
        ("mlp", 10, {"widths": [3, -1]}, "at least 1"),
        ("mlp", 10, {"example_ndim": 3}, "not an option"),
        ("mlp", None, {}, "set data.num_classes"),
    ],
)
def test_unknown_models_and_options_are_refused_with_the_nearest(name, num_classes, options, pattern):
    with pytest.raises(InputError, match=pattern):
        build_model(name, num_classes, **options)


@pytest.mark.parametrize(
    ("name", "options", "shape", "pattern"),
    [
        ("cnn", {}, (784,), "takes images"),
        ("cnn", {}, (8, 8, 1), "at least 14 x 14"),
        ("cnn", {"channels": [4]}, (28, 28, 1), "must be two numbers"),
        ("cnn_groupnorm", {"groups": 5}, (28, 28, 1), "must divide every one"),
        ("vit", {"patch_size": 5}, (28, 28, 1), "must divide the image"),
        ("vit", {"heads": 5}, (28, 28, 1), "multiple of model.heads"),
        ("vit", {}, (28, 28), "takes images"),
    ],
)
def test_features_that_do_not_fit_the_model_are_refused(name, options, shape, pattern):
    with pytest.raises(InputError, match=pattern):
        as_functional(build_model(name, 10, **options), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_what_is_no_flax_module_is_refused():
    with pytest.raises(InputError, match="type int is not a flax module"):
        as_functional(3, EXAMPLE)
    with pytest.raises(InputError, match="not a flax module"):
        as_functional(lambda rngs: "model", EXAMPLE)
