"""The non-private sum of gradients: what `privacy.enabled = false` trains with, in the same loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.example import ClippedSum, replace_rows, select_rows


def summed_grad(loss_fn: Callable[..., jax.Array]) -> Callable[..., ClippedSum]:
    """Ordinary gradients of `loss_fn(params, example[, key])`, summed over the rows of the mask; nothing is clipped.

    The returned function has the arguments and the result of `dpscale.clipped_grad(...)`, so that the overhead of
    privacy is the difference of two runs of one loop. `norms` are zero: no per-example norm is computed.

    Guarantees: a masked row adds exactly zero, whatever it holds. An unmasked row that is not finite is summed like
    any other, as in ordinary training.
    """

    def summed(params: Any, batch: Any, mask: jax.Array, keys: jax.Array | None = None) -> ClippedSum:
        # Selecting losses is not enough: backwards, a masked row's zero meets what it holds, and 0 * NaN is NaN.
        batch, keys = replace_rows(mask, (batch, keys))

        def total(params):
            if keys is None:
                losses = jax.vmap(loss_fn, (None, 0))(params, batch)
            else:
                losses = jax.vmap(loss_fn, (None, 0, 0))(params, batch, keys)
            losses = select_rows(mask, losses)
            return jnp.sum(losses), losses.astype(jnp.float32)

        grads, losses = jax.grad(total, has_aux=True)(params)
        grads = jax.tree.map(lambda grad: jnp.where(jnp.any(mask), grad.astype(jnp.float32), 0.0), grads)
        return ClippedSum(grads, jnp.zeros_like(losses), losses, jnp.isfinite(losses))

    return summed
