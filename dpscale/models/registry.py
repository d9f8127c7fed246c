"""Model names and their options: what `model.name` and the other keys of `[model]` in a config may be."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError, did_you_mean

_REGISTRY: dict[str, type[nn.Module]] = {}
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {}  # name -> the model's name and the options that it sets
# Fields that the caller of build_model sets itself, and flax's own.
_NOT_OPTIONS = ("num_classes", "dtype", "example_ndim", "parent", "name")


def register(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: makes a linen module known as `name`; its fields with defaults become the options.

    The module has a field `num_classes`, a field `dtype` (of the computation; parameters stay float32), and
    is called as `module(features, train=False)` on one example, without a batch axis.
    """

    def add(module: type[nn.Module]) -> type[nn.Module]:
        _REGISTRY[name] = module
        return module

    return add


def register_preset(name: str, model: str, **options: Any) -> None:
    """Makes `name` mean the registered `model` with these options, each of which a config may still override."""
    _PRESETS[name] = (model, options)


def model_names() -> list[str]:
    """The names that `build_model` knows, from every file of this folder: models, and presets of them."""
    package = importlib.import_module("dpscale.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dpscale.models.{module.name}")
    return sorted([*_REGISTRY, *_PRESETS])


def build_model(name: str, num_classes: int | None, *, compute_dtype: str = "float32", **options: Any) -> nn.Module:
    """The linen module registered as `name`, with `num_classes` outputs.

    `options` are the module's own fields, as in a config file (lists become tuples).
    Raises: InputError for an unknown name or option (with the nearest valid ones), a value of the wrong type,
    and num_classes None.
    """
    names = model_names()
    if name not in names:
        raise InputError(
            f"model.name={name!r} is unknown: {did_you_mean(name, names)}the models are {', '.join(names)}"
        )
    known_as = name
    name, preset = _PRESETS.get(name, (name, {}))
    module = _REGISTRY[name]
    if is_language_model(module):
        num_classes = num_classes or 0
    if num_classes is None:
        raise InputError(
            f"the model {name!r} needs the number of classes, and it is not read off the labels, which are "
            "private: "
            "set data.num_classes"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(module) if f.name not in _NOT_OPTIONS} | preset
    unknown = [option for option in options if option not in defaults]
    if unknown:
        near = did_you_mean(unknown[0], list(defaults))
        known = ", ".join(f"{key} ({value!r})" for key, value in defaults.items()) or "none"
        raise InputError(f"model.{unknown[0]} is not an option of {known_as}: {near}its options (defaults) are {known}")
    checked = {key: _checked(f"model.{key}", value, defaults[key]) for key, value in (preset | options).items()}
    return module(num_classes=num_classes, dtype=jnp.dtype(compute_dtype), **checked)  # pyright: ignore[reportCallIssue]


def is_language_model(module: Any) -> bool:
    """Whether a module (or its class) says that it gives logits for the next token at every position."""
    return bool(getattr(module, "language_model", False))


def _checked(name: str, value: Any, default: Any) -> Any:
    """`value` if it has the type of `default` and is positive where that is a size."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise InputError(f"{name}={value!r} must be a list of whole numbers, such as {list(default)}")
        return tuple(_checked(name, item, default[0] if default else 1) for item in value)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise InputError(f"{name}={value!r} must be of type {type(default).__name__}, such as {default!r}")
    if isinstance(default, int) and not isinstance(default, bool) and value < min(1, default):
        raise InputError(f"{name}={value} must be at least {min(1, default)}")
    if isinstance(default, float) and not 0 <= value < 1:
        raise InputError(f"{name}={value} must be at least 0 and below 1")
    return value


def require_image(features: Any, model: str) -> None:
    """Refuses features that are not one image [H, W, C] (or a batch of them).

    Raises: InputError naming the shape seen.
    """
    if features.ndim < 3:
        raise InputError(
            f"model.name={model!r} takes images [height, width, channels], but an example has shape "
            f"{features.shape}: "
            "add a channel axis to the stored features, or use model.name=mlp"
        )


def require_tokens(features: Any, model: str, axes: int) -> None:
    """Refuses features that are not integer token ids with `axes` axes (or a batch of them).

    Raises: InputError naming the shape and dtype seen.
    """
    if features.ndim < axes or not jnp.issubdtype(features.dtype, jnp.integer):
        raise InputError(
            f"model.name={model!r} takes int32 token ids [{'T' if axes == 1 else '3, T'}], but an example is "
            f"{features.dtype}{list(features.shape)}: store tokens as signed integers (uint8 is taken for pixels)"
        )
