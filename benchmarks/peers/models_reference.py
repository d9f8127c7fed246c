"""What the reference implementations say: parameter counts, and outputs for weights that a formula gives.

    .venv-peers/bin/python benchmarks/peers/models_reference.py [--out tests/golden/models.json]

Runs in an environment of its own (torch 2.13.0, timm 1.0.31, transformers 5.23.0; no jax). Each model is made small,
its weights are filled from `weight(leaf, shape)`, a formula without a random generator, and the logits for inputs
from the same formula are written as JSON together with the names and shapes of the file that they would come in.
The tests write that file again from names and shapes, load it through `model.pretrained`, and compare the logits. The
.npz models are filled from a file that timm's own loader reads, so that the mapping of names is the reference's too.
"""

# pyright: reportMissingImports=false
import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer

CLASSES, SIDE, TOKENS = 5, 32, 9
VIT: dict[str, Any] = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def weight(leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in about [-0.3, 0.3], around 1 for odd vectors so that norms keep their signal."""
    index = np.arange(math.prod(shape), dtype=np.int64)
    values = ((index * 7919 + leaf * 104_729 + index // 13) % 1009 - 504) / 1680.0
    return values.reshape(shape).astype(np.float32)


def image(side: int = SIDE) -> np.ndarray:
    """float32[side, side, 3]."""
    return 3 * weight(1000, (side, side, 3))


def tokens(vocabulary: int) -> np.ndarray:
    """int[TOKENS], the last two padding."""
    ids = (np.arange(TOKENS) * 7 + 3) % (vocabulary - 1) + 1
    ids[-2:] = 0
    return ids


def fill(model: torch.nn.Module) -> dict[str, list[int]]:
    """Fill every parameter from the formula, in the order of their sorted names; returns names and shapes."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    names = sorted(state)
    with torch.no_grad():
        for leaf, name in enumerate(names):
            state[name].copy_(torch.from_numpy(weight(leaf, tuple(state[name].shape))))
    return {name: list(state[name].shape) for name in names}


def through_file(model: Any) -> tuple[Any, dict[str, list[int]]]:
    """The model as transformers reads it back from a file in its own format whose tensors the formula filled."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        shapes = {name: tuple(value.shape) for name, value in load_file(path).items()}
        leaves = {name: torch.from_numpy(weight(leaf, shapes[name])) for leaf, name in enumerate(sorted(shapes))}
        save_file(leaves, path, metadata={"format": "pt"})
        return type(model).from_pretrained(folder), {name: list(shapes[name]) for name in sorted(shapes)}


def from_npz(model: Any, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, list[int]]:
    """Fill a timm model through its own .npz loader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        arrays: Any = {name: weight(leaf, shapes[name]) for leaf, name in enumerate(sorted(shapes))}
        np.savez(path, **arrays)
        model.load_pretrained(str(path), *([prefix] if prefix else []))
    return {name: list(shapes[name]) for name in sorted(shapes)}


def augreg_vit() -> dict[str, tuple[int, ...]]:
    """Names and shapes of an augreg ViT file (google-research/vision_transformer) of the size VIT."""
    width, heads, mlp = VIT["embed_dim"], VIT["num_heads"], 4 * VIT["embed_dim"]
    each = width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, (SIDE // 16) ** 2 + 1, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, CLASSES),
        "head/bias": (CLASSES,),
    }
    for block in range(VIT["depth"]):
        at = f"Transformer/encoderblock_{block}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{at}{norm}/scale": (width,), f"{at}{norm}/bias": (width,)}
        attention = f"{at}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}{part}/kernel": (width, heads, each), f"{attention}{part}/bias": (heads, each)}
        shapes |= {f"{attention}out/kernel": (heads, each, width), f"{attention}out/bias": (width,)}
        shapes |= {f"{at}MlpBlock_3/Dense_0/kernel": (width, mlp), f"{at}MlpBlock_3/Dense_0/bias": (mlp,)}
        shapes |= {f"{at}MlpBlock_3/Dense_1/kernel": (mlp, width), f"{at}MlpBlock_3/Dense_1/bias": (width,)}
    return shapes


BIT_STAGES, BIT_GROUPS = (2, 1), 32


def bit_resnet() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a BiT file (google-research/big_transfer) with BIT_STAGES, 64 first channels."""
    shapes: dict[str, tuple[int, ...]] = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 64)}
    channels = 64
    for stage, count in enumerate(BIT_STAGES):
        out = 256 * 2**stage
        for unit in range(count):
            at = f"resnet/block{stage + 1}/unit{unit + 1:02d}/"
            widths = [(1, channels, out // 4), (3, out // 4, out // 4), (1, out // 4, out)]
            for letter, (size, before, after) in zip("abc", widths, strict=True):
                shapes[f"{at}{letter}/standardized_conv2d/kernel"] = (size, size, before, after)
                shapes |= {f"{at}{letter}/group_norm/{part}": (before,) for part in ("gamma", "beta")}
            if unit == 0:
                shapes[f"{at}a/proj/standardized_conv2d/kernel"] = (1, 1, channels, out)
            channels = out
    shapes |= {f"resnet/group_norm/{part}": (channels,) for part in ("gamma", "beta")}
    head = "resnet/head/conv2d/"
    return shapes | {f"{head}kernel": (1, 1, channels, CLASSES), f"{head}bias": (CLASSES,)}


def logits(model: torch.nn.Module, *inputs: Any, **named: Any) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        out = model(*inputs, **named)
    return (out.logits if hasattr(out, "logits") else out)[0].numpy()


def as_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(2, 0, 1)[None].copy())


def hf_vit() -> tuple[dict[str, list[int]], np.ndarray]:
    config = transformers.ViTConfig(
        image_size=SIDE,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=CLASSES,
    )
    model, names = through_file(transformers.ViTForImageClassification(config))
    return names, logits(model, as_nchw(image()))


def hf_bert() -> tuple[dict[str, list[int]], np.ndarray]:
    config = transformers.BertConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=12,
        num_labels=CLASSES,
    )
    model, names = through_file(transformers.BertForSequenceClassification(config))
    ids = tokens(23)
    mask = torch.from_numpy((ids != 0).astype(np.int64))[None]
    return names, logits(model, input_ids=torch.from_numpy(ids)[None], attention_mask=mask)


def hf_gpt2() -> tuple[dict[str, list[int]], np.ndarray]:
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=12, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model, names = through_file(transformers.GPT2LMHeadModel(config))
    return names, logits(model, input_ids=torch.from_numpy(tokens(23))[None])[:3]


def timm_vit() -> tuple[dict[str, list[int]], np.ndarray]:
    model = VisionTransformer(**VIT, num_classes=CLASSES)
    return fill(model), logits(model, as_nchw(image()))


def timm_resnet(bottleneck: bool) -> tuple[dict[str, list[int]], np.ndarray]:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    block = Bottleneck if bottleneck else BasicBlock
    model = ResNet(block, (1, 1, 1, 1), num_classes=CLASSES, norm_layer="groupnorm")
    return fill(model), logits(model, as_nchw(image(2 * SIDE)))


def npz_vit() -> tuple[dict[str, list[int]], np.ndarray]:
    model = VisionTransformer(**VIT, num_classes=CLASSES)
    return from_npz(model, augreg_vit()), logits(model, as_nchw(image()))


def npz_bit() -> tuple[dict[str, list[int]], np.ndarray]:
    from functools import partial

    from timm.layers import GroupNormAct, StdConv2d

    model = ResNetV2(
        layers=BIT_STAGES,
        channels=(256, 512),
        num_classes=CLASSES,
        preact=True,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
        norm_layer=partial(GroupNormAct, num_groups=BIT_GROUPS),
    )
    return from_npz(model, bit_resnet(), "resnet/"), logits(model, as_nchw(image()))


MODELS: dict[str, Callable[[], tuple[dict[str, list[int]], np.ndarray]]] = {
    "hf_vit": hf_vit,
    "hf_bert": hf_bert,
    "hf_gpt2": hf_gpt2,
    "timm_vit": timm_vit,
    "timm_resnet_basic": lambda: timm_resnet(False),
    "timm_resnet_bottleneck": lambda: timm_resnet(True),
    "npz_vit": npz_vit,
    "npz_bit": npz_bit,
}


def published_counts() -> dict[str, int]:
    """Parameters of the published models, from the reference implementations, on the meta device."""
    with torch.device("meta"):
        named = {
            "vit_tiny16": timm.create_model("vit_tiny_patch16_224"),
            "vit_small16": timm.create_model("vit_small_patch16_224"),
            "vit_b16": timm.create_model("vit_base_patch16_224"),
            "vit_l16": timm.create_model("vit_large_patch16_224"),
            "resnet18": timm.create_model("resnet18", norm_layer="groupnorm"),
            "resnet34": timm.create_model("resnet34", norm_layer="groupnorm"),
            "resnet50": timm.create_model("resnet50_gn"),
            "bit_resnet50": timm.create_model("resnetv2_50x1_bit", num_classes=1000),
            "bert_base": transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2)),
            "gpt2_small": transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        }
    return {name: sum(p.numel() for p in model.parameters()) for name, model in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/models.json"))
    out = parser.parse_args().out
    golden: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    golden["counts"] = golden.get("counts", {}) | published_counts()
    for name, make in MODELS.items():
        shapes, values = make()
        golden[name] = {"shapes": shapes, "logits": np.round(values.astype(float), 6).tolist()}
        print(name, len(shapes), "tensors, logits", np.round(values.reshape(-1)[:5], 4))
    lines = [f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in sorted(golden)]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
