"""The rule of `conv_general_dilated`: convolutions of any rank, stride, dilation, padding and number of groups.

The weight gradient of one example is itself a convolution of the layer's input with the output's cotangent:
e[u, c, k] = sum_t a[t + u, c] g[t, k], where u runs over the kernel's window and t over the output's positions. It is
the dense rule with D = window x channels; the patches a[t + u] are views of the padded input, put together for a few
rows at most.
XLA's own batched weight gradient is a grouped convolution, which is slow and, on CPU, lets a NaN in one example reach
the others; it is used on the sum over the batch only.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.clipping.cut import Product
from dpscale.clipping.dense import Sizes, scaled_rows
from dpscale.clipping.equations import Equation, Operand
from dpscale.clipping.norms import contract, gram, sum_precision, widened

PATCH_FLOATS = 2**20
"""Patches of at most this size are in memory at once, if one row's at one place of the window are."""


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

    def _rows(self, *operands: jax.Array) -> tuple[jax.Array, ...]:
        """[scans.., B, own axes] -> [S*B, own axes]."""
        lead = len(self.product.frames) + 1
        return tuple(x.reshape(prod(x.shape[:lead]), *x.shape[lead:]) for x in operands)

    def sides(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[rows, own axes] -> a [rows, space.., I, G, C], padded and dilated; g [rows, t.., I, G, K]."""
        params = self.product.equation.params
        numbers = params["dimension_numbers"]
        a, g = _arranged(a, numbers.lhs_spec, self.groups), _arranged(g, numbers.rhs_spec, self.groups)
        pads = zip(params["padding"], params["lhs_dilation"], strict=True)
        space = [(low, high, step - 1) for (low, high), step in pads]
        return jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *space, *[(0, 0, 0)] * 3]), g

    @property
    def _disjoint(self) -> bool:
        """Whether the patches do not overlap, as where an image is cut into tokens."""
        params = self.product.equation.params
        return tuple(params["rhs_dilation"]) == self.window and set(params["window_strides"]) == {1}

    def _tiles(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """Disjoint patches [S*B, T, G, U*C]."""
        n, space = len(self.window), g.shape[1 : 1 + len(self.window)]
        stop = [t * u for t, u in zip(space, self.window, strict=True)]
        a = jax.lax.slice(a, [0] * a.ndim, [a.shape[0], *stop, *a.shape[-3:]])
        pairs = [size for pair in zip(space, self.window, strict=True) for size in pair]
        a = a.reshape(a.shape[0], *pairs, *a.shape[-3:])
        t_axes, u_axes = [1 + 2 * i for i in range(n)], [2 + 2 * i for i in range(n)]
        a = jnp.transpose(a, [0, *t_axes, 2 * n + 1, 2 * n + 2, *u_axes, 2 * n + 3])  # S*B, t.., I, G, u.., C
        rows, parts = a.shape[0], self.groups
        return a.reshape(rows, self.sizes.positions, parts, self.sizes.width_a)

    def _patch(self, a: jax.Array, g: jax.Array, start: Any) -> jax.Array:
        """[S*B, t.., I, G, C]: what the window's place that begins at `start` meets of a."""
        rate, space = self.product.equation.params["rhs_dilation"], g.shape[1 : 1 + len(self.window)]
        sizes = [(n - 1) * r + 1 for n, r in zip(space, rate, strict=True)]
        x = jax.lax.dynamic_slice(a, list(start), [a.shape[0], *sizes, *a.shape[-3:]])
        return jax.lax.slice(x, [0] * x.ndim, x.shape, [1, *rate, 1, 1, 1])

    def _starts(self) -> np.ndarray:
        """int32[U, axes of a]: where in a each place of the window begins."""
        n = len(self.window)
        starts = np.zeros((prod(self.window), n + 4), np.int32)
        starts[:, 1 : n + 1] = list(itertools.product(*map(range, self.window)))
        starts[:, 1 : n + 1] *= np.array(self.product.equation.params["window_strides"], np.int32)
        return starts

    def written_out(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """[S, B, G, U, C, K]. Patches are made for a few rows at a time, and where those of one row are many, for some
        places of its window at a time: so the products are long ones, and few patches are in memory at once."""
        a, g = self._rows(a, g)
        window = prod(self.window)

        def product(patches, flat):
            return contract("btgd,btgk->bgdk", patches, flat)

        if self._disjoint:
            a, g = self.sides(a, g)
            each = product(self._tiles(a, g), _flat_positions(g))
        else:
            starts = [[int(i) for i in start] for start in self._starts()]
            of_place = self.sizes.positions * self.groups * (self.sizes.width_a // window)
            places = _divisor(window, PATCH_FLOATS // of_place)
            rows = _divisor(g.shape[0], PATCH_FLOATS // (window * of_place))

            def some(a, g):
                a, g = self.sides(a, g)
                flat, parts = _flat_positions(g), []
                for j in range(0, window, places):
                    patches = [_flat_positions(self._patch(a, g, start)) for start in starts[j : j + places]]
                    parts.append(product(jnp.concatenate(patches, axis=-1), flat))
                return jnp.concatenate(parts, axis=2)

            each = _in_chunks(some, (a, g), rows)
        count = each.shape[0] // prod(self.product.stacked)
        return each.reshape(-1, count, self.groups, window, each.shape[2] // window, each.shape[3])

    def tables(self, a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T x T tables of a's patches and of g, each [S*G, B, T, T]."""
        a, g = self.sides(*self._rows(a, g))
        rows = g.shape[0] // prod(self.product.stacked)
        table_g = gram(jnp.moveaxis(_flat_positions(g), 2, 1))
        if self._disjoint:
            table_a = gram(jnp.moveaxis(self._tiles(a, g), 2, 1))
        elif self.shares_places:
            table_a = self._table_of_places(a, g)
        else:

            def add(total, start):
                return total + gram(jnp.moveaxis(_flat_positions(self._patch(a, g, start)), 2, 1)), None

            table_a, _ = jax.lax.scan(add, jnp.zeros_like(table_g), jnp.asarray(self._starts()))
        return self._parts_first(table_a, rows), self._parts_first(table_g, rows)

    @property
    def shares_places(self) -> bool:
        """Whether patches are made of few enough places that a table of places is the cheaper one."""
        params = self.product.equation.params
        plain = {*params["window_strides"], *params["rhs_dilation"]} == {1} and self.sizes.parts == 1
        return plain and self.places**2 <= prod(self.window) * self.sizes.positions**2

    @property
    def places(self) -> int:
        """Positions of the padded input."""
        params = self.product.equation.params
        size = [self.product.equation.inputs[0].shape[i] for i in params["dimension_numbers"].lhs_spec[2:]]
        pads = zip(size, params["padding"], params["lhs_dilation"], strict=True)
        return prod((n - 1) * step + 1 + low + high for n, (low, high), step in pads) * self._features

    @property
    def _features(self) -> int:
        numbers = self.product.equation.params["dimension_numbers"]
        return self.product.equation.inputs[0].shape[numbers.lhs_spec[1]]

    def _table_of_places(self, a: jax.Array, g: jax.Array) -> jax.Array:
        """[B, 1, T, T]: patches at t and s meet in the sum over u of the table of places at (t + u, s + u)."""
        space, t, i = a.shape[1:-3], g.shape[1 : 1 + len(self.window)], a.shape[-3]
        table = gram(a.reshape(a.shape[0], -1, a.shape[-1])).reshape(a.shape[0], *space, i, *space, i)
        views = []
        for u in itertools.product(*map(range, self.window)):
            start = [0, *u, 0, *u, 0]
            stop = [n + u for n, u in zip(t, u, strict=True)]
            views.append(jax.lax.slice(table, start, [a.shape[0], *stop, i, *stop, i]))
        total = functools.reduce(jnp.add, views)
        return total.reshape(a.shape[0], 1, self.sizes.positions, self.sizes.positions)

    def _parts_first(self, table: jax.Array, rows: int) -> jax.Array:
        table = table.reshape(-1, rows, *table.shape[1:])
        return jnp.moveaxis(table, 2, 1).reshape(-1, rows, *table.shape[-2:])

    scaled_at = 1

    def summed(self, a: jax.Array, g: jax.Array, factor: jax.Array) -> jax.Array:
        """The leaf's sum_b factor_b e_b by the equation itself; where a factor is 0, g counts as 0; a must be finite.

        The examples are laid side by side in the feature axis, which this convolution contracts.
        """
        equation, at = self.product.equation, len(self.product.frames)
        numbers = equation.params["dimension_numbers"]
        g = scaled_rows(g, _along(factor, at, g.ndim))

        def one(pair):
            left, lhs = _join_rows(pair[0], numbers.lhs_spec)
            right, rhs = _join_rows(pair[1], numbers.rhs_spec)
            joined = jax.lax.ConvDimensionNumbers(lhs, rhs, numbers.out_spec)
            return _apply(equation, joined, *widened(left, right))

        if not at:
            return self.product.finish(one((a, g)))
        sums = jax.lax.map(one, (a.reshape(-1, *a.shape[at:]), g.reshape(-1, *g.shape[at:])))
        return self.product.finish(sums.reshape(*a.shape[:at], *sums.shape[1:]))

    def finish(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """[lead.., S, G, U, C, K] -> the leaf's gradient."""
        out = self.product.equation.params["dimension_numbers"].out_spec
        stacked, n = self.product.stacked, len(self.window)
        x = jnp.moveaxis(x, lead + 1, lead + 2)  # S, U, G, C, K
        x = x.reshape(*x.shape[: lead + 1], *self.window, *x.shape[-3:])
        first = lead + 1 + n  # the axes (G, C, K) -> batch axis C, feature axis (G, K)
        x = jnp.moveaxis(x, first, first + 1).reshape(*x.shape[:first], x.shape[first + 1], -1)
        place = np.argsort([*out[2:], out[0], out[1]])
        x = jnp.transpose(x, [*range(lead + 1), *(lead + 1 + int(i) for i in place)])
        return self.product.finish(x.reshape(*x.shape[:lead], *stacked, *x.shape[lead + 1 :]), lead)

    def macs(self) -> dict[str, int]:
        """Multiplications for one example, by route."""
        n, t, d, p = self.sizes.parts, self.sizes.positions, self.sizes.width_a, self.sizes.width_g
        table_a = t * t * d
        if self.shares_places and not self._disjoint:
            table_a = self.places**2 * d // prod(self.window) + t * t * prod(self.window)
        return {"ghost": n * (table_a + t * t * p), "instantiated": n * t * d * p, "folded": n * t * d * p}


def _arranged(x: jax.Array, spec: tuple[int, ...], groups: int) -> jax.Array:
    """[rows, own axes] -> [rows, space.., feature, groups, batch / groups] by the axes' roles in `spec`."""
    x = jnp.transpose(x, [0, *(1 + i for i in (*spec[2:], spec[1], spec[0]))])
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _divisor(count: int, most: int) -> int:
    """The largest number up to `most` that divides `count`; at least 1."""
    known = isinstance(count, int)  # jax.export may leave it open
    return max((n for n in range(1, min(count, most) + 1) if count % n == 0), default=1) if known else 1


def _in_chunks(fun: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], rows: int) -> jax.Array:
    """fun of all rows, so many at a time."""
    count = arrays[0].shape[0] // rows
    if count == 1:
        return fun(*arrays)

    def some(k):
        return fun(*(jax.lax.dynamic_slice_in_dim(x, k * rows, rows) for x in arrays))

    def put(k, out):
        return jax.lax.dynamic_update_slice_in_dim(out, some(k), k * rows, 0)

    like, first = jax.eval_shape(some, 0), jax.lax.index_in_dim(arrays[0].reshape(-1), 0, keepdims=False)
    # All of it is overwritten. The compiler would merge the zeros of several such loops, and copy them for each.
    start = jnp.broadcast_to(first.astype(like.dtype), (count * rows, *like.shape[1:]))
    return jax.lax.fori_loop(0, count, put, start)


def _flat_positions(x: jax.Array) -> jax.Array:
    """[S*B, t.., I, G, C] -> [S*B, T, G, C]."""
    return x.reshape(x.shape[0], prod(x.shape[1:-2]), *x.shape[-2:])


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    """[B] -> a shape that broadcasts along the given axis."""
    return x.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _join_rows(x: jax.Array, spec: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """[B, own axes] with the rows in the feature axis, which the convolution contracts; and where the axes are now.

    Nothing is moved where that axis had length 1, as it has in a weight's gradient of one example.
    """
    feature = spec[1]
    if x.shape[1 + feature] != 1:
        x = jnp.moveaxis(x, 0, feature)
        return x.reshape(*x.shape[:feature], -1, *x.shape[feature + 2 :]), spec
    place = [0 if i == feature else i + (i < feature) for i in range(len(spec))]
    return jnp.squeeze(x, 1 + feature), tuple(place[i] for i in spec)


def _apply(equation: Equation, numbers: Any, a: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
    """The equation's convolution with other dimension numbers."""
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")
    return jax.lax.conv_general_dilated(
        a,
        g,
        dimension_numbers=numbers,
        preferred_element_type=dtype,
        precision=sum_precision(),
        **{name: equation.params[name] for name in names},
    )


def batched_convolution(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution whose operands both differ from example to example, safe under vmap.

    vmap would make it a grouped convolution, through which one row's NaN can reach the others; here each row is
    convolved by itself.
    """
    return jax.custom_batching.sequential_vmap(lambda a, g: apply(a, g))
