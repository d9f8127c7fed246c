"""The rule of `dot_general`: dense layers, attention projections, LoRA, experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Product
from dpscale.clipping.equations import Operand
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.norms import contract, factor_dtype, gram, hidden, over_parts, square_sum


@dataclass(frozen=True)
class Sizes:
    """A layer's sizes for one example: `parts` independent products of `positions` x (`width_a`, `width_g`)."""

    parts: int
    positions: int
    width_a: int
    width_g: int


@dataclass(frozen=True, eq=False)
class Dense:
    """e[n] = sum_t a[n, t] (x) g[n, t], from a `dot_general` that contracts over the positions t.

    n runs over the stacked scan axes and the dot's own batch axes, t over the summed scan axes and the contracted ones.
    `scaled_at`: which operand a sum scales by the factors, 0 or 1. In book-keeping the smaller one; of equals the
    first, mostly a cotangent, since a bias at one position is summed from the same scaled rows. In ghost mode the
    second, mostly a layer's input: nothing else needs it by then, and the scaled rows take its place.
    """

    product: Product
    sizes: Sizes
    scaled_at: int

    @classmethod
    def of(cls, product: Product, refold: bool) -> "Dense":
        a, g = product.equation.inputs
        (contract_a, _), (batch, _) = product.equation.params["dimension_numbers"]
        summed = prod(frame.length for frame in product.frames if frame.summed)
        parts = prod(product.stacked) * prod(a.shape[i] for i in batch)
        positions = summed * prod(a.shape[i] for i in contract_a)
        each = summed * prod(product.stacked)
        width = [each * prod(x.shape) // (parts * positions) if parts * positions else 0 for x in (a, g)]
        return cls(product, Sizes(parts, positions, *width), 1 if refold or width[1] < width[0] else 0)

    @property
    def operands(self) -> list[Operand]:
        return list(self.product.equation.inputs)

    @property
    def batch_axis(self) -> int:
        """Where B is in canonical operands and in what `written_out` gives."""
        return 0 if self.sizes.parts == 1 else 1

    def sides(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Operands [scans.., B, own axes..] -> [N, B, T, D] and [N, B, T, P]; N is left out where it is 1."""
        (contract_a, contract_g), (batch_a, batch_g) = self.product.equation.params["dimension_numbers"]
        left = as_matrix(a, self.product, self.sizes, batch_a, contract_a, self.sizes.width_a)
        return left, as_matrix(g, self.product, self.sizes, batch_g, contract_g, self.sizes.width_g)

    def tables(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, B, T, T] of inner products between positions, for each operand."""
        left, right = self.sides(a, g)
        return gram(left), gram(right)

    def outer_squares(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """|e|^2 f[B] where there is one position: the estimate, and an upper bound."""
        squares = [square_sum(x, 2) for x in self.sides(a, g)]
        most = [x + hidden(n) for x, n in zip(squares, (self.sizes.width_a, self.sizes.width_g), strict=True)]
        return over_parts(squares[0] * squares[1]), over_parts(most[0] * most[1])

    def written_out(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """Every example's gradient, [N, B, D, P]."""
        left, right = self.sides(a, g)
        return contract("...td,...tp->...dp", left, right)

    def summed(self, a: jax.Array, g: jax.Array, factor: jax.Array) -> jax.Array:
        """The leaf's sum_b factor_b e_b in one product. Where a factor is 0, what is at `scaled_at` counts as zeros;
        the other operand must be finite."""
        sides = list(self.sides(a, g))
        rows = sides[self.scaled_at]
        flat = rows.reshape(*rows.shape[:-2], -1)  # a bias at one position is summed so too: it is scaled once for both
        sides[self.scaled_at] = scaled_rows(flat, factor.reshape(*(1,) * (flat.ndim - 2), -1, 1)).reshape(rows.shape)
        left, right = (x.reshape(*x.shape[:-3], -1, x.shape[-1]) for x in sides)
        return self.finish(contract("...td,...tp->...dp", left, right))

    def finish(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """[lead.., N, D, P] -> the leaf's gradient."""
        a, g = self.product.equation.inputs
        (contract_a, contract_g), (batch_a, batch_g) = self.product.equation.params["dimension_numbers"]
        free_a = [a.shape[i] for i in range(len(a.shape)) if i not in batch_a and i not in contract_a]
        free_g = [g.shape[i] for i in range(len(g.shape)) if i not in batch_g and i not in contract_g]
        shape = (*x.shape[:lead], *self.product.stacked, *(a.shape[i] for i in batch_a), *free_a, *free_g)
        return self.product.finish(x.reshape(shape), lead)

    def macs(self) -> dict[str, int]:
        """Multiplications for one example, by route: the norm, and the share in the sum."""
        n, t, d, p = self.sizes.parts, self.sizes.positions, self.sizes.width_a, self.sizes.width_g
        return {"ghost": n * t * t * (d + p), "instantiated": n * t * d * p, "folded": n * t * d * p}


def as_matrix(
    x: jax.Array, product: Product, sizes: Sizes, batch: Sequence[int], contract: Sequence[int], width: int
) -> jax.Array:
    """An operand [scans.., B, own axes..] -> [N, B, T, width]: `batch` and summed axes as the equation numbers them."""
    frames = product.frames
    own = len(frames) + 1
    stacked = [i for i, frame in enumerate(frames) if not frame.summed]
    summed = [i for i, frame in enumerate(frames) if frame.summed]
    free = [i for i in range(x.ndim - own) if i not in batch and i not in contract]
    order = [*stacked, *(own + i for i in batch), len(frames), *summed, *(own + i for i in (*contract, *free))]
    lead = () if sizes.parts == 1 else (sizes.parts,)
    return jnp.transpose(x, order).reshape(*lead, x.shape[len(frames)], sizes.positions, width)


def scaled_rows(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times factor in at least float32, rounded once to `factor_dtype`; zero where the factor is, whatever x is.
    Integers times factor are of the factor's type."""
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(factor.dtype)
    wide = x.astype(sum_dtype(x.dtype))
    return jnp.where(factor != 0, wide * factor.astype(wide.dtype), 0).astype(factor_dtype(x.dtype))


Axis = tuple[str, int, int]
UNIT: Axis = ("a", -1, 1)


def leaf_layout(product: Product) -> list[Axis] | None:
    """For each axis of the leaf longer than 1: its operand ("a" or "g"), its number there, its length.

    Of a product with one part. None where a reshape merges or splits axes, or for convolutions. Two products of one
    leaf can share their tables where these agree.
    """
    equation = product.equation
    if equation.operation == "scatter-add":
        shape, rows = equation.outputs[0].shape, equation.params["dimension_numbers"].inserted_window_dims[0]
        axes = [("g", i, n) for i, n in enumerate(n for j, n in enumerate(shape) if j != rows)]
        axes.insert(rows, ("a", 0, shape[rows]))
    elif equation.operation == "dot_general":
        axes = _dot_axes(product)
    else:
        return None
    axes = [*[UNIT] * len(product.stacked), *axes]
    for step, depth in product.chain:
        front, own = axes[:depth], axes[depth:]
        if step.operation == "transpose":
            own = [own[i] for i in step.params["permutation"]]
        elif step.operation in ("reshape", "squeeze", "expand_dims"):
            own = None if step.permutes else _reshaped(own, step.outputs[0].shape)
            if own is None:
                return None
        axes = [*front, *own]
    return [axis for axis in axes if axis[2] > 1]


def _dot_axes(product: Product) -> list[Axis]:
    contract, batch = product.equation.params["dimension_numbers"]
    axes = [UNIT] * len(batch[0])
    for side, operand, skip in zip("ag", product.equation.inputs, zip(contract, batch, strict=True), strict=True):
        free = [n for i, n in enumerate(operand.shape) if i not in skip[0] and i not in skip[1]]
        axes += [(side, i, n) for i, n in enumerate(free)]
    return axes


def _reshaped(axes: list[Axis], shape: tuple[int, ...]) -> list[Axis] | None:
    long = [axis for axis in axes if axis[2] > 1]
    if [axis[2] for axis in long] != [n for n in shape if n > 1]:
        return None
    rest = iter(long)
    return [UNIT if n == 1 else next(rest) for n in shape]
