"""Wide residual networks for small images, as differentially private training has them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.activations import activation
from dpscale.models.convolution import INITIAL, StandardizedConv, group_norm
from dpscale.models.registry import register, register_preset, require_image

FIRST_CHANNELS = 16


@register("wrn")
class WideResNet(nn.Module):
    """WRN-depth-width with GroupNorm: [.., H, W, C] -> float32[.., num_classes].

    Source: De et al. 2022 (arXiv 2204.13650), section 3 and their released model: the activation comes before the norm,
    16 groups, convolutions with bias and standardised weights with a learnt gain. `weight_standardization = false`
    takes ordinary convolutions. Zagoruyko and Komodakis 2016 (arXiv 1605.07146) is the network without these.
    """

    num_classes: int
    depth: int = 16
    width: int = 4
    groups: int = 16
    activation: str = "relu"
    weight_standardization: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_image(features, "wrn")
        if self.depth < 10 or (self.depth - 4) % 6:
            raise InputError(f"model.depth={self.depth} of a wide ResNet must be 6 n + 4: 10, 16, 22, 28, 40, ..")
        x = self._conv(FIRST_CHANNELS, 3, 1, "stem")(features)
        each = (self.depth - 4) // 6
        for index in range(3 * each):
            stage, place = divmod(index, each)
            out = FIRST_CHANNELS * self.width * 2**stage
            x = self._block(x, out, 2 if stage and not place else 1, place == 0, f"blocks_{index}")
        x = group_norm(activation(self.activation)(x), self.groups, self.dtype, "norm").mean(axis=(-3, -2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _block(self, x: jax.Array, out: int, stride: int, project: bool, name: str) -> jax.Array:
        options = (self.groups, self.activation, self.weight_standardization, self.dtype)
        return _WideBlock(out, stride, project, *options, name=name)(x)

    def _conv(self, features: int, size: int, stride: int, name: str) -> nn.Module:
        return _conv(features, size, stride, name, self.weight_standardization, self.dtype)


class _WideBlock(nn.Module):
    out: int
    stride: int
    project: bool
    groups: int
    activation: str
    standardize: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        if self.project:
            shortcut = self._prepared(x, "norm_projection")
            shortcut = _conv(self.out, 1, self.stride, "projection", self.standardize, self.dtype)(shortcut)
        for i, stride in enumerate((self.stride, 1)):
            x = self._prepared(x, f"norm_{i}")
            x = _conv(self.out, 3, stride, f"conv_{i}", self.standardize, self.dtype)(x)
        return x + shortcut

    def _prepared(self, x: jax.Array, name: str) -> jax.Array:
        return group_norm(activation(self.activation)(x), self.groups, self.dtype, name)


def _conv(features: int, size: int, stride: int, name: str, standardize: bool, dtype: Any) -> nn.Module:
    if standardize:
        return StandardizedConv(
            features, size, stride, "SAME", use_bias=True, gain=True, epsilon=1e-4, dtype=dtype, name=name
        )
    return nn.Conv(features, (size, size), stride, padding="SAME", kernel_init=INITIAL, dtype=dtype, name=name)


register_preset("wrn16_4", "wrn", depth=16, width=4)
register_preset("wrn40_4", "wrn", depth=40, width=4)
