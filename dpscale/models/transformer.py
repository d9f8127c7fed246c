"""What ViT, BERT and GPT-2 share: self-attention, a block, a stack of blocks and the options of it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.activations import activation

KERNEL = nn.initializers.truncated_normal(0.02)


class SelfAttention(nn.Module):
    """Multi-head self-attention: float[.., T, D] -> float[.., T, D].

    `mask`: bool, broadcastable to [.., heads, T queries, T keys], True where a query may look, or None. Softmax in
    float32 whatever `dtype` is. Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        each = (self.heads, width // self.heads)

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, kernel_init=KERNEL, name=name)(x)
            return y.reshape(*y.shape[:-1], *each)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("...qhd,...khd->...hqk", query * each[1] ** -0.5, key).astype(jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        return nn.Dense(width, dtype=self.dtype, kernel_init=KERNEL, name="out")(y.reshape(x.shape))


class Block(nn.Module):
    """Attention, then two dense layers, each with a residual; LayerNorm before them, or with `norm_after` behind.

    `(x, mask) -> (x, None)`, the form that `nn.scan` takes.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    norm_after: bool
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        norm_attention = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm_attention")
        norm_mlp = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm_mlp")
        attention = SelfAttention(self.heads, self.dtype, name="attention")
        if self.norm_after:
            x = norm_attention(x + self._drop(attention(x, mask)))
            return norm_mlp(x + self._drop(self._mlp(x))), None
        x = x + self._drop(attention(norm_attention(x), mask))
        return x + self._drop(self._mlp(norm_mlp(x))), None

    def _mlp(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(self.mlp_width, dtype=self.dtype, kernel_init=KERNEL, name="mlp_in")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=KERNEL, name="mlp_out")(
            activation(self.activation)(y)
        )

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=not self.train)(x)


class Transformer(nn.Module):
    """The fields that ViT, BERT and GPT-2 share, and their stack of blocks. A model gives its own defaults.

    `scan` compiles one block instead of `depth`; `remat` keeps only the blocks' inputs for the backward pass.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def through_blocks(
        self, x: jax.Array, mask: jax.Array | None, *, mlp_width: int, train: bool, norm_after: bool = False
    ) -> jax.Array:
        """float[.., T, D] through all blocks; call it inside a compact method. `mask` as in `SelfAttention`.

        The parameters are `blocks_0` .. `blocks_{depth-1}`, or with `scan` one `blocks` whose leaves have a leading
        axis of `depth`.
        """
        if self.width % self.heads:
            raise InputError(f"model.width={self.width} must be a multiple of model.heads={self.heads}")
        options = {
            "heads": self.heads,
            "mlp_width": mlp_width,
            "activation": self.activation,
            "norm_epsilon": self.norm_epsilon,
            "norm_after": norm_after,
            "dropout": self.dropout,
            "train": train,
            "dtype": self.dtype,
        }
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=self.depth,
            )
            return stack(**options, name="blocks")(x, mask)[0]
        for index in range(self.depth):
            x, _ = block(**options, name=f"blocks_{index}")(x, mask)
        return x

    def dropped(self, x: jax.Array, train: bool) -> jax.Array:
        """`x` with dropout; call it inside a compact method."""
        return nn.Dropout(self.dropout, deterministic=not train)(x)
