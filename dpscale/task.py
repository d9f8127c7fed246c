"""What is trained: initial parameters, the per-example loss, and held-out metrics, from a config or from the user."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.config import RunConfig
from dpscale.data.source import SourceMetadata, empty_rows
from dpscale.data.transforms import Transform, build_transform
from dpscale.errors import DpscaleError, InputError
from dpscale.losses import (
    Metrics,
    classification_loss,
    classification_metrics,
    language_model_loss,
    language_model_metrics,
    regression_loss,
    regression_metrics,
    sum_over_records,
)
from dpscale.models import as_functional, build_model
from dpscale.models.leaves import join, named, split
from dpscale.models.pretrained import Origin, load_pretrained
from dpscale.models.registry import is_language_model
from dpscale.models.trainable import add_lora, check_lora_is_used, merge_lora, trainable_names, with_lora
from dpscale.weights import read_weights


@dataclass(frozen=True)
class Task:
    """`loss(params, example)` or, where `uses_key`, `loss(params, example, key)`: a float scalar for ONE example.

    With `privacy.unit = "user"` an example is a user, and its loss the sum over the user's records; `metrics` are
    always of one record.

    `params`: the initial trainable parameters, float32 leaves, the same on every process (they depend on run.seed, the
    model, its pre-trained file and the examples' shape). `metrics(params, example)`: float scalars, averaged over the
    held-out examples.

    `frozen`: the leaves that are not trained, as nested dicts, or None; they get no gradient, no noise and no optimizer
    state. `loss` and `metrics` read these; a compiled program takes them as an argument, through `bind`, or `whole`.
    `origin`: where pre-trained weights came from. `notes`: lines for the owner. `lora_scale`: see `with_lora`.
    """

    params: Any
    loss: Callable[..., jax.Array]
    uses_key: bool
    metrics: Metrics
    frozen: Any = None
    of_whole: tuple[Callable[..., jax.Array], Metrics] | None = None
    origin: Origin | None = None
    notes: tuple[str, ...] = ()
    lora_scale: float | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))

    @property
    def whole_loss(self) -> Callable[..., jax.Array]:
        """The loss as a function of `whole(params)`."""
        return self.loss if self.of_whole is None else self.of_whole[0]

    @property
    def whole_metrics(self) -> Metrics:
        """The metrics as a function of `whole(params)`."""
        return self.metrics if self.of_whole is None else self.of_whole[1]

    def whole(self, params: Any) -> Any:
        """All parameters of the model: these trained ones, and the frozen ones."""
        return params if self.frozen is None else join(params, self.frozen)

    def bind(self, frozen: Any) -> Task:
        """This task with other values (tracers, arrays on a device) in place of the frozen ones."""
        if self.of_whole is None:
            return self
        loss, metrics = self.of_whole
        return replace(
            self,
            frozen=frozen,
            loss=lambda params, *rest: loss(join(params, frozen), *rest),
            metrics=lambda params, example: metrics(join(params, frozen), example),
        )

    def weight_facts(self) -> dict[str, str]:
        """Digests of the weights that no training data enter: a resumed run must start from the same ones."""
        facts = {} if self.origin is None else {"model.pretrained digest": self.origin.sha256}
        return facts if self.frozen is None else facts | {"frozen weights": weights_digest(self.frozen)}


def full_params(task: Task, params: Any) -> Any:
    """The whole model for `params` of a run: frozen leaves put back, adapters multiplied into their kernels.

    What the plain model of the config, without freezing and LoRA, takes; what is released.
    """
    whole = task.whole(params)
    return whole if task.lora_scale is None else merge_lora(whole, task.lora_scale)


def weights_digest(tree: Any) -> str:
    """SHA-256 over names, dtypes, shapes and values of nested dicts' leaves; 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    for name, leaf in sorted(named(tree).items()):
        value = np.asarray(leaf)
        hasher.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    return hasher.hexdigest()


def has_digest(file: Path, digest: str) -> bool:
    """Whether a file of `dpscale.weights` holds weights of this `weights_digest`; False where it is damaged."""
    try:
        return weights_digest(read_weights(file)) == digest
    except DpscaleError:
        return False


def release_facts(config: RunConfig, task: Task, program: dict[str, Any]) -> dict[str, Any]:
    """What a release must know, beside `model_facts`, of how the weights of a step came to be; JSON values.

    `averaged`: the moving average is what was evaluated. `program`: facts from `dpscale.program`.
    """
    file = config.model.pretrained
    return {
        "averaged": config.training.evaluate_ema,
        "lora_scale": task.lora_scale,
        "pretrained": None if file is None else {"file": Path(file).name, "format": config.model.pretrained_format},
        "program": program,
    }


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
    if metadata.records is not None:
        summed = sum_over_records(task.loss, uses_key=task.uses_key)
        task = replace(task, loss=summed)
    return _with_frozen(config, task)


def _with_frozen(config: RunConfig, task: Task) -> Task:
    """The task in which only what `model.trainable` chooses is trained; `task.params` are still all parameters."""
    chosen = config.model.trainable or (["lora", "head"] if config.model.lora_rank else None)
    if chosen is None:
        return task
    if config.model.trainable is None and not any(name.startswith("head/") for name in named(task.params)):
        chosen = ["lora"]
    names = trainable_names(task.params, chosen)
    if len(names) == len(named(task.params)):
        return task
    trained, frozen = split(task.params, names)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained))
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(task.params))
    note = f"trainable {count:,} of {total:,} parameters in {len(names)} tensors (model.trainable={chosen})"
    task = replace(task, params=trained, of_whole=(task.loss, task.metrics), notes=(*task.notes, note))
    return task.bind(frozen)


def _record_task(
    config: RunConfig, metadata: SourceMetadata, model: Any, loss: Callable[..., jax.Array] | None
) -> Task:
    views = config.data.augmentation_multiplicity
    if loss is not None and views > 1:
        raise InputError(
            f"data.augmentation_multiplicity={views} belongs to dpscale's own losses, but a loss was given, which "
            "augments by itself: leave it out, and average over the views in your loss"
        )
    smoothing, kind = config.training.label_smoothing, metadata.label_kind
    if smoothing and (loss is not None or kind != "class"):
        seen = "a loss was given" if loss is not None else f"the labels of {metadata.name} are of kind {kind!r}"
        raise InputError(
            f"training.label_smoothing={smoothing} belongs to dpscale's own loss of classes, but {seen}: leave it out"
        )
    if _is_params(model):
        if loss is None:
            raise InputError("model is a pytree of parameters, so loss must be given: loss(params, example) -> scalar")
        if config.model.lora_rank or config.model.pretrained:
            raise InputError(
                "model is a pytree of parameters: model.pretrained and model.lora_rank are for flax modules"
            )
        params = jax.tree.map(jnp.asarray, model)
        return _own_loss(params, loss)
    transform = build_transform(config.data, metadata)
    if model is None:
        model = _named_model(config, metadata)
    _check_vocabulary(model, metadata)
    example = _model_input(transform, metadata, raw=loss is not None)
    functional = as_functional(model, example, seed=config.run.seed)
    params, apply, origin, scale = functional.params, functional.apply, None, None
    if config.model.pretrained is not None:
        params, origin = load_pretrained(params, config.model.pretrained, config.model.pretrained_format)
    if config.model.lora_rank:
        if loss is not None:
            raise InputError(
                "model.lora_rank changes the model's layers, but a loss was given, which calls its own model"
            )
        scale = config.model.lora_alpha / config.model.lora_rank
        params = add_lora(params, config.model.lora_rank, config.model.lora_targets, config.run.seed)
        apply = with_lora(apply, scale)
        check_lora_is_used(apply, params, example)
    if loss is not None:
        task = _own_loss(params, loss)
    elif metadata.label_kind == "class":
        own = classification_loss(apply, transform, label_smoothing=config.training.label_smoothing, views=views)
        task = Task(params, own, True, classification_metrics(apply, transform))
    elif metadata.label_kind == "tokens":
        task = Task(params, language_model_loss(apply, transform), True, language_model_metrics(apply, transform))
    else:
        own = regression_loss(apply, transform, views=views)
        task = Task(params, own, True, regression_metrics(apply, transform))
    return replace(task, origin=origin, notes=() if origin is None else tuple(origin.lines()), lora_scale=scale)


def _named_model(config: RunConfig, metadata: SourceMetadata) -> Any:
    """The config's model, once it is sure that it fits the kind of data."""
    dtype, options = config.performance.compute_dtype, dict(config.model.options)
    built = build_model(config.model.name, _outputs(metadata), compute_dtype=dtype, **options)
    if is_language_model(built) != (metadata.label_kind == "tokens"):
        predicts = "predicts" if is_language_model(built) else "does not predict"
        raise InputError(
            f"model.name={config.model.name!r} {predicts} the next "
            f"token, but the labels of {metadata.name} are of kind {metadata.label_kind!r}: gpt and gpt2_small "
            "are for token files, the other models for classes and values"
        )
    padding = metadata.padding_token
    if padding is not None and "pad_token" not in options and hasattr(built, "pad_token"):
        return build_model(config.model.name, _outputs(metadata), compute_dtype=dtype, **options, pad_token=padding)
    return built


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
    if metadata.label_kind in ("class", "tokens"):
        return metadata.num_classes
    return int(np.prod(metadata.label_shape)) or 1


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
