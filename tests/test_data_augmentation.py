"""Augmentation multiplicity: K views of one example are averaged before the clip, and never leave the example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpscale.clipping import clipped_grad
from dpscale.config import config_from_dict
from dpscale.data import as_source
from dpscale.data.source import SourceMetadata
from dpscale.data.transforms import build_transform, example_keys, id_words
from dpscale.errors import InputError
from dpscale.losses import classification_loss
from dpscale.models import as_functional
from dpscale.task import build_task

RNG = np.random.default_rng(11)
IMAGES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
SOURCE = as_source((IMAGES, np.arange(6) % 4), num_classes=4)
KEY = jax.random.wrap_key_data(np.array([3, 4], np.uint32), impl="threefry2x32")
CLIP = 0.1


def config(views, **data):
    return config_from_dict(
        {
            "data": {"random_flip": True, "random_crop_padding": 2, "augmentation_multiplicity": views, **data},
            "training": {"steps": 1},
            "privacy": {"enabled": False, "sampling_rate": 1.0},
        }
    )


class Small(nn.Module):
    """One of each kind of layer that the fast routes know."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.tanh(nn.GroupNorm(2, reduction_axes=(-3, -2, -1))(x))
        return nn.Dense(4)(x.reshape(-1))


def task(views, **data):
    return build_task(config(views, **data), SOURCE.metadata, model=Small())


def batch(rows=range(6), images=IMAGES):
    rows = np.array(rows)
    keys = example_keys(KEY, id_words(rows))
    return {"features": jnp.asarray(images[rows]), "label": jnp.asarray(rows % 4, jnp.int32)}, keys


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def clipped(views, method="auto"):
    examples, keys = batch()
    made = task(views)
    summed = clipped_grad(made.loss, CLIP, method)
    return flat(jax.jit(summed)(made.params, examples, jnp.ones(len(examples["label"]), bool), keys).grad_sum)


@functools.cache
def mean_of_views(views):
    """By hand: the gradient of each view of each example, their mean, the clip, the sum."""
    made, examples_and_keys = task(1), batch()
    transform = build_transform(config(1).data, SOURCE.metadata)
    apply = as_functional(Small(), jax.eval_shape(lambda x: transform(x, None), IMAGES[0])).apply
    of_view = jax.grad(classification_loss(apply, transform))
    of_example = jax.vmap(of_view, (None, None, 0))
    keys = jax.vmap(lambda key: jax.random.split(key, views))(examples_and_keys[1])
    grads = jax.jit(jax.vmap(of_example, (None, 0, 0)))(made.params, examples_and_keys[0], keys)
    total = 0.0
    for row in range(6):
        of_row = [leaf[row].reshape(views, -1) for leaf in jax.tree.leaves(grads)]
        mean = np.concatenate(of_row, axis=1).mean(axis=0)
        total = total + mean * min(1.0, CLIP / np.linalg.norm(mean))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "materialize"])
def test_the_mean_of_the_views_gradients_is_what_is_clipped(method):
    expected = mean_of_views(3)
    # The engine clips by an upper bound of the norm, which may exceed it by a few of its rounding slacks of 2**-16.
    np.testing.assert_allclose(clipped(3, method=method), expected, rtol=0, atol=6 * CLIP * 2.0**-14)
    # Clipping each view by itself would be another sum; so would one view.
    assert np.abs(clipped(1) - expected).max() > 1e-3


def test_all_views_of_one_example_move_the_sum_by_at_most_the_clip_norm():
    made, (examples, keys) = task(3), batch()
    summed = jax.jit(clipped_grad(made.loss, CLIP))
    whole = flat(summed(made.params, examples, jnp.ones(6, bool), keys).grad_sum)
    for row in range(6):
        without = flat(summed(made.params, examples, jnp.arange(6) != row, keys).grad_sum)
        moved = np.linalg.norm(whole - without)
        assert moved <= CLIP * (1 + 2.0**-16) + 1e-6
        assert moved > 0.9 * CLIP  # these gradients are all above the bound


def test_views_never_reach_another_example():
    other = IMAGES.copy()
    other[2] = 255 - other[2]
    made = task(4)
    jitted = jax.jit(jax.vmap(jax.grad(made.loss), (None, 0, 0)))
    a, b = (jitted(made.params, *batch(images=images)) for images in (IMAGES, other))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        same = [np.array_equal(x[row], y[row]) for row in range(6)]
        assert same[:2] + same[3:] == [True] * 5
    assert not np.array_equal(jax.tree.leaves(a)[0][2], jax.tree.leaves(b)[0][2])


def test_one_view_draws_what_it_drew_without_multiplicity():
    made = task(1)
    transform = build_transform(config(1).data, SOURCE.metadata)
    apply = as_functional(Small(), jax.eval_shape(lambda x: transform(x, None), IMAGES[0])).apply
    examples, keys = batch([0])
    one = {name: array[0] for name, array in examples.items()}
    with_views, without = made.loss, classification_loss(apply, transform)
    assert jax.jit(with_views)(made.params, one, keys[0]) == jax.jit(without)(made.params, one, keys[0])


def test_views_are_distinct_and_follow_the_example_and_the_step():
    seen = []
    transform = build_transform(config(8).data, SOURCE.metadata)

    def record(params, features, key):
        seen.append(features)
        return jnp.zeros(4) + params

    loss = classification_loss(record, transform, views=8)
    examples, keys = batch()
    one = {name: array[0] for name, array in examples.items()}
    views = jax.jit(jax.vmap(lambda key: transform(one["features"], jax.random.split(key)[0])))(
        jax.random.split(keys[0], 8)
    )
    assert len({np.asarray(view).tobytes() for view in views}) > 4
    assert np.isfinite(jax.jit(loss)(jnp.zeros(()), one, keys[0]))
    assert len(seen) == 1  # one traced pass over all views, not eight


def test_the_fast_routes_take_views_as_one_more_axis_of_positions():
    examples, keys = batch()
    routes = {}
    for views in (1, 4):
        made = task(views)
        table = clipped_grad(made.loss, CLIP).explain(made.params, examples, keys)
        routes[views] = {layer.name: (layer.route, layer.positions) for layer in table.layers}
    for name, (route, positions) in routes[4].items():
        if "kernel" in name:
            assert route in ("ghost", "instantiated", "outer"), f"{name} takes {route}"
            assert positions == 4 * routes[1][name][1]
    assert {name for name in routes[4] if "kernel" in name} == {name for name in routes[1] if "kernel" in name}


def test_held_out_metrics_see_the_example_as_it_is():
    examples, _ = batch([1])
    one = {name: array[0] for name, array in examples.items()}
    made = [task(views) for views in (1, 6)]
    assert made[0].metrics(made[0].params, one) == made[1].metrics(made[1].params, one)


def test_views_without_augmentation_and_beside_an_own_loss_are_refused():
    with pytest.raises(InputError, match="without augmentation costs as many passes over equal views"):
        config(4, random_flip=False, random_crop_padding=0)
    with pytest.raises(InputError, match="average over the views in your loss"):
        build_task(config(4), SOURCE.metadata, model={"w": np.zeros(3, np.float32)}, loss=lambda params, example: 0.0)


def test_images_of_constant_size_are_resized_on_the_device():
    transform = build_transform(config(1, image_size=16).data, SOURCE.metadata)
    flat_image = np.full((8, 8, 3), 51, np.uint8)
    out = jax.jit(lambda x, key: transform(x, key))(flat_image, KEY)
    assert out.shape == (16, 16, 3)
    inner = np.asarray(jax.jit(lambda x: transform(x, None))(flat_image))
    np.testing.assert_allclose(inner, 0.2, atol=1e-6)
    assert build_transform(config(1, image_size=8).data, SOURCE.metadata).size is None
    wide = as_source((np.zeros((2, 4, 8, 3), np.uint8), np.zeros(2, int)))
    with pytest.raises(InputError, match="for square images"):
        build_transform(config(1, image_size=8).data, wide.metadata)


class Reader(nn.Module):
    """Something with a vocabulary, as language models have."""

    vocabulary: int = 9
    pad_token: int = 0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.Embed(self.vocabulary, 3)(x).mean(0))


def test_a_model_of_another_vocabulary_or_padding_than_the_data_is_refused():
    metadata = SourceMetadata(
        "texts", (5,), np.dtype(np.int32), "class", num_classes=4, vocabulary_size=9, padding_token=0
    )
    assert (
        build_task(config(1, random_flip=False, random_crop_padding=0), metadata, model=Reader()).num_parameters
        == 9 * 3 + 16
    )
    with pytest.raises(InputError, match=r"texts has token ids below 9, but model.vocabulary=8"):
        build_task(config(1, random_flip=False, random_crop_padding=0), metadata, model=Reader(vocabulary=8))
    with pytest.raises(InputError, match=r"filled up with token 0, but model.pad_token=1"):
        build_task(config(1, random_flip=False, random_crop_padding=0), metadata, model=Reader(pad_token=1))


def test_smoothing_of_what_has_no_classes_is_refused_and_not_left_out_in_silence():
    smooth = config_from_dict(
        {
            "training": {"steps": 1, "label_smoothing": 0.1},
            "privacy": {"enabled": False, "sampling_rate": 1.0},
        }
    )
    values = as_source((np.zeros((6, 3), np.float32), np.zeros(6, np.float32)))
    with pytest.raises(InputError, match=r"label_smoothing=0\.1 .* are of kind 'value'"):
        build_task(smooth, values.metadata, model=nn.Dense(1))
    with pytest.raises(InputError, match="a loss was given"):
        build_task(smooth, SOURCE.metadata, model=Small(), loss=lambda params, example: jnp.zeros(()))
