"""Parameters by name: nested dicts as `blocks_0/attention/query/kernel` and back, cut in two and put together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dpscale.errors import InputError


def named(tree: Any) -> dict[str, Any]:
    """Leaves of nested dicts by name, in the order of the pytree. A slash within a key is kept apart as ~1, ~ as ~0.

    Raises: InputError for another container: only dicts can be cut in two and come back from a file as they were.
    """
    leaves: dict[str, Any] = {}
    _collect(tree, "", leaves)
    return leaves


def as_tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from named leaves; the inverse of `named`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def split(tree: Any, chosen: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the chosen leaves, all others), each as nested dicts without what belongs to the other."""
    leaves = named(tree)
    inside = as_tree({name: leaf for name, leaf in leaves.items() if name in chosen})
    return inside, as_tree({name: leaf for name, leaf in leaves.items() if name not in chosen})


def join(one: Any, other: Any) -> dict[str, Any]:
    """Two nested dicts without a common leaf as one; what `split` gave, put together."""
    both = dict(one)
    for key, value in other.items():
        both[key] = join(both[key], value) if key in both else value
    return both


def _collect(tree: Any, at: str, leaves: dict[str, Any]) -> None:
    if isinstance(tree, list | tuple):
        raise InputError(
            f"the parameters hold a {type(tree).__name__} at {at or 'the top'!r}: freezing, LoRA and pre-trained "
            "weights go by names, so keep parameters in nested dicts, as flax does"
        )
    if not isinstance(tree, Mapping):
        leaves[at] = tree
        return
    for key in sorted(tree):
        name = str(key).replace("~", "~0").replace("/", "~1")
        _collect(tree[key], f"{at}/{name}" if at else name, leaves)
