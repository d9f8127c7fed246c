"""A model's parameters as one safetensors file, and back. Needs NumPy only.

A leaf's name is its path in the tree, joined by slashes ("Dense_0/kernel"; items of a list have decimal names). A slash
or tilde within a key is written ~1 or ~0, as in JSON pointers (RFC 6901).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.errors import InputError


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of nested dicts, lists and tuples, by name. Raises: InputError where two would share a name."""
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree, ()):
        name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)
        if name in leaves:
            raise InputError(f"two parameters are named {name!r} once keys are written as text: rename one of them")
        leaves[name] = leaf
    return leaves


def as_tree(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts with text keys from named leaves; what was a list comes back as a dict with keys "0", "1", ..

    Raises: InputError where one name goes on where another ends.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InputError(
                    f"parameter {name!r} lies below another parameter: the file was not written by dpscale"
                )
        if last in place:
            raise InputError(f"parameter {name!r} is there twice: the file was not written by dpscale")
        place[last] = leaf
    return tree


def write_weights(path: Path, tree: Any) -> None:
    """Write the leaves of `tree` to a safetensors file, with their dtypes. It holds nothing else."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(leaf, order="C") for name, leaf in named_leaves(tree).items()}, path)


def read_weights(path: Path) -> dict[str, Any]:
    """Nested dicts of arrays from a safetensors file.

    Raises: InputError when it is missing or not one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return as_tree(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}): copy it again") from error


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield path, np.asarray(tree)
        return
    for key, value in items:
        yield from _leaves(value, (*path, key))
