"""From the names and layouts of other packages' files to this package's leaves: one table of rules a format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from dpscale.errors import InputError

Tensors = dict[str, np.ndarray]
Turn = Callable[[np.ndarray], np.ndarray]


@dataclass
class Converted:
    """`leaves`: by our names. `unused`: tensors for pre-training only. `sources`: a leaf's name in the file."""

    leaves: Tensors = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


def rename(tensors: Tensors, format: str, file: str) -> Converted:
    """The file's tensors under this package's names, as float32.

    Raises: InputError for a tensor that no rule of the format covers.
    """
    converted, stranger = Converted(), []
    rules = _rules(tensors, format)
    for name in sorted(tensors):
        found = next(((match, to) for pattern, to in rules if (match := re.fullmatch(pattern, name))), None)
        if found is None:
            stranger.append(name)
            continue
        match, targets = found
        if not targets:
            converted.unused.append(name)
        for leaf, turn in targets:
            leaf = re.sub(r"<(\w+)>", lambda place, match=match: _numbered(place[1], match, tensors), leaf)
            leaf = match.expand(leaf)
            converted.leaves[leaf] = np.ascontiguousarray(turn(np.asarray(tensors[name], np.float32)))
            converted.sources[leaf] = name
    if stranger:
        raise InputError(
            f"{file}, read as {format}, holds {len(stranger)} tensors of another architecture "
            f"({', '.join(stranger[:4])}{', ..' if len(stranger) > 4 else ''}): this package has no such "
            "model, or model.pretrained_format is another"
        )
    return converted


Rules = list[tuple[str, list[tuple[str, Turn]]]]


def _as_is(x: np.ndarray) -> np.ndarray:
    return x


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1)


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _first(x: np.ndarray) -> np.ndarray:
    """[1, ..] -> [..]."""
    return x[0]


def _hwio(x: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, H, W] -> [H, W, in, out]."""
    return x.transpose(2, 3, 1, 0)


def _patches(x: np.ndarray) -> np.ndarray:
    """A patch convolution [out, in, p, p] as the dense layer [p * p * in, out] that it is."""
    return _hwio(x).reshape(-1, x.shape[0])


def _rows(x: np.ndarray) -> np.ndarray:
    """[.., out] -> [everything else, out]."""
    return x.reshape(-1, x.shape[-1])


def _heads_out(x: np.ndarray) -> np.ndarray:
    """flax's attention kernel [D, heads, each] -> [D, heads * each]."""
    return x.reshape(x.shape[0], -1)


def _third(part: int, axis: int, turn: Turn = _as_is) -> Turn:
    """One of query, key and value, which are stored as one along `axis`."""
    return lambda x: turn(np.split(x, 3, axis=axis)[part])


def _dense(theirs: str, ours: str) -> Rules:
    """PyTorch's Linear [out, in]."""
    return [(theirs + r"\.weight", [(ours + "/kernel", _transposed)]), (theirs + r"\.bias", [(ours + "/bias", _as_is)])]


def _norm(theirs: str, ours: str) -> Rules:
    scale, bias = rf"{theirs}\.(?:weight|gamma)", rf"{theirs}\.(?:bias|beta)"
    return [(scale, [(ours + "/scale", _as_is)]), (bias, [(ours + "/bias", _as_is)])]


def _hugging_face_vit() -> Rules:
    at, block, ours = r"(?:vit\.)?", r"(?:vit\.)?encoder\.layer\.(\d+)\.", r"blocks_\1/"
    rules: Rules = [
        (at + r"embeddings\.cls_token", [("class_token", _first)]),
        (at + r"embeddings\.position_embeddings", [("positions", _first)]),
        (at + r"embeddings\.patch_embeddings\.projection\.weight", [("patch_embedding/kernel", _patches)]),
        (at + r"embeddings\.patch_embeddings\.projection\.bias", [("patch_embedding/bias", _as_is)]),
        (at + r"pooler\..*", []),
    ]
    for part in ("query", "key", "value"):
        rules += _dense(rf"{block}attention\.attention\.{part}", f"{ours}attention/{part}")
    rules += _dense(rf"{block}attention\.output\.dense", f"{ours}attention/out")
    rules += _dense(rf"{block}intermediate\.dense", f"{ours}mlp_in") + _dense(
        rf"{block}output\.dense", f"{ours}mlp_out"
    )
    rules += _norm(rf"{block}layernorm_before", f"{ours}norm_attention")
    rules += _norm(rf"{block}layernorm_after", f"{ours}norm_mlp")
    return rules + _norm(at + "layernorm", "norm") + _dense("classifier", "head")


def _hugging_face_bert() -> Rules:
    at, block, ours = r"(?:bert\.)?", r"(?:bert\.)?encoder\.layer\.(\d+)\.", r"blocks_\1/"
    rules: Rules = [
        (at + r"embeddings\.word_embeddings\.weight", [("embedding/embedding", _as_is)]),
        (at + r"embeddings\.position_embeddings\.weight", [("positions", _as_is)]),
        (at + r"embeddings\.token_type_embeddings\.weight", [("types/embedding", _as_is)]),
        (at + r"embeddings\.position_ids", []),
        (r"cls\..*", []),  # the heads of pre-training
    ]
    for part in ("query", "key", "value"):
        rules += _dense(rf"{block}attention\.self\.{part}", f"{ours}attention/{part}")
    rules += _dense(rf"{block}attention\.output\.dense", f"{ours}attention/out")
    rules += _norm(rf"{block}attention\.output\.LayerNorm", f"{ours}norm_attention")
    rules += _dense(rf"{block}intermediate\.dense", f"{ours}mlp_in") + _dense(
        rf"{block}output\.dense", f"{ours}mlp_out"
    )
    rules += _norm(rf"{block}output\.LayerNorm", f"{ours}norm_mlp") + _norm(
        at + r"embeddings\.LayerNorm", "norm_embedding"
    )
    return rules + _dense(at + r"pooler\.dense", "pooler") + _dense("classifier", "head")


def _hugging_face_gpt2() -> Rules:
    at, block, ours = r"(?:transformer\.)?", r"(?:transformer\.)?h\.(\d+)\.", r"blocks_\1/"

    def conv1d(theirs: str, name: str) -> Rules:  # GPT-2 stores [in, out]
        return [(theirs + r"\.weight", [(name + "/kernel", _as_is)]), (theirs + r"\.bias", [(name + "/bias", _as_is)])]

    parts = [(f"{ours}attention/{part}", i) for i, part in enumerate(("query", "key", "value"))]
    return [
        (at + r"wte\.weight", [("embedding/embedding", _as_is)]),
        (at + r"wpe\.weight", [("positions", _as_is)]),
        (block + r"attn\.(?:bias|masked_bias)", []),  # the causal mask
        (r"lm_head\.weight", []),  # tied to the embedding
        (block + r"attn\.c_attn\.weight", [(f"{name}/kernel", _third(i, 1)) for name, i in parts]),
        (block + r"attn\.c_attn\.bias", [(f"{name}/bias", _third(i, 0)) for name, i in parts]),
        *conv1d(block + r"attn\.c_proj", f"{ours}attention/out"),
        *conv1d(block + r"mlp\.c_fc", f"{ours}mlp_in"),
        *conv1d(block + r"mlp\.c_proj", f"{ours}mlp_out"),
        *_norm(block + "ln_1", f"{ours}norm_attention"),
        *_norm(block + "ln_2", f"{ours}norm_mlp"),
        *_norm(at + "ln_f", "norm"),
    ]


def _timm_vit() -> Rules:
    block, ours = r"blocks\.(\d+)\.", r"blocks_\1/"
    parts = [(f"{ours}attention/{part}", i) for i, part in enumerate(("query", "key", "value"))]
    return [
        ("cls_token", [("class_token", _first)]),
        ("pos_embed", [("positions", _first)]),
        (r"patch_embed\.proj\.weight", [("patch_embedding/kernel", _patches)]),
        (r"patch_embed\.proj\.bias", [("patch_embedding/bias", _as_is)]),
        (block + r"attn\.qkv\.weight", [(f"{name}/kernel", _third(i, 0, _transposed)) for name, i in parts]),
        (block + r"attn\.qkv\.bias", [(f"{name}/bias", _third(i, 0)) for name, i in parts]),
        *_dense(block + r"attn\.proj", f"{ours}attention/out"),
        *_dense(block + r"mlp\.fc1", f"{ours}mlp_in"),
        *_dense(block + r"mlp\.fc2", f"{ours}mlp_out"),
        *_norm(block + "norm1", f"{ours}norm_attention"),
        *_norm(block + "norm2", f"{ours}norm_mlp"),
        *_norm("norm", "norm"),
        *_dense("head", "head"),
    ]


def _timm_resnet() -> Rules:
    block = r"layer(?P<stage>\d+)\.(?P<place>\d+)\."
    rules: Rules = [(r"conv1\.weight", [("stem/kernel", _hwio)]), *_norm("bn1", "norm_stem"), *_dense("fc", "head")]
    for i in range(3):
        rules.append((rf"{block}conv{i + 1}\.weight", [(f"blocks_<timm>/conv_{i}/kernel", _hwio)]))
        rules += _norm(rf"{block}bn{i + 1}", f"blocks_<timm>/norm_{i}")
    rules.append((block + r"downsample\.0\.weight", [("blocks_<timm>/projection/kernel", _hwio)]))
    return rules + _norm(block + r"downsample\.1", "blocks_<timm>/norm_projection")


def _augreg() -> Rules:
    block, ours = r"Transformer/encoderblock_(\d+)/", r"blocks_\1/"
    attention = block + "MultiHeadDotProductAttention_1/"
    rules: Rules = [
        ("cls", [("class_token", _first)]),
        ("Transformer/posembed_input/pos_embedding", [("positions", _first)]),
        ("embedding/kernel", [("patch_embedding/kernel", _rows)]),
        ("embedding/bias", [("patch_embedding/bias", _as_is)]),
        (attention + "out/kernel", [(f"{ours}attention/out/kernel", _rows)]),
        (attention + "out/bias", [(f"{ours}attention/out/bias", _as_is)]),
        ("Transformer/encoder_norm/(scale|bias)", [(r"norm/\1", _as_is)]),
        ("head/(kernel|bias)", [(r"head/\1", _as_is)]),
        ("pre_logits/.*", []),  # a layer of pre-training on ImageNet-21k
    ]
    for part in ("query", "key", "value"):
        rules.append((f"{attention}{part}/kernel", [(f"{ours}attention/{part}/kernel", _heads_out)]))
        rules.append((f"{attention}{part}/bias", [(f"{ours}attention/{part}/bias", _flat)]))
    for theirs, name in (("LayerNorm_0", "norm_attention"), ("LayerNorm_2", "norm_mlp")):
        rules.append((f"{block}{theirs}/(scale|bias)", [(rf"{ours}{name}/\2", _as_is)]))
    for theirs, name in (("Dense_0", "mlp_in"), ("Dense_1", "mlp_out")):
        rules.append((f"{block}MlpBlock_3/{theirs}/(kernel|bias)", [(rf"{ours}{name}/\2", _as_is)]))
    return rules


def _bit() -> Rules:
    unit = r"resnet/block(?P<stage>\d+)/unit(?P<place>\d+)/"
    rules: Rules = [
        ("resnet/root_block/standardized_conv2d/kernel", [("stem/kernel", _as_is)]),
        ("resnet/group_norm/gamma", [("norm/scale", _flat)]),
        ("resnet/group_norm/beta", [("norm/bias", _flat)]),
        ("resnet/head/conv2d/kernel", [("head/kernel", _rows)]),
        ("resnet/head/conv2d/bias", [("head/bias", _flat)]),
        (unit + "a/proj/standardized_conv2d/kernel", [("blocks_<bit>/projection/kernel", _as_is)]),
    ]
    for i, letter in enumerate("abc"):
        rules.append((f"{unit}{letter}/standardized_conv2d/kernel", [(f"blocks_<bit>/conv_{i}/kernel", _as_is)]))
        rules.append((f"{unit}{letter}/group_norm/gamma", [(f"blocks_<bit>/norm_{i}/scale", _flat)]))
        rules.append((f"{unit}{letter}/group_norm/beta", [(f"blocks_<bit>/norm_{i}/bias", _flat)]))
    return rules


def _objax() -> Rules:
    """objax.zoo.resnet_v2 with GroupNorm2D, as google-research/dp-imagenet saves it."""
    top = r"\(\w+\)\[\d+\]"
    block = r"\(\w+\)\[(?P<stage>\d+)\]\(ResNetV2BlockGroup\)\[(?P<place>\d+)\]\(ResNetV2Block\)\."
    rules: Rules = [
        (top + r"\(Conv2D\)\.w", [("stem/kernel", _as_is)]),
        (top + r"\(GroupNorm2D\)\.gamma", [("norm/scale", _flat)]),
        (top + r"\(GroupNorm2D\)\.beta", [("norm/bias", _flat)]),
        (top + r"\(Linear\)\.w", [("head/kernel", _as_is)]),
        (top + r"\(Linear\)\.b", [("head/bias", _as_is)]),
        (block + r"proj_conv\(Conv2D\)\.w", [("blocks_<objax>/projection/kernel", _as_is)]),
    ]
    for i in range(3):
        rules.append((rf"{block}conv_{i}\(Conv2D\)\.w", [(f"blocks_<objax>/conv_{i}/kernel", _as_is)]))
        rules.append((rf"{block}norm_{i}\(GroupNorm2D\)\.gamma", [(f"blocks_<objax>/norm_{i}/scale", _flat)]))
        rules.append((rf"{block}norm_{i}\(GroupNorm2D\)\.beta", [(f"blocks_<objax>/norm_{i}/bias", _flat)]))
    return rules


# For formats that number blocks within stages: where stage and block are in a tensor's name.
_BLOCKS = {
    "timm": r"layer(\d+)\.(\d+)\.",
    "bit": r"resnet/block(\d+)/unit(\d+)/",
    "objax": r"\(\w+\)\[(\d+)\]\(ResNetV2BlockGroup\)\[(\d+)\]",
}


def _numbered(format: str, match: re.Match[str], names: Iterable[str]) -> str:
    """A block's number, counted through all stages of the file."""
    found = {tuple(map(int, m.groups())) for name in names if (m := re.match(_BLOCKS[format], name))}
    return str(sorted(found).index((int(match["stage"]), int(match["place"]))))


def _rules(tensors: Tensors, format: str) -> Rules:
    if format in ("dpscale", "orbax"):
        return [(r"(.*)", [(r"\1", _as_is)])]
    if format == "hugging_face":
        if any("wte.weight" in name for name in tensors):
            return _hugging_face_gpt2()
        bert = any("word_embeddings" in name for name in tensors)
        return _hugging_face_bert() if bert else _hugging_face_vit()
    if format == "timm":
        return _timm_vit() if any("patch_embed" in name for name in tensors) else _timm_resnet()
    return {"augreg": _augreg, "bit": _bit, "objax": _objax}[format]()
