"""Convolutional networks for small images: a tanh one for MNIST-sized data, and one with GroupNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.activations import activation
from dpscale.models.registry import register, require_image


@register("cnn")
class CNN(nn.Module):
    """Two convolutions and two dense layers, with tanh by default: 26,010 parameters on 28 x 28 x 1 with 10 classes.

    Source: Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential Privacy" (AAAI
    2021), table 1: bounded activations keep per-example gradients small. [..., H, W, C] -> float32[...,
    num_classes].
    """

    num_classes: int
    channels: tuple[int, ...] = (16, 32)
    width: int = 32
    activation: str = "tanh"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_image(features, "cnn")
        if min(features.shape[-3:-1]) < 14:
            raise InputError(
                f"model.name='cnn' takes images of at least 14 x 14 pixels, but an example has shape "
                f"{features.shape}: "
                "use cnn_groupnorm or mlp"
            )
        if len(self.channels) != 2:
            raise InputError(f"model.channels={list(self.channels)} of the cnn must be two numbers, such as [16, 32]")
        first, second = self.channels
        squash = activation(self.activation)
        x = squash(nn.Conv(first, (8, 8), strides=2, padding="SAME", dtype=self.dtype)(features))
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        x = squash(nn.Conv(second, (4, 4), strides=2, padding="VALID", dtype=self.dtype)(x))
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        x = x.reshape(*x.shape[:-3], -1)
        x = squash(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


@register("cnn_groupnorm")
class GroupNormCNN(nn.Module):
    """Blocks of 3 x 3 convolution, GroupNorm and activation, halved in size between them, then a global mean and a
    dense layer.

    GroupNorm's statistics are one example's own. [..., H, W, C] -> float32[..., num_classes].
    """

    num_classes: int
    channels: tuple[int, ...] = (32, 64, 128)
    groups: int = 8
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_image(features, "cnn_groupnorm")
        uneven = [width for width in self.channels if width % self.groups]
        if uneven:
            raise InputError(f"model.groups={self.groups} must divide every one of model.channels, but not {uneven[0]}")
        x = features
        for index, width in enumerate(self.channels):
            x = nn.Conv(width, (3, 3), strides=1 if index == 0 else 2, dtype=self.dtype)(x)
            # flax would take the first axis of an unbatched image for the batch: name the axes of one
            # example.
            x = nn.GroupNorm(self.groups, reduction_axes=(-3, -2, -1), dtype=self.dtype)(x)
            x = activation(self.activation)(x)
        x = x.mean(axis=(-3, -2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
