"""BERT with a classification head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.registry import register, register_preset, require_tokens
from dpscale.models.transformer import KERNEL, Transformer


@register("bert")
class Bert(Transformer):
    """Bidirectional encoder: int32[.., T] token ids -> float32[.., num_classes], from the first token's pooled state.

    With `inputs = "ids"` positions that hold `pad_token` are masked and every token has type 0. With
    `inputs = "ids_mask_types"` an example is int32[.., 3, T]: ids, attention mask (1: real), token types. Shorter
    examples than `context` use the first positions.
    Source: Devlin et al. 2019 (arXiv 1810.04805). Dropout is off by default: with privacy it costs more than it gives.
    """

    vocabulary: int = 30522
    mlp_width: int = 3072
    context: int = 512
    token_types: int = 2
    inputs: str = "ids"
    pad_token: int = 0
    norm_epsilon: float = 1e-12

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        ids, real, types = self._split(features)
        length = ids.shape[-1]
        if length > self.context:
            raise InputError(
                f"an example has {length} tokens, but model.context={self.context}: cut the texts, or raise it (the "
                "positions beyond a pre-trained file's own are then missing)"
            )
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, embedding_init=KERNEL, name="embedding")(ids)
        positions = self.param("positions", KERNEL, (self.context, self.width))
        x = x + positions[:length].astype(x.dtype)
        x = x + nn.Embed(self.token_types, self.width, dtype=self.dtype, embedding_init=KERNEL, name="types")(types)
        x = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm_embedding")(x)
        x = self.dropped(x, train)
        x = self.through_blocks(x, real[..., None, None, :], mlp_width=self.mlp_width, train=train, norm_after=True)
        x = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, kernel_init=KERNEL, name="pooler")(x[..., 0, :]))
        x = self.dropped(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=KERNEL, name="head")(x).astype(jnp.float32)

    def _split(self, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """ids, bool mask of real tokens, token types; each [.., T]."""
        if self.inputs == "ids":
            require_tokens(features, "bert", 1)
            return features, features != self.pad_token, jnp.zeros_like(features)
        if self.inputs != "ids_mask_types":
            raise InputError(f'model.inputs={self.inputs!r} must be "ids" or "ids_mask_types"')
        require_tokens(features, "bert", 2)
        if features.shape[-2] != 3:
            raise InputError(
                f'model.inputs="ids_mask_types" takes examples of shape [3, T], but one has shape {features.shape}: '
                'stack ids, attention mask and token types, or use model.inputs="ids"'
            )
        return features[..., 0, :], features[..., 1, :] != 0, features[..., 2, :]


register_preset("bert_base", "bert")
