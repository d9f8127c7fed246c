"""Preprocessing and augmentation of one example, on the device; every constant comes from the config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.data.source import SourceMetadata
from dpscale.errors import InputError


@dataclass(frozen=True)
class Transform:
    """`transform(features, key)`: one example's features as float32 for the model; key None leaves out
    augmentation.

    In this order: divide by `full_scale`; subtract `mean` and divide by `std` (one number, or one per
    channel); mirror with probability 1/2; pad by `crop_padding` pixels with what a black pixel became and
    crop back at a random place; resize to `size` pixels on each side (bilinear, anti-aliased), where it is given.

    Guarantees: the result depends on this example, the constants here and the key alone, so that changing one
    record changes no other record's features. Constants must be public: a mean counted from the training data
    would break that. Integer features that are not 8-bit pixels (tokens) pass unchanged, as int32.
    """

    full_scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip: bool = False
    crop_padding: int = 0
    tokens: bool = False
    size: int | None = None

    def __call__(self, features: jax.Array, key: jax.Array | None) -> jax.Array:
        """One example, features[...] -> float32[...] of the same shape, or [size, size, C]."""
        if self.tokens:
            return features.astype(jnp.int32)
        x = self._normalise(features.astype(jnp.float32))
        if key is not None and (self.flip or self.crop_padding):
            x = self._augment(x, key)
        return x if self.size is None else jax.image.resize(x, (self.size, self.size, x.shape[-1]), "linear")

    def _augment(self, x: jax.Array, key: jax.Array) -> jax.Array:
        flip_key, crop_key = jax.random.split(key)
        if self.flip:
            x = random_flip(x, flip_key)
        if self.crop_padding:
            black = self._normalise(jnp.zeros_like(x))
            x = random_crop(x, self.crop_padding, crop_key, fill=black)
        return x

    def _normalise(self, x: jax.Array) -> jax.Array:
        # One multiplication and one addition, with constants folded here in double precision.
        scale = [1.0 / (self.full_scale * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return x * jnp.asarray(_scalar_or_channels(scale)) + jnp.asarray(_scalar_or_channels(shift))


def build_transform(config: Any, metadata: SourceMetadata) -> Transform:
    """The transform of a `[data]` section (mean, std, random_flip, random_crop_padding) for one data set's
    features.

    Raises: InputError where constants do not fit the channels, or images are asked for and the features are
    none.
    """
    shape = metadata.feature_shape
    mean, std = _constants(config.mean, 0.0), _constants(config.std, 1.0)
    mean, std = _same_length(mean, std), _same_length(std, mean)
    channels = shape[-1] if shape else 1
    if len(mean) not in (1, channels) or len(mean) != len(std):
        raise InputError(
            f"data.mean has {len(mean)} and data.std {len(std)} numbers, but an example has shape {shape}: "
            f"give one number, or {channels}, one for each channel"
        )
    crop = config.random_crop_padding
    if (config.random_flip or crop) and len(shape) != 3:
        raise InputError(
            f"data.random_flip and data.random_crop_padding are for images [height, width, channels], but "
            "an example has shape "
            f"{shape}: leave them out"
        )
    size = _resized_side(config.image_size, shape)
    kind = metadata.feature_dtype.kind
    tokens = kind == "i"
    if tokens and (config.mean is not None or config.std is not None):
        raise InputError(
            f"data.mean and data.std are for real-valued features, but these are {metadata.feature_dtype}: "
            "leave them out, or store the features as uint8 or float32"
        )
    return Transform(
        full_scale=metadata.full_scale,
        mean=mean,
        std=std,
        flip=config.random_flip,
        crop_padding=crop,
        tokens=tokens,
        size=size,
    )


def random_flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """One image [H, W, C], mirrored left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1, :], image)


def random_crop(image: jax.Array, padding: int, key: jax.Array, *, fill: jax.Array | float = 0.0) -> jax.Array:
    """One image [H, W, C], shifted by up to `padding` pixels in each direction, uniformly; new pixels are
    `fill`.

    `fill`: a number, or an image that each pixel outside is taken from.
    """
    height, width, _ = image.shape
    down, right = jax.random.randint(key, (2,), -padding, padding + 1)
    rows, columns = jnp.arange(height) + down, jnp.arange(width) + right
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    moved = jnp.take(jnp.take(image, rows, axis=0, mode="clip"), columns, axis=1, mode="clip")
    return jnp.where(inside[:, :, None], moved, fill)


def example_keys(key: jax.Array, id_words: jax.Array) -> jax.Array:
    """One key for each example, from the step's key and the example's index in the data set.

    key: a typed key. id_words: uint32[n, 2], high and low word (`id_words` makes them). Never from the
    position in the batch: augmentation then does not depend on the physical batch size, the devices or who
    else was drawn.
    """
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(id_words)


def id_words(ids: np.ndarray) -> np.ndarray:
    """Data-set indices int64[n] as uint32[n, 2] (high, low): the form that fits a device without 64-bit
    mode."""
    ids = np.asarray(ids, np.int64)
    return np.stack([ids >> 32, ids & 0xFFFFFFFF], axis=-1).astype(np.uint32)


def _resized_side(size: int | None, shape: tuple[int, ...]) -> int | None:
    """What images of `shape` are resized to on the device; None where they have that size as stored."""
    if size is None or shape[:2] == (size, size):
        return None
    if len(shape) != 3 or shape[0] != shape[1]:
        raise InputError(
            f"data.image_size={size} is for square images [side, side, channels] (or compressed "
            "ones, which are cropped), "
            f"but an example has shape {shape}: leave it out"
        )
    return size


def _scalar_or_channels(values: Sequence[float]) -> float | list[float]:
    return values[0] if len(values) == 1 else list(values)


def _constants(values: Sequence[float] | None, default: float) -> tuple[float, ...]:
    return (default,) if not values else tuple(float(v) for v in values)


def _same_length(values: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return values * len(other) if len(values) == 1 else values
