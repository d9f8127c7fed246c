"""The models that clipping is measured on, for a batch [B, ...] or, as `x[None]`, for one example."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Workload:
    """`logits(params, x[B, ...]) -> [B, ..., classes]`; targets are int[B] or int[B, T]."""

    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    inputs: jax.Array
    targets: jax.Array

    def batch_losses(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """float32[B]; a text's loss is the mean over its positions."""
        x, y = batch
        log_p = jax.nn.log_softmax(self.logits(params, x).astype(jnp.float32))
        losses = -jnp.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]
        return losses if losses.ndim == 1 else losses.mean(-1)

    def loss(self, params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The loss of one example, without the batch axis."""
        return self.batch_losses(params, jax.tree.map(lambda leaf: leaf[None], example))[0]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for _ in range(4):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class WideResNet(nn.Module):
    """WRN-depth-width with GroupNorm (Zagoruyko & Komodakis 2016; GroupNorm as in De et al. 2022)."""

    depth: int = 16
    widen: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for stage, width in enumerate((16, 32, 64)):
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage and not block else 1
                h = nn.relu(nn.GroupNorm(16)(x))
                x = nn.Conv(width * self.widen, (1, 1), (stride, stride), use_bias=False)(h) if not block else x
                h = nn.Conv(width * self.widen, (3, 3), (stride, stride), use_bias=False)(h)
                x = x + nn.Conv(width * self.widen, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(16)(h)))
        return nn.Dense(10)(nn.relu(nn.GroupNorm(16)(x)).mean((1, 2)))


class Block(nn.Module):
    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, h, mask=mask)
        h = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(h)), None


class ViT(nn.Module):
    width: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            x, _ = Block(self.heads)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class LanguageModel(nn.Module):
    """A byte-level decoder whose output layer is its embedding."""

    width: int = 256
    depth: int = 4
    heads: int = 4
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(256, self.width)
        x = embed(ids) + self.param("position", nn.initializers.normal(0.02), (ids.shape[1], self.width))
        if self.scan:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = stack(self.heads, causal=True)(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Block(self.heads, causal=True)(x)
        return embed.attend(nn.LayerNorm()(x))


IMAGES = {
    "mlp": (MLP(), 64, 32),
    "cnn": (CNN(), 64, 32),
    "wrn-16-4": (WideResNet(), 16, 32),
    "vit-tiny-4": (ViT(), 16, 32),  # 64 patches
    "vit-tiny-16": (ViT(patch=16), 6, 224),  # 196 patches
}
TEXTS = {
    "lm-128": (LanguageModel(), 16, 128),
    "lm-1024": (LanguageModel(), 2, 1024),
    "scan-lm": (LanguageModel(scan=True, depth=6), 16, 128),
}
NAMES = [*IMAGES, *TEXTS]


def workload(name: str, batch: int | None = None) -> Workload:
    """The named model with random inputs; `batch` overrides its usual batch size."""
    keys = jax.random.split(jax.random.key(0), 3)
    if name in IMAGES:
        module, size, side = IMAGES[name]
        x = jax.random.normal(keys[1], (batch or size, side, side, 3))
        y = jax.random.randint(keys[2], (batch or size,), 0, 10)
    else:
        module, size, length = TEXTS[name]
        text = jax.random.randint(keys[1], (batch or size, length + 1), 0, 256)
        x, y = text[:, :-1], text[:, 1:]
    params = module.init(keys[0], x[:1])["params"]
    return Workload(params, lambda p, inputs: jnp.asarray(module.apply({"params": p}, inputs)), x, y)
