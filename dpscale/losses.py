"""Per-example losses and metrics: pure functions of one example, which the clipping engine maps over a
batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Example = dict[str, jax.Array]  # {"features": one example's features, "label": its label}
Loss = Callable[[Any, Example, jax.Array | None], jax.Array]
Metrics = Callable[[Any, Example], dict[str, jax.Array]]
Transform = Callable[[jax.Array, jax.Array | None], jax.Array]


def softmax_cross_entropy(logits: jax.Array, label: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-sum_c t_c log softmax(logits)_c in nats, with t = (1 - s) one_hot(label) + s / classes.

    logits: float[classes]; label: an integer scalar. A label outside the classes (padding may hold any)
    counts as no class at all, so the result stays finite.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    classes = logits.shape[-1]
    target = jax.nn.one_hot(label, classes) * (1.0 - label_smoothing) + label_smoothing / classes
    return -jnp.sum(target * log_p)


def binary_cross_entropy(logit: jax.Array, label: jax.Array) -> jax.Array:
    """-log of the probability that sigmoid(logit) gives to `label` (0 or 1), in nats; logit: a scalar or
    [1]."""
    logit = logit.astype(jnp.float32).reshape(())
    target = jnp.asarray(label, jnp.float32).reshape(())
    return jax.nn.softplus(logit) - target * logit


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of the squared differences over one example's outputs; a prediction [1] meets a scalar target."""
    target = jnp.asarray(target, jnp.float32)
    return jnp.mean(jnp.square(prediction.astype(jnp.float32).reshape(target.shape) - target))


def next_token_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the positions of -log softmax(logits[t])[targets[t]], in nats; 0 where no position counts.

    logits: float[T, V]; targets: int[T]. A target outside [0, V) is ignored: padding is marked by a negative one.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    counted = (targets >= 0) & (targets < logits.shape[-1])
    chosen = jnp.take_along_axis(log_p, jnp.where(counted, targets, 0)[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(counted, chosen, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def classification_loss(
    apply: Callable[..., jax.Array],
    transform: Transform | None = None,
    *,
    label_smoothing: float = 0.0,
    views: int = 1,
) -> Loss:
    """`loss(params, example, key)`: softmax cross entropy of one example, the mean over `views` augmentations of it.

    apply: a `Functional.apply`. transform: a `dpscale.data.transforms.Transform`. The key is split between
    augmentation and dropout; key None means neither. Weight decay does not belong here: inside the clipped
    gradient it would use up the clip norm. Set `optimizer.weight_decay`, which is applied after clipping.
    """
    return per_example_loss(
        apply, lambda logits, label: softmax_cross_entropy(logits, label, label_smoothing), transform, views
    )


def regression_loss(apply: Callable[..., jax.Array], transform: Transform | None = None, *, views: int = 1) -> Loss:
    """`loss(params, example, key)`: mean squared error of one example; see `classification_loss`."""
    return per_example_loss(apply, mean_squared_error, transform, views)


def binary_loss(apply: Callable[..., jax.Array], transform: Transform | None = None) -> Loss:
    """`loss(params, example, key)`: binary cross entropy of one example; see `classification_loss`."""
    return per_example_loss(apply, binary_cross_entropy, transform)


def language_model_loss(apply: Callable[..., jax.Array], transform: Transform | None = None) -> Loss:
    """`loss(params, example, key)`: mean cross entropy of the tokens that follow; see `next_token_cross_entropy`.

    The example is one text: its features are int[T] ids, its label int[T], the token that follows each. One text of any
    length has one clipped gradient, so a guarantee for one example is one for a whole text.
    """
    return per_example_loss(apply, next_token_cross_entropy, transform)


def per_example_loss(
    apply: Callable[..., jax.Array],
    criterion: Callable[[jax.Array, jax.Array], jax.Array],
    transform: Transform | None = None,
    views: int = 1,
) -> Loss:
    """`loss(params, example, key)` from a model, a `criterion(output, label) -> scalar` and a transform.

    With `views` = K > 1 it is the mean over K views of the example, each augmented (and dropped out) with a key of its
    own. Its gradient is the mean of the views' gradients, which is then clipped once, so K changes no sensitivity
    (De et al. 2022, arXiv 2204.13650, section 3.2). The views are one more axis inside the example: no other example
    comes near them. Without a key there is one view, the example as it is.
    """

    def of_view(params: Any, example: Example, key: jax.Array | None) -> jax.Array:
        output = _output(apply, transform, params, example["features"], key)
        return criterion(output, example["label"])

    def loss(params: Any, example: Example, key: jax.Array | None = None) -> jax.Array:
        if key is None or views == 1:
            return of_view(params, example, key)
        return jnp.mean(jax.vmap(of_view, (None, None, 0))(params, example, jax.random.split(key, views)))

    return loss


def sum_over_records(loss: Callable[..., jax.Array], *, uses_key: bool) -> Callable[..., jax.Array]:
    """The loss of a user, from the loss of a record: the sum over the user's records (dpscale.data.users).

    Its gradient is the sum of the records' gradients, which the clip then bounds as one: a user moves the sum of a
    batch by at most the clip norm, however many records there are. The records are one more axis of each layer's
    operands, as positions of a sequence are. What stands in for absent records is left out by selection.
    """

    def total(losses: jax.Array, present: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(present, losses, 0.0))

    def without_key(params: Any, user: Example) -> jax.Array:
        records = {name: array for name, array in user.items() if name != "present"}
        return total(jax.vmap(loss, (None, 0))(params, records), user["present"])

    def with_key(params: Any, user: Example, key: jax.Array) -> jax.Array:
        records = {name: array for name, array in user.items() if name != "present"}
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(user["present"])))
        return total(jax.vmap(loss, (None, 0, 0))(params, records, keys), user["present"])

    return with_key if uses_key else without_key


def classification_metrics(apply: Callable[..., jax.Array], transform: Transform | None = None) -> Metrics:
    """`metrics(params, example) -> {"loss", "correct"}`: float32 scalars to be summed over examples and
    divided.

    "correct" is 1 where the largest logit is the label's (the first one in a tie) and 0 otherwise. No
    augmentation, no dropout. An output that is not finite counts as wrong.
    """

    def metrics(params: Any, example: Example) -> dict[str, jax.Array]:
        logits = _output(apply, transform, params, example["features"], None)
        right = (jnp.argmax(logits) == example["label"]) & jnp.all(jnp.isfinite(logits))
        return {
            "loss": softmax_cross_entropy(logits, example["label"]),
            "correct": right.astype(jnp.float32),
        }

    return metrics


def language_model_metrics(apply: Callable[..., jax.Array], transform: Transform | None = None) -> Metrics:
    """`metrics(params, example) -> {"loss", "correct"}`: means over one text's positions, float32 scalars.

    "loss" is `next_token_cross_entropy` (exp of its mean over texts of one length is the perplexity); "correct" is the
    share of the counted positions whose largest logit is the next token's, 0 for one whose logits are not finite.
    """

    def metrics(params: Any, example: Example) -> dict[str, jax.Array]:
        logits = _output(apply, transform, params, example["features"], None)
        targets = example["label"]
        counted = (targets >= 0) & (targets < logits.shape[-1])
        right = (jnp.argmax(logits, axis=-1) == targets) & jnp.all(jnp.isfinite(logits), axis=-1) & counted
        share = jnp.sum(right, dtype=jnp.float32) / jnp.maximum(jnp.sum(counted), 1)
        return {"loss": next_token_cross_entropy(logits, targets), "correct": share}

    return metrics


def regression_metrics(apply: Callable[..., jax.Array], transform: Transform | None = None) -> Metrics:
    """`metrics(params, example) -> {"loss"}`: the squared error, a float32 scalar."""

    def metrics(params: Any, example: Example) -> dict[str, jax.Array]:
        prediction = _output(apply, transform, params, example["features"], None)
        return {"loss": mean_squared_error(prediction, example["label"])}

    return metrics


def _output(
    apply: Callable[..., jax.Array],
    transform: Transform | None,
    params: Any,
    features: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    augmentation_key, dropout_key = (None, None) if key is None else jax.random.split(key)
    if transform is not None:
        features = transform(features, augmentation_key)
    return apply(params, features, dropout_key)
