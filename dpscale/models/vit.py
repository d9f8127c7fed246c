"""A small vision transformer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.registry import register, require_image


class _Block(nn.Module):
    heads: int
    mlp_ratio: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.MultiHeadAttention(num_heads=self.heads, dtype=self.dtype, name="attention")(y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_ratio * width, dtype=self.dtype)(y))
        y = nn.Dense(width, dtype=self.dtype)(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


@register("vit")
class ViT(nn.Module):
    """Patches, learned positions, pre-norm transformer blocks, mean over patches, dense head.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), with mean pooling instead of a
    class token. [..., H, W, C] -> float32[..., num_classes].
    """

    num_classes: int
    width: int = 192
    depth: int = 6
    heads: int = 3
    patch_size: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        self._check(features)
        x = _patches(features, self.patch_size)
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embedding")(x)
        positions = self.param("positions", nn.initializers.normal(0.02), (x.shape[-2], self.width))
        x = x + positions.astype(x.dtype)
        for _ in range(self.depth):
            x = _Block(self.heads, self.mlp_ratio, self.dropout, self.dtype)(x, train)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(axis=-2)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _check(self, features: jax.Array) -> None:
        require_image(features, "vit")
        if self.width % self.heads:
            raise InputError(f"model.width={self.width} must be a multiple of model.heads={self.heads}")
        height, width = features.shape[-3:-1]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(f"model.patch_size={self.patch_size} must divide the image of {height} x {width} pixels")


def _patches(images: jax.Array, size: int) -> jax.Array:
    """[..., H, W, C] -> [..., H/size * W/size, size * size * C]."""
    *batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(*batch, rows, size, columns, size, channels)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*batch, rows * columns, size * size * channels)
