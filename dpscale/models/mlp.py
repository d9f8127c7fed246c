"""Multi-layer perceptron."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.models.activations import activation
from dpscale.models.registry import register


@register("mlp")
class MLP(nn.Module):
    """Dense layers of `widths` with the activation, then one of `num_classes` outputs; the example is flattened first.

    One example of any shape -> float32[num_classes]. With `example_ndim` set, leading axes beyond that many
    are batch axes. With `zero_head` the last layer starts at zero; without `widths` that is logistic regression.
    """

    num_classes: int
    widths: tuple[int, ...] = (256, 256)
    activation: str = "relu"
    dropout: float = 0.0
    zero_head: bool = False
    dtype: Any = jnp.float32
    example_ndim: int = -1

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        batch = features.shape[: features.ndim - self.example_ndim] if self.example_ndim >= 0 else ()
        x = features.reshape(*batch, -1)
        for width in self.widths:
            x = activation(self.activation)(nn.Dense(width, dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        initial = nn.initializers.zeros_init() if self.zero_head else nn.initializers.lecun_normal()
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=initial)(x).astype(jnp.float32)
