"""Vision transformers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.registry import register, register_preset, require_image
from dpscale.models.transformer import KERNEL, Transformer


@register("vit")
class ViT(Transformer):
    """Patches, learned positions, pre-norm transformer blocks, norm, dense head. [.., H, W, C] -> float32[.., classes].

    With `class_token` the published architecture (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the
    presets); without, the mean over patches takes the token's place, which is better for small images.
    """

    width: int = 192
    depth: int = 6
    heads: int = 3
    patch_size: int = 4
    mlp_ratio: int = 4
    class_token: bool = False

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        self._check(features)
        x = _patches(features, self.patch_size)
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embedding")(x)
        if self.class_token:
            token = self.param("class_token", nn.initializers.zeros_init(), (1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (*x.shape[:-2], 1, self.width)).astype(x.dtype), x], axis=-2)
        positions = self.param("positions", KERNEL, (x.shape[-2], self.width))
        x = self.dropped(x + positions.astype(x.dtype), train)
        x = self.through_blocks(x, None, mlp_width=self.mlp_ratio * self.width, train=train)
        if self.class_token:
            x = x[..., 0, :]
        x = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(x)
        x = x if self.class_token else x.mean(axis=-2)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _check(self, features: jax.Array) -> None:
        require_image(features, "vit")
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


for _name, _width, _depth, _heads in (
    ("vit_tiny16", 192, 12, 3),
    ("vit_small16", 384, 12, 6),
    ("vit_b16", 768, 12, 12),
    ("vit_l16", 1024, 24, 16),
):
    register_preset(_name, "vit", width=_width, depth=_depth, heads=_heads, patch_size=16, class_token=True)
