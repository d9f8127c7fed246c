"""The convolution and the normalisation that the residual networks share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError

# Between torch's and flax's names: a window's zero padding on each side, or "SAME".
Padding = str | Sequence[tuple[int, int]]
INITIAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def padded(size: int) -> Sequence[tuple[int, int]]:
    """Zero padding of (size - 1) // 2 on every side, as PyTorch models have it whatever the stride."""
    margin = (size - 1) // 2
    return [(margin, margin)] * 2


class StandardizedConv(nn.Module):
    """2-D convolution whose kernel is standardised over each output channel's inputs: [.., H, W, C] -> [.., H', W', F].

    Without `gain`: (w - mean) / sqrt(var + epsilon) (Qiao et al. 2019, arXiv 1903.10520; BiT). With `gain`: gain *
    (w - mean) / sqrt(max(fan_in * var, epsilon)), gain learnt per output channel (Brock et al. 2021, arXiv 2101.08692;
    De et al. 2022).
    """

    features: int
    size: int
    strides: int = 1
    padding: Padding = "SAME"
    use_bias: bool = False
    gain: bool = False
    epsilon: float = 1e-8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", INITIAL, shape)
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
        if self.gain:
            fan_in = self.size**2 * x.shape[-1]
            scale = jax.lax.rsqrt(jnp.maximum(variance * fan_in, self.epsilon))
            scale = scale * self.param("gain", nn.initializers.ones_init(), (self.features,))
        else:
            scale = jax.lax.rsqrt(variance + self.epsilon)
        kernel = ((kernel - mean) * scale).astype(self.dtype)
        rows = x.reshape(-1, *x.shape[-3:]).astype(self.dtype)
        y = jax.lax.conv_general_dilated(
            rows, kernel, (self.strides,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-3], *y.shape[1:])


def group_norm(x: jax.Array, groups: int, dtype: Any, name: str, epsilon: float = 1e-5) -> jax.Array:
    """GroupNorm over [.., H, W, C]; statistics are one example's own. `groups` is capped at the channels.

    Raises: InputError where the groups do not divide the channels.
    """
    channels = x.shape[-1]
    groups = min(groups, channels)
    if channels % groups:
        raise InputError(f"model.groups={groups} must divide the number of channels of every layer, but not {channels}")
    return nn.GroupNorm(groups, reduction_axes=(-3, -2, -1), epsilon=epsilon, dtype=dtype, name=name)(x)
