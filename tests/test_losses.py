"""Laws of the per-example losses and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpscale.losses import (
    binary_cross_entropy,
    binary_loss,
    classification_loss,
    classification_metrics,
    language_model_loss,
    language_model_metrics,
    mean_squared_error,
    next_token_cross_entropy,
    regression_loss,
    regression_metrics,
    softmax_cross_entropy,
)

KEY = jax.random.wrap_key_data(np.array([1, 2], np.uint32), impl="threefry2x32")
LOGITS = jax.random.normal(KEY, (20, 5)) * 4


def linear(params, features, key):
    noise = 0.0 if key is None else jax.random.normal(key, (5,))
    return features @ params + noise


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_agrees_with_optax(smoothing):
    labels = jnp.arange(20) % 5
    ours = jax.vmap(lambda x, y: softmax_cross_entropy(x, y, smoothing))(LOGITS, labels)
    target = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy(LOGITS, target), rtol=1e-5, atol=1e-6)
    assert (ours >= 0).all()


def test_binary_cross_entropy_agrees_with_optax_in_the_tails():
    logits = jnp.array([-100.0, -3.0, 0.0, 2.0, 100.0])
    for label in (0, 1):
        ours = jax.vmap(lambda x, y=label: binary_cross_entropy(x, jnp.asarray(y)))(logits)
        theirs = optax.sigmoid_binary_cross_entropy(logits, jnp.full(5, label, jnp.float32))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-30)
    assert binary_cross_entropy(jnp.array([0.3]), jnp.asarray(1)).shape == ()


def test_mean_squared_error_of_a_scalar_target_does_not_broadcast():
    assert mean_squared_error(jnp.array([3.0]), jnp.asarray(1.0)) == 4.0
    assert mean_squared_error(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])) == 2.0
    with pytest.raises(TypeError):
        mean_squared_error(jnp.ones(3), jnp.asarray(1.0))


def test_a_texts_loss_is_the_mean_over_the_positions_that_count():
    targets = jnp.array([3, -1, 0, 4, 5, -100] + [-1] * 14)  # 5 is beyond the vocabulary
    each = [softmax_cross_entropy(LOGITS[i], targets[i]) for i in (0, 2, 3)]
    np.testing.assert_allclose(next_token_cross_entropy(LOGITS, targets), np.mean(each), rtol=1e-6)
    nothing, gradient = jax.value_and_grad(next_token_cross_entropy)(LOGITS, jnp.full(20, -1))
    assert nothing == 0
    assert not gradient.any()


def test_language_model_metrics_count_the_positions_that_are_right():
    def apply(params, ids, key):
        return params[ids]

    table = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [jnp.nan, 1.0, 2.0]])
    example = {"features": jnp.array([0, 1, 0, 2, 1]), "label": jnp.array([1, 0, 2, 2, -1])}
    found = language_model_metrics(apply)(table, example)
    assert found["correct"] == 2 / 4
    whole = {"features": jnp.array([0, 1]), "label": jnp.array([1, 2])}
    expected = next_token_cross_entropy(table[:2], whole["label"])
    assert language_model_loss(apply)(table, whole, None) == expected
    assert language_model_metrics(apply)(table, whole)["loss"] == expected


@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1, -(2**31)])
def test_a_garbage_label_of_a_padded_row_stays_finite(label):
    value, grad = jax.value_and_grad(softmax_cross_entropy)(LOGITS[0], jnp.int32(label))
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_half_precision_logits_are_summed_in_float32():
    assert softmax_cross_entropy(LOGITS[0].astype(jnp.bfloat16), jnp.int32(1)).dtype == jnp.float32


@pytest.mark.parametrize("make", [classification_loss, regression_loss, binary_loss])
def test_a_loss_is_a_scalar_of_one_example_and_uses_the_transform(make):
    width = {classification_loss: 5, regression_loss: 5, binary_loss: 1}[make]
    params = jax.random.normal(KEY, (3, width))
    label = {classification_loss: jnp.int32(2), regression_loss: jnp.ones(5), binary_loss: jnp.int32(1)}[make]
    example = {"features": jnp.arange(3.0), "label": label}

    def apply(params, features, key):
        return features @ params

    loss = make(apply)
    assert loss(params, example).shape == ()
    doubled = make(apply, lambda features, key: 2 * features)
    np.testing.assert_allclose(doubled(params, example), loss(2 * params, example), rtol=1e-6)


def test_transform_and_dropout_get_different_keys_and_evaluation_gets_none():
    seen = []

    def transform(features, key):
        seen.append(key)
        return features

    def apply(params, features, key):
        seen.append(key)
        return features @ params

    example = {"features": jnp.arange(3.0), "label": jnp.int32(0)}
    params = jnp.ones((3, 5))
    classification_loss(apply, transform)(params, example, KEY)
    data = [tuple(jax.random.key_data(key).tolist()) for key in seen]
    assert len({*data, tuple(jax.random.key_data(KEY).tolist())}) == 3
    seen.clear()
    classification_metrics(apply, transform)(params, example)
    assert seen == [None, None]


def test_metrics_count_the_right_ones():
    labels = jnp.argmax(LOGITS, -1).at[:7].add(1) % 5
    metrics = classification_metrics(lambda params, features, key: features)
    out = jax.vmap(metrics, (None, 0))(None, {"features": LOGITS, "label": labels})
    assert out["correct"].dtype == jnp.float32
    assert out["correct"].sum() == 13
    bad = {"features": LOGITS[0].at[0].set(jnp.nan), "label": jnp.int32(0)}
    assert metrics(None, bad)["correct"] == 0
    error = regression_metrics(lambda params, features, key: features)
    assert error(None, {"features": jnp.array([3.0]), "label": jnp.float32(1.0)})["loss"] == 4


def test_the_key_reaches_the_model_so_that_dropout_differs_by_example():
    loss = classification_loss(linear)
    example = {"features": jnp.arange(3.0), "label": jnp.int32(0)}
    params = jnp.ones((3, 5))
    values = jax.vmap(loss, (None, None, 0))(params, example, jax.random.split(KEY, 8))
    assert len(set(values.tolist())) == 8
