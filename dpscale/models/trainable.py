"""Which of a model's parameters are trained: by name, biases only, the last layers, low-rank adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError, did_you_mean
from dpscale.models.functional import Apply, seed_key
from dpscale.models.leaves import as_tree, named

LORA = ("lora_a", "lora_b")
_BLOCK = re.compile(r"blocks_(\d+)/")
# What comes after the last block in every model of this package.
_AFTER_BLOCKS = ("norm/", "pooler/", "head/")
_FORMS = (
    'all, head, bias, lora, last:N, or patterns of leaf names such as "blocks_11/*", with "!" in front to leave out'
)


def trainable_names(params: Any, chosen: Sequence[str]) -> set[str]:
    """Names of the leaves to train. `chosen`: words and patterns, each adding leaves, or with "!" taking them away.

    | word | leaves |
    | --- | --- |
    | all | every one |
    | head | `head/..`: the new task's output layer |
    | bias | every bias (BiTFiT, arXiv 2106.10199, with privacy arXiv 2210.00036) |
    | last:N | the last N blocks, and what comes after them (norm, pooler, head) |
    | lora | the adapters that `add_lora` made |
    | a pattern | leaves whose name matches; `*` matches slashes too |

    Raises: InputError where a word or pattern matches nothing (with the nearest names), and where nothing is left.
    """
    names = list(named(params))
    result: set[str] = set()
    for word in chosen:
        away = word.startswith("!")
        found = _matching(word.removeprefix("!"), names)
        result = result - found if away else result | found
    if not result:
        raise InputError(f"model.trainable={list(chosen)} leaves no parameter to train: choose {_FORMS}")
    return result


def add_lora(params: Any, rank: int, targets: Sequence[str], seed: int) -> dict[str, Any]:
    """`params` with a pair of adapters beside the kernel of every targeted dense layer.

    `targets`: patterns of layer names ("*/query"). `lora_a`: [D, rank], normal with variance 1/D; `lora_b`: [rank, P],
    zero, so that the model starts as it was. In a scanned stack both have its leading axis.
    Source: Hu et al. 2021 (arXiv 2106.09685).

    Raises: InputError where a pattern matches no dense layer.
    """
    leaves = named(params)
    layers = {name.removesuffix("/kernel"): leaf for name, leaf in leaves.items() if name.endswith("/kernel")}
    chosen: dict[str, Any] = {}
    for target in targets:
        found = {layer: leaf for layer, leaf in layers.items() if fnmatchcase(layer, target)}
        if not found:
            raise InputError(
                f"model.lora_targets={target!r} matches no dense layer: {did_you_mean(target, list(layers))}"
                f"the layers are {', '.join(_summary(layers))}"
            )
        chosen |= found
    for number, (layer, kernel) in enumerate(sorted(chosen.items())):
        *lead, inputs, outputs = kernel.shape
        if len(lead) > 1 or (lead and not layer.startswith("blocks/")):
            raise InputError(
                f"model.lora_targets chose {layer}, whose kernel is {list(kernel.shape)}: adapters are for dense layers"
            )
        if rank > min(inputs, outputs):
            raise InputError(f"model.lora_rank={rank} is above the smaller side of {layer}, {min(inputs, outputs)}")
        key = jax.random.fold_in(seed_key(seed), number)
        leaves[f"{layer}/lora_a"] = jax.random.normal(key, (*lead, inputs, rank)) / math.sqrt(inputs)
        leaves[f"{layer}/lora_b"] = jnp.zeros((*lead, rank, outputs))
    return as_tree(leaves)


def with_lora(apply: Apply, scale: float) -> Apply:
    """`apply` of a linen model in which a dense layer y = x W + b that has adapters gives y + scale x A B.

    The product A B is never formed, so that clipping sees two small dense layers.
    """

    def adapt(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense):
            return y
        if not module.has_variable("params", "lora_a"):
            return y
        a, b = (module.get_variable("params", name).astype(y.dtype) for name in LORA)
        return y + scale * ((args[0].astype(y.dtype) @ a) @ b)

    def adapted(params: Any, features: jax.Array, key: jax.Array | None) -> Any:
        with nn.intercept_methods(adapt):
            return apply(params, features, key)

    return adapted


def merge_lora(params: Any, scale: float) -> dict[str, Any]:
    """The parameters of the plain model that does what the adapted one does: W + scale A B in place of each W."""
    leaves = named(params)
    for name in [name for name in leaves if name.endswith("/lora_a")]:
        layer = name.removesuffix("/lora_a")
        a, b = leaves.pop(name), leaves.pop(f"{layer}/lora_b")
        leaves[f"{layer}/kernel"] = leaves[f"{layer}/kernel"] + scale * (a @ b)
    return as_tree(leaves)


def check_lora_is_used(apply: Apply, params: Any, features: Any) -> None:
    """Refuses adapters that reach no output, as beside the kernel of a layer that is no `nn.Dense`.

    Raises: InputError that names them.
    """
    leaves = named(params)
    names = [name for name in leaves if name.endswith("/lora_b")]

    def outputs(adapters: list[Any], example: Any) -> Any:
        return apply(as_tree(leaves | dict(zip(names, adapters, strict=True))), example, None)

    program = jax.make_jaxpr(outputs)([leaves[name] for name in names], features).jaxpr
    read = {id(x) for equation in program.eqns for x in equation.invars}
    idle = [name for name, x in zip(names, program.invars, strict=False) if id(x) not in read]
    if idle:
        raise InputError(
            f"the adapters {', '.join(idle[:4])} have no effect: model.lora_targets may choose "
            "flax.linen.Dense layers only"
        )


def _matching(word: str, names: list[str]) -> set[str]:
    if word == "all":
        return set(names)
    if word == "bias":
        found = {name for name in names if name.rsplit("/", 1)[-1] == "bias"}
    elif word == "head":
        found = {name for name in names if name.startswith("head/")}
    elif word == "lora":
        found = {name for name in names if name.rsplit("/", 1)[-1] in LORA}
    elif word.startswith("last:"):
        return _last_blocks(word, names)
    else:
        found = {name for name in names if fnmatchcase(name, word)}
    if not found:
        raise InputError(
            f"model.trainable={word!r} matches no parameter: {did_you_mean(word, names)}choose {_FORMS}; "
            f"the parameters lie in {', '.join(_summary(names))}"
        )
    return found


def _last_blocks(word: str, names: list[str]) -> set[str]:
    count = word.removeprefix("last:")
    numbers = {int(match[1]) for name in names if (match := _BLOCK.match(name))}
    if not count.isdecimal() or not numbers or int(count) > len(numbers):
        seen = f"this model has {len(numbers)} blocks of its own (a scanned stack counts as none)"
        raise InputError(f"model.trainable={word!r}: last:N takes a number of blocks, and {seen}: choose {_FORMS}")
    first = len(numbers) - int(count)
    chosen = tuple(f"blocks_{number}/" for number in range(first, len(numbers))) + _AFTER_BLOCKS
    return {name for name in names if name.startswith(chosen)}


def _summary(names: Any) -> list[str]:
    """The first parts of the names, few enough to print."""
    first = sorted({name.split("/")[0] for name in names})
    return first if len(first) <= 12 else [*first[:11], ".."]
