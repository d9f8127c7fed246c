"""Tensors by name from the files that pre-trained weights come in, and which format they are."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dpscale.errors import InputError
from dpscale.models.leaves import named

Format = Literal["auto", "hugging_face", "timm", "augreg", "bit", "objax", "dpscale", "orbax"]
Tensors = dict[str, np.ndarray]

# A tensor whose name contains this tells the format. In this order.
_MARKS = {
    "hugging_face": ("embeddings.patch_embeddings.", "embeddings.word_embeddings.", "wte.weight"),
    "timm": ("patch_embed.proj.weight", "layer1.0.conv1.weight"),
    "augreg": ("Transformer/encoderblock_0/", "Transformer/posembed_input/"),
    "bit": ("resnet/root_block/",),
    "objax": ("(Conv2D).w",),
}


def read_tensors(path: Path, format: Format) -> tuple[Tensors, str]:
    """(tensors by their names in the file, the format). A directory is an Orbax checkpoint, a release of dpscale, or
    holds `model.safetensors`.

    Raises: InputError for what cannot be read, and where the format is not told by the names.
    """
    if format not in get_args(Format):
        raise InputError(f"model.pretrained_format={format!r}: choose one of {', '.join(get_args(Format))}")
    try:
        tensors, ours = _directory(path) if path.is_dir() else _file(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as weights ({error}): copy it again, or give another file") from error
    found = ours or _told_by_names(tensors)
    if format != "auto" and ours is None:
        found = format
    if found is None:
        known = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"{path.name} holds no weights of a known format (its tensors are {known}, ..): docs/models.md lists the "
            "formats; or set model.pretrained_format"
        )
    return tensors, found


def _file(path: Path) -> tuple[Tensors, str | None]:
    if path.suffix == ".npz":
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return _unpack_objax({name: file[name] for name in file.files}), None
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path.name}: weights come as .safetensors, .npz, or a directory; a PyTorch pickle (.bin, .pt, .pth) is "
            "code and is not run: convert it to safetensors first"
        )
    return _safetensors(path), None


def _directory(path: Path) -> tuple[Tensors, str | None]:
    if (path / "weights.safetensors").is_file():
        return _safetensors(path / "weights.safetensors"), "dpscale"
    if (path / "model.safetensors").is_file():
        return _safetensors(path / "model.safetensors"), None
    if (path / "model.safetensors.index.json").is_file():
        parts = [_safetensors(part) for part in sorted(path.glob("model-*.safetensors"))]
        return {name: tensor for part in parts for name, tensor in part.items()}, None
    if any((path / name).exists() for name in ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")):
        return _orbax(path), "orbax"
    raise InputError(
        f"{path} holds neither weights.safetensors (a release of dpscale), model.safetensors (Hugging Face) nor an "
        "Orbax checkpoint: give one of these directories, or a file"
    )


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:  # numpy has no bfloat16 of its own
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file ({error}): copy it again") from error


def _unpack_objax(arrays: Tensors) -> Tensors:
    """Objax stores names in one array and values under their positions (objax.io.save_var_collection)."""
    if "names" not in arrays or "0" not in arrays:
        return arrays
    return {str(name): arrays[str(position)] for position, name in enumerate(arrays["names"])}


def _orbax(path: Path) -> Tensors:
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
        if metadata is None:
            raise InputError(f"{path} is an Orbax checkpoint that was never completed: give another")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        tree: Any = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    # A checkpoint of a run holds its optimizer too: only the parameters are initial weights.
    return named(tree["params"] if isinstance(tree, dict) and "params" in tree else tree)


def _told_by_names(names: Collection[str]) -> str | None:
    for format, marks in _MARKS.items():
        if any(mark in name for name in names for mark in marks):
            return format
    # Leaf names of dpscale's own models in a single file.
    if any(name.startswith(("blocks_0/", "blocks/", "head/", "Dense_0/", "Conv_0/")) for name in names):
        return "dpscale"
    return None
