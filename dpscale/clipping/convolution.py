"""The rule of `conv_general_dilated`: convolutions of any rank, stride, dilation, padding and number of groups.

The weight gradient of one example is itself a convolution of the layer's input with the output's cotangent:
e[u, c, k] = sum_t a[t + u, c] g[t, k], where u runs over the kernel's window and t over the output's positions. It is
the dense rule with D = window x channels; the patches a[t + u] are views of the padded input and never all written out.
XLA's own batched weight gradient is a grouped convolution, which is slow and, on CPU, lets a NaN in one example reach
the others; it is used on the sum over the batch only.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.clipping.cut import Product
from dpscale.clipping.dense import Sizes, scaled_rows
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.jaxpr import Equation, Operand
from dpscale.clipping.norms import gram, square_sum


@dataclass(frozen=True, eq=False)
class Convolution:
    """e[group, u, c, k] from `conv_general_dilated(a, g)`, whose batch axis is c and whose window axes are t.

    `sizes`: parts = groups (and stacked scan iterations), positions = t and the contracted feature,
    width_a = window x channels of a group, width_g = kernels of a group.
    """

    product: Product
    sizes: Sizes

    @classmethod
    def of(cls, product: Product) -> "Convolution | None":
        """None for forms that no weight gradient has: grouped features, or scans that add up."""
        params = product.equation.params
        if params["feature_group_count"] != 1 or any(frame.summed for frame in product.frames):
            return None
        a, g = product.equation.inputs
        numbers, groups = params["dimension_numbers"], params["batch_group_count"]
        out = product.equation.outputs[0].shape
        window = prod(out[i] for i in numbers.out_spec[2:])
        channels, kernels = a.shape[numbers.lhs_spec[0]], g.shape[numbers.rhs_spec[0]]
        positions = prod(g.shape) // kernels
        parts = prod(product.stacked) * groups
        return cls(product, Sizes(parts, positions, window * channels // groups, kernels // groups))

    @property
    def operands(self) -> list[Operand]:
        return list(self.product.equation.inputs)

    @property
    def groups(self) -> int:
        return self.product.equation.params["batch_group_count"]

    @property
    def window(self) -> tuple[int, ...]:
        numbers = self.product.equation.params["dimension_numbers"]
        return tuple(self.product.equation.outputs[0].shape[i] for i in numbers.out_spec[2:])

    batch_axis = 1

    def sides(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[scans.., B, own axes] -> a [S*B, space.., I, G, C], padded and dilated; g [S*B, t.., I, G, K]."""
        params, groups = self.product.equation.params, self.groups
        numbers, lead = params["dimension_numbers"], len(self.product.frames) + 1
        a = _arranged(a, numbers.lhs_spec, lead, groups)
        g = _arranged(g, numbers.rhs_spec, lead, groups)
        space = [
            (low, high, step - 1) for (low, high), step in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        return jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *space, *[(0, 0, 0)] * 3]), g

    def rows(self, x: jax.Array) -> int:
        """B, from an array whose first axis holds scans x B."""
        return x.shape[0] // prod(self.product.stacked)

    def patches(self, a: jax.Array, g: jax.Array) -> Iterator[jax.Array]:
        """For each place u of the window: the view of a that meets g, [S*B, t.., I, G, C]."""
        params = self.product.equation.params
        stride, rate = params["window_strides"], params["rhs_dilation"]
        space = g.shape[1 : 1 + len(stride)]
        for u in itertools.product(*map(range, self.window)):
            start = [i * s for i, s in zip(u, stride, strict=True)]
            stop = [i + (n - 1) * r + 1 for i, n, r in zip(start, space, rate, strict=True)]
            yield jax.lax.slice(a, [0, *start, 0, 0, 0], [a.shape[0], *stop, *a.shape[-3:]], [1, *rate, 1, 1, 1])

    def written_out(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """[S, B, U, G, C, K]."""
        a, g = self.sides(a, g)
        dtype = sum_dtype(jnp.result_type(a, g))
        rows, flat_g = self.rows(g), _flat_positions(g)
        if prod(self.window) > 16 or a.shape[-1] < 16:
            patches = jnp.stack([_flat_positions(x) for x in self.patches(a, g)], axis=-2)  # [SB, T, G, U, C]
            each = jnp.einsum("btguc,btgk->bugck", patches, flat_g, preferred_element_type=dtype)
        else:
            products = [
                jnp.einsum("btgc,btgk->bgck", _flat_positions(x), flat_g, preferred_element_type=dtype)
                for x in self.patches(a, g)
            ]
            each = jnp.stack(products, axis=1)
        return each.reshape(-1, rows, *each.shape[1:])

    def tables(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T x T tables of a's patches and of g, each [S*G, B, T, T].

        The table of the patches is a sum over the window of shifted views of the table of single places.
        """
        a, g = self.sides(a, g)
        rows = self.rows(g)
        table_g = gram(jnp.moveaxis(_flat_positions(g), 2, 1))
        stacked = [jnp.moveaxis(_flat_positions(x), 2, 1) for x in self.patches(a, g)]
        table_a = functools.reduce(jnp.add, [gram(x) for x in stacked])
        return self._parts_first(table_a, rows), self._parts_first(table_g, rows)

    def _parts_first(self, table: jax.Array, rows: int) -> jax.Array:
        table = table.reshape(-1, rows, *table.shape[1:])
        return jnp.moveaxis(table, 2, 1).reshape(-1, rows, *table.shape[-2:])

    def spreads(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """sum_t |a_t||g_t| for each part, [S*G, B]."""
        a, g = self.sides(a, g)
        squares = sum(square_sum(_flat_positions(x), 1) for x in self.patches(a, g))
        spread = jnp.sum(jnp.sqrt(squares * square_sum(_flat_positions(g), 1)), axis=1)
        return jnp.moveaxis(spread.reshape(-1, self.rows(g), self.groups), -1, 1).reshape(-1, self.rows(g))

    def summed(self, a: jax.Array, g: jax.Array, factor: jax.Array, good: jax.Array) -> jax.Array:
        """The leaf's sum_b factor_b e_b by the equation itself; rows that are not good are selected away.

        The examples are laid side by side in the feature axis, which this convolution contracts.
        """
        equation, at = self.product.equation, len(self.product.frames)
        numbers, dtype = equation.params["dimension_numbers"], sum_dtype(jnp.result_type(a, g))
        a = jnp.where(_along(good, at, a.ndim), a, jnp.zeros((), a.dtype))
        g = scaled_rows(g, _along(factor, at, g.ndim), _along(good, at, g.ndim))

        def one(pair):
            return _apply(
                equation, _join_rows(pair[0], numbers.lhs_spec[1]), _join_rows(pair[1], numbers.rhs_spec[1]), dtype
            )

        if not at:
            return self.product.finish(one((a, g)))
        sums = jax.lax.map(one, (a.reshape(-1, *a.shape[at:]), g.reshape(-1, *g.shape[at:])))
        return self.product.finish(sums.reshape(*a.shape[:at], *sums.shape[1:]))

    def finish(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """[lead.., S, U, G, C, K] -> the leaf's gradient."""
        out = self.product.equation.params["dimension_numbers"].out_spec
        stacked, n = self.product.stacked, len(self.window)
        x = x.reshape(*x.shape[:lead], prod(stacked), *self.window, *x.shape[-3:])
        first = lead + 1 + n  # the axes (G, C, K) -> batch axis C, feature axis (G, K)
        x = jnp.moveaxis(x, first, first + 1).reshape(*x.shape[:first], x.shape[first + 1], -1)
        place = np.argsort([out[2 + i] for i in range(n)] + [out[0], out[1]])
        x = jnp.transpose(x, [*range(lead + 1), *(lead + 1 + int(i) for i in place)])
        return self.product.finish(x.reshape(*x.shape[:lead], *stacked, *x.shape[lead + 1 :]), lead)

    def macs(self) -> dict[str, int]:
        n, t, d, p = self.sizes.parts, self.sizes.positions, self.sizes.width_a, self.sizes.width_g
        return {"ghost": n * t * t * (d + p), "instantiated": n * t * d * p, "folded": n * t * d * p}


def _arranged(x: jax.Array, spec: tuple[int, ...], lead: int, groups: int) -> jax.Array:
    """[scans.., B, own axes] -> [scans*B, space.., feature, groups, batch / groups] by the axes' roles in `spec`."""
    order = [*range(lead), *(lead + i for i in (*spec[2:], spec[1], spec[0]))]
    x = jnp.transpose(x, order)
    return x.reshape(prod(x.shape[:lead]), *x.shape[lead:-1], groups, x.shape[-1] // groups)


def _flat_positions(x: jax.Array) -> jax.Array:
    """[S*B, t.., I, G, C] -> [S*B, T, G, C]."""
    return x.reshape(x.shape[0], prod(x.shape[1:-2]), *x.shape[-2:])


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    """[B] -> a shape that broadcasts along the given axis."""
    return x.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _join_rows(x: jax.Array, axis: int) -> jax.Array:
    """[B, ..., I, ...] -> [..., B*I, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _apply(equation: Equation, a: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    names += ("feature_group_count", "batch_group_count", "precision")
    return jax.lax.conv_general_dilated(
        a, g, preferred_element_type=dtype, **{name: equation.params[name] for name in names}
    )


def batched_convolution(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution whose operands both differ from example to example, safe under vmap.

    vmap would make it a grouped convolution, through which one row's NaN can reach the others; here each row is
    convolved by itself.
    """
    return jax.custom_batching.sequential_vmap(lambda a, g: apply(a, g))
