"""Laws of pre-trained weights: a file of each true format gives the reference's outputs, every tensor accounted for.

The golden logits are the reference implementations' own: benchmarks/peers/models_reference.py and models_objax.py say
how they were made. No weights are stored: the same integer formula fills the files here.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from dpscale.errors import InputError
from dpscale.models import build_model
from dpscale.models.leaves import as_tree, named
from dpscale.models.pretrained import digest, load_pretrained

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
VIT = {"width": 32, "depth": 2, "heads": 2, "patch_size": 16, "class_token": True}
RESNET = {"stages": [1, 1, 1, 1]}
TEXT = {"width": 32, "depth": 2, "heads": 2, "context": 12, "vocabulary": 23}
BERT = {**TEXT, "mlp_width": 48}
OBJAX = {"version": 2, "objax_strides": True}
BIT = {"stages": [2, 1], "bottleneck": True, "version": 2, "weight_standardization": True}
# golden name -> (format, model, options, image side)
MODELS = {
    "hf_vit": ("hugging_face", "vit", VIT, 32),
    "hf_bert": ("hugging_face", "bert", BERT, 0),
    "hf_gpt2": ("hugging_face", "gpt", TEXT, 0),
    "timm_vit": ("timm", "vit", VIT, 32),
    "timm_resnet_basic": ("timm", "resnet", RESNET, 64),
    "timm_resnet_bottleneck": ("timm", "resnet", {**RESNET, "bottleneck": True}, 64),
    "npz_vit": ("augreg", "vit", VIT, 32),
    "npz_bit": ("bit", "resnet", BIT, 32),
    "objax_basic": ("objax", "resnet", {**OBJAX, "stages": [1, 2, 1, 1]}, 64),
    "objax_bottleneck": ("objax", "resnet", {**OBJAX, **RESNET, "bottleneck": True}, 64),
}


def weight(leaf, shape):
    """As in benchmarks/peers/models_reference.py."""
    index = np.arange(math.prod(shape), dtype=np.int64)
    values = ((index * 7919 + leaf * 104_729 + index // 13) % 1009 - 504) / 1680.0
    return values.reshape(shape).astype(np.float32)


def tensors_of(name):
    shapes = GOLDEN[name]["shapes"]
    return {tensor: weight(leaf, tuple(shapes[tensor])) for leaf, tensor in enumerate(sorted(shapes))}


def write(folder, name, tensors=None):
    """The golden model's file, in its own format."""
    tensors, format = tensors_of(name) if tensors is None else tensors, MODELS[name][0]
    if format in ("hugging_face", "timm"):
        save_file(tensors, folder / "model.safetensors")
        return folder / "model.safetensors"
    path = folder / "weights.npz"
    if format == "objax":
        names = np.array(list(tensors))
        np.savez(path, names=names, **{str(i): x for i, x in enumerate(tensors.values())})
    else:
        np.savez(path, **tensors)
    return path


def example_of(side):
    if side:
        return 3 * weight(1000, (side, side, 3))
    ids = ((np.arange(9) * 7 + 3) % 22 + 1).astype(np.int32)
    ids[-2:] = 0
    return ids


def empty(name, side, classes=5, **options):
    """(module, its parameters as zeros)."""
    module = build_model(name, classes, **options)
    example = example_of(side)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(example.shape, example.dtype))["params"]
    return module, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def logits_of(module, params, example):
    apply = jax.jit(lambda p, x: module.apply({"params": p}, x), compiler_options={"xla_backend_optimization_level": 0})
    return np.asarray(apply(params, example))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_file_of_the_true_format_gives_the_references_logits(name, tmp_path):
    format, model, options, side = MODELS[name]
    module, params = empty(model, side, **options)
    path = write(tmp_path, name)
    params, origin = load_pretrained(params, path)
    assert (origin.format, origin.file, origin.initial, origin.adapted) == (format, path.name, {}, {})
    assert set(origin.loaded) == set(named(params))
    expected = np.array(GOLDEN[name]["logits"])
    found = logits_of(module, params, example_of(side))
    found = found[: len(expected)] if model == "gpt" else found
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("name", "prefix", "unused"),
    [("hf_vit", "vit.", {"pooler.dense.weight"}), ("hf_bert", "bert.", set()), ("hf_gpt2", "transformer.", set())],
)
def test_a_hugging_face_file_of_the_bare_model_is_known_too(name, prefix, unused, tmp_path):
    """Saved without a task's head, as google/vit-base-patch16-224-in21k is: no prefix, and a pooler."""
    tensors = {tensor.removeprefix(prefix): x for tensor, x in tensors_of(name).items() if tensor[:4] != "clas"}
    tensors |= dict.fromkeys(unused, np.ones((32, 32), np.float32))
    _, model, options, side = MODELS[name]
    params, origin = load_pretrained(empty(model, side, **options)[1], write(tmp_path, name, tensors))
    assert origin.format == "hugging_face"
    assert set(origin.initial) == ({"head/kernel", "head/bias"} if model != "gpt" else set())
    assert unused <= set(origin.unused)
    whole, _ = load_pretrained(params, write(tmp_path, name))
    for leaf in origin.loaded:
        np.testing.assert_array_equal(named(params)[leaf], named(whole)[leaf])


def test_a_wide_resnet_gives_the_logits_of_de_et_als_model():
    module, params = empty("wrn", 32, depth=16, width=1)
    leaves = tensors_of("wrn")
    assert {name: leaf.shape for name, leaf in leaves.items()} == {n: x.shape for n, x in named(params).items()}
    found = logits_of(module, as_tree(leaves), example_of(32))
    np.testing.assert_allclose(found, GOLDEN["wrn"]["logits"], atol=1e-4)


def test_blocks_go_into_a_scanned_stack(tmp_path):
    path = write(tmp_path, "timm_vit")
    (_, params), (_, stacked) = empty("vit", 32, **VIT), empty("vit", 32, **VIT, scan=True)
    numbered, _ = load_pretrained(params, path)
    stacked, _ = load_pretrained(stacked, path)
    for i in range(2):
        kernel = stacked["blocks"]["attention"]["key"]["kernel"][i]
        np.testing.assert_array_equal(kernel, numbered[f"blocks_{i}"]["attention"]["key"]["kernel"])


def test_a_head_for_other_classes_keeps_its_initial_values_and_positions_are_interpolated(tmp_path):
    path = write(tmp_path, "npz_vit")
    _, params = empty("vit", 64, classes=7, **VIT)  # 16 patches where the file has 4
    params["head"]["kernel"] += 0.25
    loaded, origin = load_pretrained(params, path)
    np.testing.assert_array_equal(loaded["head"]["kernel"], params["head"]["kernel"])
    assert set(origin.initial) == {"head/kernel", "head/bias"}
    assert origin.adapted == {"positions": "interpolated from 2 x 2 to 4 x 4 patches"}
    old = tensors_of("npz_vit")["Transformer/posembed_input/pos_embedding"][0]
    np.testing.assert_array_equal(loaded["positions"][0], old[0])  # the class token's
    new = np.asarray(loaded["positions"][1:]).reshape(4, 4, -1)
    assert new.std() > 0
    np.testing.assert_allclose(new.mean((0, 1)), old[1:].mean(0), atol=0.02)
    assert any("positions: interpolated" in line for line in origin.lines())


def test_a_text_models_positions_are_cut_and_what_is_for_pre_training_is_named(tmp_path):
    tensors = tensors_of("hf_bert") | {"cls.predictions.bias": np.zeros(23, np.float32)}
    for name in ("classifier.weight", "classifier.bias"):
        del tensors[name]
    _, params = empty("bert", 0, classes=2, **{**BERT, "context": 9})
    loaded, origin = load_pretrained(params, write(tmp_path, "hf_bert", tensors))
    np.testing.assert_array_equal(loaded["positions"], tensors["bert.embeddings.position_embeddings.weight"][:9])
    assert origin.unused == ("cls.predictions.bias",)
    assert set(origin.initial) == {"head/kernel", "head/bias"}


@pytest.mark.parametrize(
    ("change", "options", "pattern"),
    [
        (lambda t: t.pop("blocks.1.attn.proj.weight"), {}, "that the file lacks: blocks_1/attention/out/kernel"),
        (lambda t: t.update({"blocks.0.extra.weight": np.ones(3, np.float32)}), {}, "blocks.0.extra.weight"),
        (lambda t: None, {"depth": 1}, "has no place for: blocks_1/attention"),
        (lambda t: None, {"width": 16}, "other shapes: .*32.* in the file and .*16"),
        (lambda t: None, {"class_token": False}, "class_token .cls_token."),
        (lambda t: None, {"patch_size": 8}, "patch_embedding/kernel is .768, 32. in the file and .192, 32."),
    ],
)
def test_weights_of_another_architecture_are_refused_by_name(change, options, pattern, tmp_path):
    tensors = tensors_of("timm_vit")
    change(tensors)
    _, params = empty("vit", 32, **{**VIT, **options})
    with pytest.raises(InputError, match=pattern):
        load_pretrained(params, write(tmp_path, "timm_vit", tensors))


def test_files_that_are_no_weights_are_refused(tmp_path):
    _, params = empty("vit", 32, **VIT)
    (tmp_path / "torch.bin").write_bytes(b"pickle")
    (tmp_path / "cut.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "folder").mkdir()
    for name, pattern in [
        ("torch.bin", "pickle .* is code"),
        ("cut.safetensors", "no whole safetensors file"),
        ("cut.npz", "cannot be read as weights"),
        ("other.npz", "no weights of a known format .its tensors are a"),
        ("folder", "holds neither"),
        ("nothing", "does not exist"),
    ]:
        with pytest.raises(InputError, match=pattern):
            load_pretrained(params, tmp_path / name)


def test_a_release_and_an_orbax_checkpoint_are_read_by_their_leaf_names(tmp_path):
    _, params = empty("vit", 32, **VIT)
    filled = as_tree({name: weight(i, x.shape) for i, (name, x) in enumerate(named(params).items())})
    release = tmp_path / "release"
    release.mkdir()
    save_file(named(filled), release / "weights.safetensors")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "orbax", args=ocp.args.StandardSave({"step": np.int32(3), "params": filled}))
    for place, format in (("release", "dpscale"), ("orbax", "orbax")):
        loaded, origin = load_pretrained(params, tmp_path / place)
        assert origin.format == format
        for name, leaf in named(loaded).items():
            np.testing.assert_array_equal(leaf, named(filled)[name])


def test_a_checkpoint_without_the_frozen_weights_asks_for_the_release(tmp_path):
    _, params = empty("vit", 32, **VIT)
    trained = as_tree({name: leaf for name, leaf in named(params).items() if name.startswith("head")})
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "7", args=ocp.args.StandardSave({"step": np.int32(7), "params": trained}))
    with pytest.raises(
        InputError, match=r"leaves of the model that the file lacks(?s:.*)the folder that dpscale release"
    ):
        load_pretrained(params, tmp_path / "7")


def test_the_statement_names_the_file_and_its_digest_and_no_folder(tmp_path):
    path = write(tmp_path, "timm_vit")
    _, params = empty("vit", 32, **VIT)
    origin = load_pretrained(params, path)[1]
    assert path.name in origin.statement()
    assert digest(path) in origin.statement()
    assert str(tmp_path) not in origin.statement()
    before = digest(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert digest(path) != before
