"""What is trained: initial parameters, the per-example loss, and held-out metrics, from a config or from the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.config import RunConfig
from dpscale.data.source import SourceMetadata, empty_rows
from dpscale.data.transforms import Transform, build_transform
from dpscale.errors import InputError
from dpscale.losses import (
    Metrics,
    classification_loss,
    classification_metrics,
    regression_loss,
    regression_metrics,
    sum_over_records,
)
from dpscale.models import as_functional, build_model


@dataclass(frozen=True)
class Task:
    """`loss(params, example)` or, where `uses_key`, `loss(params, example, key)`: a float scalar for ONE example.

    With `privacy.unit = "user"` an example is a user, and its loss the sum over the user's records; `metrics` are
    always of one record.

    `params`: the initial parameters, float32 leaves, the same on every process (they depend on run.seed, the model
    and the examples' shape). `metrics(params, example)`: float scalars, averaged over the held-out examples.
    """

    params: Any
    loss: Callable[..., jax.Array]
    uses_key: bool
    metrics: Metrics

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


def build_task(
    config: RunConfig,
    metadata: SourceMetadata,
    model: Any = None,
    loss: Callable[..., jax.Array] | None = None,
) -> Task:
    """The task that `config` names, or the user's own model and loss, which are for one record in any case.

    Args:
        model: a flax module (linen or nnx) for one example, or a pytree of initial parameters; None: the config's.
        loss: `loss(params, example)` or `loss(params, example, key)`, for one example {"features": .., "label": ..} as
            stored (no transform is applied); None: cross entropy of the model's output, or squared error where labels
            are values.

    Raises: InputError where model and loss do not fit together, or a model works across examples.
    """
    task = _record_task(config, metadata, model, loss)
    if metadata.records is None:
        return task
    return replace(task, loss=sum_over_records(task.loss, uses_key=task.uses_key))


def _record_task(
    config: RunConfig, metadata: SourceMetadata, model: Any, loss: Callable[..., jax.Array] | None
) -> Task:
    views = config.data.augmentation_multiplicity
    if loss is not None and views > 1:
        raise InputError(
            f"data.augmentation_multiplicity={views} belongs to dpscale's own losses, but a loss was given, which "
            "augments by itself: leave it out, and average over the views in your loss"
        )
    if _is_params(model):
        if loss is None:
            raise InputError("model is a pytree of parameters, so loss must be given: loss(params, example) -> scalar")
        params = jax.tree.map(jnp.asarray, model)
        return _own_loss(params, loss)
    transform = build_transform(config.data, metadata)
    if model is None:
        model = build_model(
            config.model.name,
            _outputs(metadata),
            compute_dtype=config.performance.compute_dtype,
            **config.model.options,
        )
    _check_vocabulary(model, metadata)
    functional = as_functional(model, _model_input(transform, metadata, raw=loss is not None), seed=config.run.seed)
    if loss is not None:
        return _own_loss(functional.params, loss)
    if metadata.label_kind == "class":
        own = classification_loss(
            functional.apply, transform, label_smoothing=config.training.label_smoothing, views=views
        )
        return Task(functional.params, own, True, classification_metrics(functional.apply, transform))
    own = regression_loss(functional.apply, transform, views=views)
    return Task(functional.params, own, True, regression_metrics(functional.apply, transform))


def model_facts(config: RunConfig, metadata: SourceMetadata, *, model: Any = None, loss: Any = None) -> dict[str, Any]:
    """What is needed beside the weights to build the model again with `dpscale.models`: public constants only.

    `source` is "python" where the model is the user's own; the rest is then None. Takes what `build_task` takes.
    """
    facts: dict[str, Any] = {"schema": 1, "source": "python", "name": None, "options": None, "num_classes": None}
    facts |= {"compute_dtype": config.performance.compute_dtype, "features": None, "preprocessing": None}
    if model is not None:
        return facts
    transform = build_transform(config.data, metadata)
    built = build_model(config.model.name, _outputs(metadata), **config.model.options)
    options = {name: value for name, value in config.model.options.items() if hasattr(built, name)}
    features = _model_input(transform, metadata, raw=loss is not None)
    facts |= {"source": "dpscale.models", "name": config.model.name, "options": options}
    facts |= {"num_classes": _outputs(metadata)}
    facts["features"] = {"shape": list(features.shape), "dtype": str(features.dtype)}
    if loss is None:  # otherwise the user's loss prepares the features, and its code is not released
        constants = {"full_scale": transform.full_scale, "mean": transform.mean, "std": transform.std}
        facts["preprocessing"] = constants if not transform.tokens else {}
    return facts


def _outputs(metadata: SourceMetadata) -> int | None:
    return metadata.num_classes if metadata.label_kind == "class" else int(np.prod(metadata.label_shape)) or 1


def example_shapes(metadata: SourceMetadata) -> dict[str, jax.ShapeDtypeStruct]:
    """One example as the loss sees it; where rows are users, one user."""
    rows = empty_rows(metadata, 0)
    return {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in rows.items()}


def _own_loss(params: Any, loss: Callable[..., jax.Array]) -> Task:
    positional = [
        parameter
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(parameter.default is parameter.empty for parameter in positional)
    if len(positional) < 2 or required > 3:
        raise InputError(
            f"loss takes {len(positional)} arguments: write loss(params, example) or loss(params, example, key)"
        )
    uses_key = len(positional) >= 3

    def metrics(params: Any, example: Any) -> dict[str, jax.Array]:
        key = (jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32"),) if required == 3 else ()
        return {"loss": loss(params, example, *key)}

    return Task(params, loss, uses_key, metrics)


def _check_vocabulary(model: Any, metadata: SourceMetadata) -> None:
    """Token ids that a model has no row for would be clamped in silence; a wrong padding token would be attended to."""
    rows, padding = getattr(model, "vocabulary", None), getattr(model, "pad_token", None)
    if rows and metadata.vocabulary_size is not None and rows < metadata.vocabulary_size:
        raise InputError(
            f"{metadata.name} has token ids below {metadata.vocabulary_size}, but "
            f"model.vocabulary={rows}: the tokenizer "
            "and the model are of different vocabularies. Set data.tokenizer to the model's own, "
            "or model.vocabulary to "
            "the data's"
        )
    if None not in (padding, metadata.padding_token) and padding != metadata.padding_token:
        raise InputError(
            f"{metadata.name} is filled up with token {metadata.padding_token}, but "
            f"model.pad_token={padding}: make them "
            "equal, or the model takes padding for text"
        )


def _is_params(model: Any) -> bool:
    return isinstance(model, dict | list | tuple)


def _model_input(transform: Transform, metadata: SourceMetadata, *, raw: bool) -> jax.ShapeDtypeStruct:
    stored = jax.ShapeDtypeStruct(metadata.feature_shape, metadata.feature_dtype)
    if not raw:
        return jax.eval_shape(lambda x: transform(x, None), stored)
    # The user's own loss prepares the features; float32 is what nearly every module is initialised with.
    floating = jnp.issubdtype(stored.dtype, jnp.floating) or stored.dtype == jnp.uint8
    return jax.ShapeDtypeStruct(stored.shape, jnp.float32) if floating else stored
