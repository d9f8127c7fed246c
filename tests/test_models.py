"""Laws of the models: no operation reaches across examples, any flax module becomes (params, apply)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from dpscale.clipping import clipped_grad
from dpscale.errors import InputError
from dpscale.losses import classification_loss, language_model_loss
from dpscale.models import as_functional, build_model, model_names, registry
from dpscale.models.activations import activation
from dpscale.models.functional import seed_key
from dpscale.models.scattering import scattering, scattering_features

model_names()  # registers the models of every file
SHAPE = (14, 14, 1)
EXAMPLE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
# Small versions of every model, dropout included.
SMALL = {
    "mlp": {"widths": [8], "dropout": 0.2},
    "cnn": {"channels": [4, 4], "width": 8},
    "cnn_groupnorm": {"channels": [4, 8], "groups": 2},
    "vit": {"width": 8, "depth": 1, "heads": 2, "patch_size": 7, "dropout": 0.2, "class_token": True},
    "resnet": {"stages": [1, 1], "channels": 4, "groups": 2, "version": 2, "weight_standardization": True},
    "wrn": {"depth": 10, "width": 1, "groups": 4},
    "scattering": {"angles": 2, "groups": 3},
    "bert": {"width": 8, "depth": 1, "heads": 2, "mlp_width": 16, "vocabulary": 20, "context": 9, "dropout": 0.2},
    "gpt": {"width": 8, "depth": 1, "heads": 2, "context": 9, "dropout": 0.2},
}
TEXT = {"bert", "gpt"}
LENGTH = 7  # tokens of a text
SLOW = {"vit", "resnet", "wrn", "bert", "gpt"}
KEY = seed_key(7)


def _slow_ones_marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(names)]


def small_model(name, **options):
    example = jax.ShapeDtypeStruct((LENGTH,), jnp.int32) if name in TEXT else EXAMPLE
    return as_functional(build_model(name, 10, **{**SMALL[name], **options}), example)


def features_of(name, count, seed=0):
    """Images, or token ids whose last two are padding (0)."""
    if name not in TEXT:
        return images(count, seed)
    ids = np.random.default_rng(seed).integers(1, 10, (count, LENGTH), np.int32)
    ids[:, -2:] = 0
    return ids


def labels_of(name, count):
    return jnp.arange(count)[:, None] * jnp.ones(LENGTH, jnp.int32) if name == "gpt" else jnp.arange(count)


def loss_of(name, apply):
    return language_model_loss(apply) if name == "gpt" else classification_loss(apply)


@pytest.fixture(scope="module")
def small_models():
    """Each small model once, when it is first asked for."""
    return functools.lru_cache(small_model)


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


def quick_jit(function):
    """Compiled without optimising, which for a test would take longer than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def images(count, seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def test_every_registered_model_is_tested_here():
    assert set(SMALL) <= set(model_names())
    assert set(registry._REGISTRY) == set(SMALL)
    assert {model for model, _ in registry._PRESETS.values()} <= set(SMALL)
    assert not set(registry._PRESETS) & set(SMALL)


@pytest.mark.parametrize(
    ("name", "options", "shape", "count"),
    [
        # 8*8*1*16+16 + 4*4*16*32+32 + 512*32+32 + 32*10+10
        ("cnn", {}, (28, 28, 1), 26_010),
        ("mlp", {}, (28, 28, 1), 784 * 256 + 256 + 256 * 256 + 256 + 2570),
        ("mlp", {"widths": []}, (28, 28, 1), 7850),
        # three convolutions with bias, scale and bias of each GroupNorm, dense
        ("cnn_groupnorm", {}, (28, 28, 1), 320 + 64 + 18_496 + 128 + 73_856 + 256 + 1290),
        # 81 channels of 7 x 7
        ("scattering", {}, (28, 28, 1), (81 * 49 + 1) * 10),
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
    assert parameter_count(build_model(name, 10, **options), jnp.zeros(shape)) == count


def parameter_count(module, example):
    variables = jax.eval_shape(module.init, KEY, example)
    assert set(variables) == {"params"}
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


# timm 1.0.31 (1000 classes, 224 pixels; resnet18 and 34 with norm_layer="groupnorm"), transformers 5.23.0 (BERT with
# two labels, GPT-2): benchmarks/peers/models_reference.py. WRN: 10 classes, 32 pixels.
PUBLISHED = {
    "vit_tiny16": 5_717_416,
    "vit_small16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "bit_resnet50": 25_549_352,
    "wrn16_4": 2_753_818,
    "wrn40_4": 8_961_306,
    "bert_base": 109_483_778,
    "gpt2_small": 124_439_808,
}


@pytest.mark.parametrize("name", sorted(registry._PRESETS))
def test_presets_have_the_published_number_of_parameters(name):
    classes = {"bert_base": 2, "gpt2_small": None, "wrn16_4": 10, "wrn40_4": 10}.get(name, 1000)
    side = 32 if name.startswith("wrn") else 224
    text = name in ("bert_base", "gpt2_small")
    example = jnp.zeros(128, jnp.int32) if text else jnp.zeros((side, side, 3))
    assert parameter_count(build_model(name, classes), example) == PUBLISHED[name]


def test_a_presets_options_can_be_overridden():
    small, large = build_model("vit_b16", 10), build_model("vit_b16", 10, depth=3, scan=True)
    assert (small.depth, large.depth, large.width, large.scan) == (12, 3, 768, True)


@pytest.mark.parametrize("name", _slow_ones_marked(set(SMALL) - {"mlp", "cnn", "cnn_groupnorm"}))
def test_clipping_takes_fast_routes_and_equals_the_reference(name, small_models):
    functional = small_models(name)
    batch = {"features": features_of(name, 3), "label": labels_of(name, 3)}
    mask, keys = jnp.array([True, True, False]), jax.random.split(KEY, 3)
    fast, slow = (clipped_grad(loss_of(name, functional.apply), 0.1, method) for method in ("auto", "materialize"))
    # Kernels and embeddings are never materialised; what is has the size of a few activations.
    routes = {layer.name: layer.route for layer in fast.explain(functional.params, batch, keys).layers}
    written = {leaf for leaf, route in routes.items() if route == "materialised"}
    assert not [leaf for leaf in written if leaf.endswith(("['kernel']", "['embedding']"))]
    ours, reference = quick_jit(lambda p: [f(p, batch, mask, keys) for f in (fast, slow)])(functional.params)
    np.testing.assert_allclose(ours.norms, reference.norms, rtol=1e-4)
    assert np.all(ours.norms[:2] > 0.1)
    for a, b in zip(jax.tree.leaves(ours.grad_sum), jax.tree.leaves(reference.grad_sum), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt"])
def test_scan_and_remat_change_nothing_but_where_the_parameters_lie(name):
    plain = small_model(name, depth=2, dropout=0.0)
    stacked = small_model(name, depth=2, dropout=0.0, scan=True, remat=True)
    blocks = [plain.params[f"blocks_{i}"] for i in range(2)]
    rest = {key: value for key, value in plain.params.items() if not key.startswith("blocks_")}
    params = {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, stacked.params)
    x, label = features_of(name, 1)[0], labels_of(name, 3)[2]

    def gradient(functional, p):
        return jax.grad(loss_of(name, functional.apply))(p, {"features": x, "label": label}, None)

    ours, theirs = quick_jit(lambda p, q: (gradient(plain, p), gradient(stacked, q)))(plain.params, params)
    np.testing.assert_allclose(ours["positions"], theirs["positions"], rtol=1e-4, atol=1e-7)
    for i in range(2):
        one = ours[f"blocks_{i}"]["attention"]["query"]["kernel"]
        np.testing.assert_allclose(one, theirs["blocks"]["attention"]["query"]["kernel"][i], rtol=1e-3, atol=1e-7)


def test_a_decoder_sees_nothing_that_comes_later(small_models):
    functional = small_models("gpt")
    ids = features_of("gpt", 1)[0]
    changed = ids.copy()
    changed[4] += 1
    apply = quick_jit(lambda x: functional.apply(functional.params, x, None))
    before, after = apply(ids), apply(changed)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert not np.allclose(before[4:], after[4:])


def test_bert_does_not_look_at_padding_and_takes_masks_and_types(small_models):
    functional, stacked = small_models("bert"), build_model("bert", 10, **SMALL["bert"], inputs="ids_mask_types")
    ids = features_of("bert", 1)[0]
    apply = quick_jit(lambda x: functional.apply(functional.params, x, None))
    short = quick_jit(lambda x: functional.apply(functional.params, x, None))(ids[:-2])
    np.testing.assert_allclose(apply(ids), short, rtol=1e-4, atol=1e-6)
    rows = np.stack([ids, (ids != 0).astype(np.int32), np.zeros_like(ids)])
    with_rows = quick_jit(lambda x: stacked.apply({"params": functional.params}, x))
    np.testing.assert_allclose(apply(ids), with_rows(rows), rtol=1e-5, atol=1e-6)
    rows[2] = 1
    assert not np.allclose(apply(ids), with_rows(rows))


@pytest.mark.parametrize("name", ["tanh", "tempered_sigmoid(2, 2, 1)"])
def test_a_tempered_sigmoid_of_2_2_1_is_tanh(name):
    x = jnp.linspace(-4, 4, 9)
    np.testing.assert_allclose(activation(name)(x), np.tanh(x), atol=1e-6)


@pytest.mark.parametrize("name", _slow_ones_marked(["mlp", "cnn", "cnn_groupnorm", "vit"]))
def test_an_examples_gradient_does_not_change_when_the_others_do(name, small_models):
    model = small_models(name)
    gradients = quick_jit(jax.vmap(jax.grad(loss_of(name, model.apply)), (None, 0, 0)))
    keys = jax.random.split(KEY, 4)
    first = features_of(name, 4)
    labels = labels_of(name, 4)
    before = gradients(model.params, {"features": first, "label": labels}, keys)
    other = features_of(name, 4, seed=1) * (1 if name in TEXT else 100)
    other[2] = first[2]
    after = gradients(model.params, {"features": other, "label": labels.at[0].set(9)}, keys)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a[2], b[2])
        assert not np.array_equal(a[0], b[0])


@pytest.mark.parametrize("name", _slow_ones_marked(SMALL))
def test_a_hand_made_batch_gives_what_mapping_gives(name, small_models):
    model = small_models(name)
    options = {**SMALL[name], "example_ndim": 3} if name == "mlp" else SMALL[name]
    module = build_model(name, 10, **options) if name != "mlp" else registry._REGISTRY["mlp"](10, (8,), example_ndim=3)
    batch = features_of(name, 3)
    together = quick_jit(module.apply)({"params": model.params}, batch)
    mapped = quick_jit(jax.vmap(lambda x: model.apply(model.params, x, None)))(batch)
    assert together.shape == mapped.shape == ((3, LENGTH, 10) if name == "gpt" else (3, 10))
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
        ("alexnet", 10, {}, "the models are bert, bert_base, bit_resnet50, cnn, cnn_groupnorm, "),
        ("vit_b16", 10, {"deph": 3}, "not an option of vit_b16: did you mean depth"),
        ("bert_base", None, {}, "set data.num_classes"),
        ("vit", 10, {"deph": 3}, "model.deph is not an option of vit: did you mean depth"),
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
        ("cnn", {"activation": "gulu"}, (28, 28, 1), "'gulu' is unknown: choose relu"),
        ("resnet", {"version": 3}, (32, 32, 3), "must be 1 or 2"),
        ("resnet", {"objax_strides": True}, (32, 32, 3), "is for model.version=2"),
        ("resnet", {"channels": 48}, (32, 32, 3), "must divide the number of channels"),
        ("wrn", {"depth": 12}, (32, 32, 3), "must be 6 n . 4"),
        ("bert", {}, (28,), "takes int32 token ids .T., but an example is float32"),
    ],
)
def test_features_that_do_not_fit_the_model_are_refused(name, options, shape, pattern):
    with pytest.raises(InputError, match=pattern):
        as_functional(build_model(name, 10, **options), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("name", "options", "shape", "pattern"),
    [
        ("bert", {"context": 8}, (9,), "9 tokens, but model.context=8"),
        ("gpt", {"context": 8}, (9,), "9 tokens, but model.context=8"),
        ("bert", {"inputs": "ids_mask_types"}, (2, 9), "takes examples of shape .3, T."),
        ("bert", {"inputs": "text"}, (9,), "must be .ids. or"),
    ],
)
def test_token_ids_that_do_not_fit_the_model_are_refused(name, options, shape, pattern):
    with pytest.raises(InputError, match=pattern):
        as_functional(build_model(name, 10, **options), jax.ShapeDtypeStruct(shape, jnp.int32))


def test_a_decoder_needs_to_be_told_its_vocabulary():
    with pytest.raises(InputError, match=r"set model\.vocabulary"):
        as_functional(build_model("gpt", None), jax.ShapeDtypeStruct((LENGTH,), jnp.int32))


def test_what_is_no_flax_module_is_refused():
    with pytest.raises(InputError, match="type int is not a flax module"):
        as_functional(3, EXAMPLE)
    with pytest.raises(InputError, match="not a flax module"):
        as_functional(lambda rngs: "model", EXAMPLE)


def test_scattering_coefficients_are_kymatios():
    golden = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())["scattering"]
    side, expected = golden["side"], np.moveaxis(np.array(golden["coefficients"]), 0, -1)
    index = np.arange(side * side, dtype=np.int64)  # as benchmarks/peers/models_kymatio.py makes it
    image = (((index * 7919 + 1000 * 104_729 + index // 13) % 1009 - 504) / 1680.0).reshape(side, side)
    found = jax.jit(lambda x: scattering(x, golden["scales"], golden["angles"]))(image.astype(np.float32))
    assert found.shape == expected.shape == (2, 2, 19)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_head_that_starts_at_zero_gives_equal_logits():
    functional = as_functional(build_model("mlp", 10, widths=[8], zero_head=True), EXAMPLE)
    assert not np.any(functional.apply(functional.params, images(1)[0], None))
    assert np.any(functional.params["Dense_0"]["kernel"])


def test_scattering_features_are_as_long_for_a_faint_image_as_for_a_bright_one():
    image = jnp.asarray(images(1)[0])
    for x in (image, 0.5 * image, 0.4 + 0.5 * image):
        features = scattering_features(x, 2, 2, 3)
        assert features.shape == (9 * 3 * 3,)
        assert float(jnp.linalg.norm(features)) == pytest.approx(np.sqrt(features.size), rel=3e-2)
