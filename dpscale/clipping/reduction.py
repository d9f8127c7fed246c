"""The rule of `reduce_sum`: biases, and the scales and shifts of normalisation layers, in ghost mode.

Their gradients are small: book-keeping takes them as the backward pass makes them. Ghost mode would have to hold them
for the whole batch until the factors are known; with this rule it keeps their norms, and the second pass sums them.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.clipping.cut import Product
from dpscale.clipping.dense import Sizes, as_matrix, scaled_rows
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.jaxpr import Constant, Operand
from dpscale.clipping.norms import row_norms


@dataclass(frozen=True, eq=False)
class Reduction:
    """e[n] = sum_t g[n, t]: a dense layer whose input is 1 at every position; the first operand is that 1."""

    product: Product
    sizes: Sizes

    @classmethod
    def of(cls, product: Product) -> "Reduction":
        (g,), axes = product.equation.inputs, product.equation.params["axes"]
        positions = prod(frame.length for frame in product.frames if frame.summed) * prod(g.shape[i] for i in axes)
        return cls(product, Sizes(prod(product.stacked), positions, 1, prod(product.equation.outputs[0].shape)))

    @property
    def operands(self) -> list[Operand]:
        return [Constant(np.float32(1)), self.product.equation.inputs[0]]

    @property
    def batch_axis(self) -> int:
        """Where B is in what `written_out` gives."""
        return 0 if self.sizes.parts == 1 else 1

    def _rows(self, g: jax.Array) -> jax.Array:
        """[scans.., B, own axes..] -> [N, B, T, P]; N is left out where it is 1."""
        return as_matrix(g, self.product, self.sizes, (), self.product.equation.params["axes"], self.sizes.width_g)

    def spreads(self, one: jax.Array, g: jax.Array) -> jax.Array:
        """sum_t |g_t|, [N, B]."""
        return jnp.sum(row_norms(self._rows(g)), axis=-1)

    def written_out(self, one: jax.Array, g: jax.Array) -> jax.Array:
        """Every example's gradient, [N, B, P]."""
        return jnp.sum(self._rows(g), axis=-2, dtype=sum_dtype(g.dtype))

    def summed(self, one: jax.Array, g: jax.Array, factor: jax.Array, good: jax.Array) -> jax.Array:
        """The leaf's sum_b factor_b e_b; rows that are not good are selected away."""
        wide = self._rows(g).astype(sum_dtype(g.dtype))
        return self.finish(jnp.sum(scaled_rows(wide, factor[:, None, None], good[:, None, None]), axis=(-3, -2)))

    def finish(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """[lead.., N, P] -> the leaf's gradient."""
        shape = (*x.shape[:lead], *self.product.stacked, *self.product.equation.outputs[0].shape)
        return self.product.finish(x.reshape(shape), lead)

    def macs(self) -> dict[str, int]:
        size = self.sizes.parts * self.sizes.positions * self.sizes.width_g
        return {"ghost": size * self.sizes.positions, "instantiated": size, "folded": size}
