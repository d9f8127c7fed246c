"""The rule of `scatter-add`: an embedding's gradient, rows of cotangents added up at token ids."""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Product, is_zeros
from dpscale.clipping.dense import Sizes, scaled_rows
from dpscale.clipping.equations import Operand, Program
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.norms import gram


@dataclass(frozen=True, eq=False)
class Embedding:
    """e[id_t] += g[t]: a dense layer whose input is one-hot. width_a is the vocabulary."""

    product: Product
    sizes: Sizes

    @classmethod
    def of(cls, product: Product, program: Program) -> "Embedding | None":
        """None where the scatter is not a plain addition of rows to zero."""
        start, indices, updates = product.equation.inputs
        numbers = product.equation.params["dimension_numbers"]
        rows = tuple(numbers.inserted_window_dims)
        plain = (
            not product.frames
            and len(rows) == 1
            and tuple(numbers.scatter_dims_to_operand_dims) == rows
            and not numbers.operand_batching_dims
            and indices.shape[-1] == 1
            and [updates.shape[i] for i in numbers.update_window_dims]
            == [n for i, n in enumerate(start.shape) if i not in rows]
        )
        if not plain or not is_zeros(start, program.producers()):
            return None
        vocabulary = start.shape[rows[0]]
        width = prod(start.shape) // vocabulary
        return cls(product, Sizes(1, prod(indices.shape), vocabulary, width))

    @property
    def operands(self) -> list[Operand]:
        return list(self.product.equation.inputs[1:])

    batch_axis = 0

    def sides(self, indices: jax.Array, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ids int[B, T] and g [B, T, P], g zero where an id is out of range and its row dropped."""
        sizes, params = self.sizes, self.product.equation.params
        window = params["dimension_numbers"].update_window_dims
        order = [i for i in range(updates.ndim - 1) if i not in window] + list(window)
        g = jnp.transpose(updates, [0, *(i + 1 for i in order)])
        g = g.reshape(g.shape[0], sizes.positions, sizes.width_g)
        ids = indices.reshape(indices.shape[0], sizes.positions)
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # an 8-bit type does not hold the vocabulary
        if "CLIP" in str(params["mode"]).upper():
            return jnp.clip(ids, 0, sizes.width_a - 1), g
        inside = (ids >= 0) & (ids < sizes.width_a)
        return jnp.where(inside, ids, 0), jnp.where(inside[..., None], g, jnp.zeros((), g.dtype))

    def tables(self, indices: jax.Array, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, T]: which positions share an id, and the inner products of their cotangents."""
        ids, g = self.sides(indices, updates)
        table = gram(g)
        return (ids[:, :, None] == ids[:, None, :]).astype(table.dtype), table

    def written_out(self, indices: jax.Array, updates: jax.Array) -> jax.Array:
        """[B, V, P]."""
        ids, g = self.sides(indices, updates)
        zeros = jnp.zeros((self.sizes.width_a, self.sizes.width_g), sum_dtype(g.dtype))
        return jax.vmap(lambda i, x: zeros.at[i].add(x.astype(zeros.dtype)))(ids, g)

    scaled_at = 1

    def summed(self, indices: jax.Array, updates: jax.Array, factor: jax.Array) -> jax.Array:
        """The leaf's sum_b factor_b e_b, by one scatter; where a factor is 0, updates count as zeros."""
        ids, g = self.sides(indices, updates)
        scaled = scaled_rows(g.astype(sum_dtype(g.dtype)), factor[:, None, None])
        zeros = jnp.zeros((self.sizes.width_a, self.sizes.width_g), scaled.dtype)
        return self.finish(zeros.at[ids.reshape(-1)].add(scaled.reshape(-1, self.sizes.width_g)))

    def finish(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """[lead.., V, P] -> the leaf's gradient."""
        start = self.product.equation.inputs[0]
        axis = self.product.equation.params["dimension_numbers"].inserted_window_dims[0]
        others = [n for i, n in enumerate(start.shape) if i != axis]
        x = x.reshape(*x.shape[:lead], start.shape[axis], *others)
        return self.product.finish(jnp.moveaxis(x, lead, lead + axis), lead)

    def macs(self) -> dict[str, int]:
        t, p = self.sizes.positions, self.sizes.width_g
        return {"ghost": t * t * p, "instantiated": t * p, "folded": t * p}
