"""A decoder in the style of GPT-2: the output layer is the embedding."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.registry import register, register_preset, require_tokens
from dpscale.models.transformer import KERNEL, Transformer


@register("gpt")
class Gpt(Transformer):
    """Causal language model: int32[.., T] token ids -> float32[.., T, vocabulary], the next token's logits.

    Source: Radford et al. 2019 (GPT-2): pre-norm blocks, learned positions, tanh-approximated GELU, tied embeddings.
    `vocabulary` 0 is the data's, which reaches the model as `num_classes`; a pre-trained model has its own.
    """

    language_model = True

    vocabulary: int = 0
    width: int = 256
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    context: int = 1024
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_tokens(features, "gpt", 1)
        length = features.shape[-1]
        if length > self.context:
            raise InputError(f"an example has {length} tokens, but model.context={self.context}: cut it, or raise it")
        embedding = nn.Embed(self._vocabulary(), self.width, dtype=self.dtype, embedding_init=KERNEL, name="embedding")
        positions = self.param("positions", KERNEL, (self.context, self.width))
        x = embedding(features) + positions[:length].astype(self.dtype)
        x = self.dropped(x, train)
        x = self.through_blocks(
            x, jnp.tril(jnp.ones((length, length), bool)), mlp_width=self.mlp_ratio * self.width, train=train
        )
        x = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(x)
        return embedding.attend(x).astype(jnp.float32)

    def _vocabulary(self) -> int:
        if self.vocabulary == 0 and self.num_classes == 0:
            raise InputError(
                "the vocabulary's size is not known, and it is not read off the data: set model.vocabulary"
            )
        return self.vocabulary or self.num_classes


register_preset("gpt2_small", "gpt", vocabulary=50257, width=768, depth=12, heads=12)
