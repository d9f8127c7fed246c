"""Residual networks with GroupNorm: He et al.'s first and second version, and BiT."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.convolution import INITIAL, StandardizedConv, group_norm, padded
from dpscale.models.registry import register, register_preset, require_image

FIRST_CHANNELS = 64


@register("resnet")
class ResNet(nn.Module):
    """ResNet with GroupNorm in place of BatchNorm: [.., H, W, 3] -> float32[.., num_classes]; inputs of 32 pixels up.

    `version = 1`: He et al. 2015 (arXiv 1512.03385), stride in the 3 x 3 convolution (timm's resnet50_gn).
    `version = 2`: He et al. 2016 (arXiv 1603.05027), norm and ReLU before each convolution, as BiT has it (Kolesnikov
    et al. 2020, arXiv 1912.11370) with `weight_standardization`.
    `objax_strides`: Objax's form of version 2 (dp-imagenet's, Kurakin et al. 2022, arXiv 2201.12328): each stage's
    stride is in its last block, the stages of bottlenecks have strides 2, 2, 2, 1, and shapes that fit take no
    projection in the first stage of basic blocks.

    Blocks are numbered through: `blocks_0`, `blocks_1`, ...
    """

    num_classes: int
    stages: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    version: int = 1
    width_factor: int = 1
    channels: int = FIRST_CHANNELS
    groups: int = 32
    weight_standardization: bool = False
    objax_strides: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_image(features, "resnet")
        self._check()
        x = self._conv(self.channels * self.width_factor, 7, 2, "stem", padded(7))(features)
        if self.version == 1:
            x = nn.relu(group_norm(x, self.groups, self.dtype, "norm_stem"))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padded(3))  # pyright: ignore[reportArgumentType]
        else:
            margins = [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)]
            x = nn.max_pool(jnp.pad(x, margins), (3, 3), strides=(2, 2))
        index = 0
        for stage, count in enumerate(self.stages):
            for place in range(count):
                x = self._block(x, stage, place, count, index)
                index += 1
        if self.version == 2:
            x = nn.relu(group_norm(x, self.groups, self.dtype, "norm"))
        x = x.mean(axis=(-3, -2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _block(self, x: jax.Array, stage: int, place: int, count: int, index: int) -> jax.Array:
        out = self.channels * self.width_factor * 2**stage * (4 if self.bottleneck else 1)
        stride = 1 if stage == 0 else 2
        if self.objax_strides:
            if self.bottleneck:
                stride = (2, 2, 2, 1)[stage]
            stride = stride if place == count - 1 else 1
        else:
            stride = stride if place == 0 else 1
        options = {"groups": self.groups, "standardize": self.weight_standardization, "dtype": self.dtype}
        project = place == 0 and (x.shape[-1] != out or (stride > 1 and not self.objax_strides))
        if self.objax_strides and not self.bottleneck:
            project = place == 0 and stage > 0
        name = f"blocks_{index}"
        if self.version == 1:
            return _PostActivation(out, stride, self.bottleneck, project, **options, name=name)(x)
        options["stride_last"] = self.objax_strides
        return _PreActivation(out, stride, self.bottleneck, project, **options, name=name)(x)

    def _conv(self, features: int, size: int, stride: int, name: str, padding: Any) -> nn.Module:
        return _conv(features, size, stride, name, self.weight_standardization, self.dtype, padding)

    def _check(self) -> None:
        if self.version not in (1, 2):
            raise InputError(f"model.version={self.version} must be 1 or 2")
        if self.objax_strides and (self.version != 2 or len(self.stages) != 4):
            raise InputError("model.objax_strides is for model.version=2 with four stages")


class _PostActivation(nn.Module):
    """conv, norm, ReLU, .., and the sum goes through a ReLU (version 1)."""

    out: int
    stride: int
    bottleneck: bool
    project: bool
    groups: int
    standardize: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        if self.project:
            shortcut = self._conv(self.out, 1, self.stride, "projection")(x)
            shortcut = group_norm(shortcut, self.groups, self.dtype, "norm_projection")
        layers = _layers(self.out, self.stride, self.bottleneck)
        for i, (features, size, stride) in enumerate(layers):
            x = group_norm(self._conv(features, size, stride, f"conv_{i}")(x), self.groups, self.dtype, f"norm_{i}")
            x = nn.relu(x) if i < len(layers) - 1 else x
        return nn.relu(x + shortcut)

    def _conv(self, features: int, size: int, stride: int, name: str) -> nn.Module:
        return _conv(features, size, stride, name, self.standardize, self.dtype, padded(size))


class _PreActivation(nn.Module):
    """norm, ReLU, conv, ..; the projection takes what the first ReLU gave (version 2)."""

    out: int
    stride: int
    bottleneck: bool
    project: bool
    groups: int
    standardize: bool
    dtype: Any
    stride_last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x[..., :: self.stride, :: self.stride, :]
        layers = _layers(self.out, self.stride, self.bottleneck, self.stride_last)
        for i, (features, size, stride) in enumerate(layers):
            x = nn.relu(group_norm(x, self.groups, self.dtype, f"norm_{i}"))
            if i == 0 and self.project:
                shortcut = self._conv(self.out, 1, self.stride, "projection")(x)
            x = self._conv(features, size, stride, f"conv_{i}")(x)
        return x + shortcut

    def _conv(self, features: int, size: int, stride: int, name: str) -> nn.Module:
        return _conv(features, size, stride, name, self.standardize, self.dtype, padded(size))


def _layers(out: int, stride: int, bottleneck: bool, stride_last: bool = False) -> list[tuple[int, int, int]]:
    """(features, kernel size, stride) of each convolution of a block."""
    if bottleneck:
        return [(out // 4, 1, 1), (out // 4, 3, stride), (out, 1, 1)]
    return [(out, 3, 1), (out, 3, stride)] if stride_last else [(out, 3, stride), (out, 3, 1)]


def _conv(features: int, size: int, stride: int, name: str, standardize: bool, dtype: Any, padding: Any) -> nn.Module:
    if standardize:
        return StandardizedConv(features, size, stride, padding, dtype=dtype, name=name)
    return nn.Conv(
        features, (size, size), stride, padding=padding, use_bias=False, kernel_init=INITIAL, dtype=dtype, name=name
    )


register_preset("resnet18", "resnet", stages=(2, 2, 2, 2))
register_preset("resnet34", "resnet", stages=(3, 4, 6, 3))
register_preset("resnet50", "resnet", stages=(3, 4, 6, 3), bottleneck=True)
register_preset("bit_resnet50", "resnet", stages=(3, 4, 6, 3), bottleneck=True, version=2, weight_standardization=True)
