"""Putting renamed tensors into a model's leaves, and saying what became of each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.errors import InputError
from dpscale.models.pretrained.names import Converted, Tensors

# Layers that a new task brings along: they may be missing, or have another shape.
NEW = ("head/", "pooler/")
_BLOCK = re.compile(r"blocks_(\d+)/(.*)")


@dataclass
class Fitted:
    """`leaves`: every leaf of the model. The rest is for `Origin`."""

    leaves: dict[str, Any]
    loaded: tuple[str, ...] = ()
    adapted: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)


def fit(target: dict[str, Any], converted: Converted, file: str) -> Fitted:
    """The model's leaves with the file's values.

    Raises: InputError that names every leaf without a value, every tensor without a place, every shape that differs.
    """
    tensors = _stacked(converted.leaves, target)
    result = Fitted(dict(target))
    wrong = []
    for name, leaf in target.items():
        tensor, shape = tensors.pop(name, None), tuple(leaf.shape)
        if tensor is None:
            result.initial[name] = "not in the file, keeps its initial values"
        elif tensor.shape == shape:
            result.leaves[name] = jnp.asarray(tensor, leaf.dtype)
        elif name.startswith("head/"):
            result.initial[name] = f"the file's is {list(tensor.shape)}, this model's {list(shape)}: initial values"
        elif name == "positions" and (
            moved := _positions(tensor, shape, "class_token" in target, "patch_embedding/kernel" in target)
        ):
            result.leaves[name], result.adapted[name] = moved
        else:
            wrong.append(f"{name} is {list(tensor.shape)} in the file and {list(shape)} in the model")
    missing = [name for name in result.initial if not name.startswith(NEW)]
    left = [
        f"{name} ({converted.sources.get(name, 'stacked blocks')})" for name in tensors if not name.startswith("head/")
    ]
    _refuse(file, wrong, missing, left)
    converted.unused += [converted.sources[name] for name in tensors]
    result.loaded = tuple(name for name in target if name not in result.initial)
    return result


def _stacked(leaves: Tensors, target: dict[str, Any]) -> Tensors:
    """Blocks as the model has them: numbered (`blocks_0/..`), or stacked along a leading axis (`blocks/..`)."""
    if any(name.startswith("blocks/") for name in leaves) and "blocks_0" in {name.split("/")[0] for name in target}:
        whole = {name: x for name, x in leaves.items() if name.startswith("blocks/")}
        apart = {f"blocks_{i}/{name[7:]}": x[i] for name, x in whole.items() for i in range(len(x))}
        return {name: x for name, x in leaves.items() if name not in whole} | apart
    if not any(name.startswith("blocks/") for name in target):
        return dict(leaves)
    result, groups = {}, {}
    for name, tensor in leaves.items():
        match = _BLOCK.fullmatch(name)
        if match:
            groups.setdefault(f"blocks/{match[2]}", {})[int(match[1])] = tensor
        else:
            result[name] = tensor
    return result | {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in groups.items()}


def _positions(tensor: np.ndarray, shape: tuple[int, ...], token: bool, image: bool) -> tuple[Any, str] | None:
    """Position embeddings for another number of positions, and what was done; None where they do not fit."""
    if tensor.ndim != 2 or tensor.shape[1] != shape[1]:
        return None
    if not image:
        if len(tensor) < shape[0]:
            return None
        return jnp.asarray(tensor[: shape[0]]), f"the first {shape[0]} of {len(tensor)} positions"
    first = int(token)
    old, new = math.isqrt(len(tensor) - first), math.isqrt(shape[0] - first)
    if old**2 + first != len(tensor) or new**2 + first != shape[0]:
        return None
    grid = jax.image.resize(tensor[first:].reshape(old, old, -1), (new, new, shape[1]), "cubic", antialias=False)
    done = f"interpolated from {old} x {old} to {new} x {new} patches"
    return jnp.concatenate([jnp.asarray(tensor[:first]), grid.reshape(new * new, -1)]), done


def _refuse(file: str, wrong: list[str], missing: list[str], left: list[str]) -> None:
    if not (wrong or missing or left):
        return
    parts = [
        (wrong, "other shapes"),
        (missing, "leaves of the model that the file lacks"),
        (left, "tensors that the model has no place for"),
    ]
    said = [
        f"{len(names)} {what}: {', '.join(names[:6])}{', ..' if len(names) > 6 else ''}"
        for names, what in parts
        if names
    ]
    remedy = "Set model.name and its sizes (width, depth, patch_size, ..) to those of the file, or give another file"
    if missing and not wrong and not left:
        remedy += ". A run's checkpoint lacks the weights that were frozen: give the folder that dpscale release makes"
    raise InputError(
        f"model.pretrained={file!r} holds weights of another architecture:\n  " + "\n  ".join([*said, remedy])
    )
