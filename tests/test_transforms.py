"""Laws of preprocessing and augmentation: constants only, one example at a time."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpscale.data import as_source, open_source
from dpscale.data.transforms import (
    Transform,
    build_transform,
    example_keys,
    id_words,
    random_crop,
    random_flip,
)
from dpscale.errors import InputError

KEY = jax.random.wrap_key_data(np.array([1, 2], np.uint32), impl="threefry2x32")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)


def section(**options):
    defaults = {"mean": None, "std": None, "random_flip": False, "random_crop_padding": 0, "image_size": None}
    return SimpleNamespace(**{**defaults, **options})


def test_constants_are_applied_as_written():
    metadata = as_source((IMAGES, np.zeros(6, int))).metadata
    plain = build_transform(section(), metadata)
    np.testing.assert_allclose(plain(IMAGES[0], None), IMAGES[0] / 255.0, rtol=1e-6)
    for mean, std in [([0.5], [0.25]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), ([0.1, 0.2, 0.3], [2.0]), ([0.5], None)]:
        transform = build_transform(section(mean=mean, std=std), metadata)
        expected = (IMAGES[0] / 255.0 - np.array(mean)) / np.array(std or [1.0])
        out = transform(IMAGES[0], None)
        assert out.dtype == jnp.float32
        # Values up to 2.5 from terms of that size in float32: a few units in the last place.
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_digits_scale_by_sixteen_and_floats_not_at_all():
    assert build_transform(section(), open_source("digits/train").metadata).full_scale == 16
    floats = as_source((np.ones((2, 3), np.float32) * 7, np.zeros(2, int)))
    np.testing.assert_array_equal(
        build_transform(section(), floats.metadata)(floats.rows(np.arange(1))["features"][0], None), 7
    )


def test_tokens_pass_unchanged():
    tokens = as_source((np.array([[3, 70000]]), np.array([0])))
    out = build_transform(section(), tokens.metadata)(tokens.rows(np.arange(1))["features"][0], KEY)
    assert out.dtype == jnp.int32
    assert out.tolist() == [3, 70000]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_changing_one_record_changes_no_other_records_features(dtype):
    # The whole way: the source's rows, then the transform with every option, for the same ids. The record that changes
    # is made the largest by far, so that any mean, deviation or range of the data set changes with it.
    before = (IMAGES // 2).astype(dtype)
    other = before.copy()
    other[2] = 255
    ids = np.arange(6)
    results = []
    for images in (before, other):
        source = as_source((images, np.zeros(6, int)))
        options = section(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], random_flip=True, random_crop_padding=2)
        transform = build_transform(options, source.metadata)
        keys = example_keys(KEY, id_words(ids))
        results.append(np.asarray(jax.jit(jax.vmap(transform))(source.rows(ids)["features"], keys)))
    changed = [not np.array_equal(a, b) for a, b in zip(*results, strict=True)]
    assert changed == [False, False, True, False, False, False]


def test_augmentation_follows_the_example_and_not_its_place_in_the_batch():
    transform = Transform(full_scale=255.0, flip=True, crop_padding=2)
    order = np.array([5, 1, 3])

    @jax.jit
    def mapped(images, key, words):
        return jax.vmap(transform)(images, example_keys(key, words))

    whole = np.asarray(mapped(IMAGES, KEY, id_words(np.arange(6))))
    np.testing.assert_array_equal(whole[order], mapped(IMAGES[order], KEY, id_words(order)))
    other_step = jax.random.fold_in(KEY, 1)
    assert not np.array_equal(whole, mapped(IMAGES, other_step, id_words(np.arange(6))))


def test_example_keys_use_all_64_bits_of_the_index():
    ids = np.array([0, 1, 2**32, 2**32 + 1, 2**33, 2**62], np.int64)
    words = id_words(ids)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal((words[:, 0].astype(np.int64) << 32) + words[:, 1], ids)
    data = jax.random.key_data(example_keys(KEY, words))
    assert len({tuple(row.tolist()) for row in data}) == len(ids)


def test_a_flip_mirrors_half_of_the_time():
    keys = jax.random.split(KEY, 4000)
    image = jnp.asarray(IMAGES[0], jnp.float32)
    out = jax.jit(jax.vmap(random_flip, (None, 0)))(image, keys)
    same, mirrored = (out == image).all((1, 2, 3)), (out == image[:, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    # Binomial(4000, 1/2): standard deviation 31.6; five of them.
    assert abs(int(mirrored.sum()) - 2000) < 158


def test_a_crop_is_a_uniform_shift_of_the_padded_image():
    padding, fill = 2, -1.0
    image = jnp.asarray(IMAGES[0], jnp.float32)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), constant_values=fill)
    places = {
        padded[row : row + 8, column : column + 9].tobytes(): (row, column) for row in range(5) for column in range(5)
    }
    keys = jax.random.split(KEY, 5000)
    out = np.asarray(jax.jit(jax.vmap(lambda key: random_crop(image, padding, key, fill=fill)))(keys))
    counts = np.zeros((5, 5), int)
    for result in out:
        counts[places[result.tobytes()]] += 1
    # 200 expected in each of 25 places, standard deviation 13.9; five of them.
    assert np.abs(counts - 200).max() < 70


def test_cropped_in_pixels_are_black_after_normalisation():
    transform = Transform(full_scale=255.0, mean=(0.5,), std=(0.25,), crop_padding=3)
    white = np.full((8, 8, 1), 255, np.uint8)
    out = np.asarray(jax.jit(jax.vmap(transform, (None, 0)))(white, jax.random.split(KEY, 50)))
    assert sorted(set(np.unique(out.round(5)).tolist())) == [-2.0, 2.0]  # a float32 rounding or two aside


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "pattern"),
    [
        ((4, 4, 3), np.uint8, {"mean": [0.1, 0.2]}, "give one number, or 3"),
        ((4, 4, 3), np.uint8, {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0]}, "data.mean has 3 and data.std 2"),
        ((4, 4), np.uint8, {"random_flip": True}, "are for images"),
        ((7,), np.uint8, {"random_crop_padding": 1}, "are for images"),
        ((7,), np.int32, {"mean": [0.5]}, "real-valued features"),
    ],
)
def test_options_that_do_not_fit_the_features_are_refused(shape, dtype, options, pattern):
    source = as_source((np.zeros((2, *shape), dtype), np.zeros(2, int)))
    with pytest.raises(InputError, match=pattern):
        build_transform(section(**options), source.metadata)
