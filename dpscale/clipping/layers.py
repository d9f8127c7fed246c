"""How each parameter's per-example norm and clipped sum are taken: the choice, and the arithmetic of each route.

| route | norm | share in the sum |
| --- | --- | --- |
| outer | abs(a)^2 abs(g)^2: the layer is applied at one position | one product over the batch |
| ghost | two T x T tables | one product over the batch |
| instantiated | the example's gradient, written out by a fast product | that array, scaled and summed |
| materialised | the example's gradient as the loss's own backward pass makes it | that array, scaled and summed |
"""

import functools
import math
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp

from dpscale.clipping.convolution import Convolution
from dpscale.clipping.cut import Cut, Product
from dpscale.clipping.dense import Dense, leaf_layout
from dpscale.clipping.embedding import Embedding
from dpscale.clipping.equations import Program, run
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.hold import held
from dpscale.clipping.norms import (
    Squares,
    cross_gram,
    delta,
    factor_dtype,
    from_tables,
    hidden,
    kappa,
    over_parts,
    square_sum,
    uses_tf32,
)
from dpscale.clipping.row_sum import row_sums

Route = Literal["outer", "ghost", "instantiated", "materialised"]
Rule = Dense | Convolution | Embedding

GHOST_EXCESS = 0.05
"""A ghost norm is not used where its upper bound may exceed the square of a typical norm by more than this share."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One trainable leaf: the rules of the products that its gradient is made of, and the route chosen."""

    name: str
    shape: tuple[int, ...]
    route: Route
    rules: tuple[Rule, ...] = ()
    tail: Program | None = None
    leaves: tuple[jax.Array, ...] = ()

    @property
    def folds(self) -> bool:
        """Whether the sum is made of the operands, and not of gradients that were written out."""
        return self.route in ("outer", "ghost")


def rule_for(product: Product, program: Program, refold: bool) -> Rule | None:
    """The rule of a product's primitive, or None where it does not cover this form of it; `refold`: in ghost mode."""
    if product.equation.operation == "dot_general":
        return Dense.of(product, refold)
    if product.equation.operation == "conv_general_dilated":
        return Convolution.of(product)
    return Embedding.of(product, program)


def layer_for(
    name: str, shape: tuple[int, ...], found: Cut | None, program: Program, leaves: tuple[jax.Array, ...], refold: bool
) -> Layer:
    """The leaf's rules, with the route that costs the least memory; `choose_routes` then spends memory on time."""
    rules = [] if found is None else [rule_for(product, program, refold) for product in found.products]
    known = tuple(rule for rule in rules if rule is not None)
    if found is None or len(known) < len(rules) or not known:
        return Layer(name, shape, "materialised")
    if found.tail is not None:
        return Layer(name, shape, "instantiated", known, found.tail, leaves)
    layer = Layer(name, shape, "instantiated", known)
    if len(known) == 1 and all(isinstance(rule, Dense) and rule.sizes.positions == 1 for rule in known):
        return replace(layer, route="outer")
    return replace(layer, route="ghost") if _may_be_ghost(layer) else layer


def _may_be_ghost(layer: Layer) -> bool:
    """Whether tables are possible, precise enough, and smaller than the gradient."""
    first, *others = layer.rules
    if others and not _together(layer.rules):
        return False
    sizes = first.sizes
    positions = sum(rule.sizes.positions for rule in layer.rules)
    onehot = all(isinstance(rule, Embedding) for rule in layer.rules)
    excess = 0 if onehot else positions * kappa(sizes.width_a, sizes.width_g, jnp.float32)
    return 2 * positions**2 <= sizes.width_a * sizes.width_g * MEMORY_RATIO and excess <= GHOST_EXCESS


MEMORY_RATIO = 4
"""Tables may be this many times as large as the gradient that they spare."""

WRITTEN_OUT_BELOW = 2.0**-20
"""Bounds smaller than this are kept by writing every gradient out. Where factors scale operands instead, what float32
flushes to zero of them meets the other operand: a contribution may be off by TINY sqrt(width_g) sum_t |a_t|, which
nothing but the bound's own size outweighs. (Squares must be finite, so |a_t| < 1.9e19: at this bound there is room for
sqrt(width_g) T = 6e7.) Of a written-out gradient flushing only takes away."""

TOUCH_MACS = {"cpu": 12, "gpu": 40}
"""Multiply-adds in the time that one float32 takes to and from memory. CPU: measured, two cores, 20 to 28 for one
written and two read. GPU: 33 TMAC/s of float32 against 0.8 Tfloat/s (H100's data sheet)."""

SLICES = 8
"""Ghost mode takes the norms of at most this many slices of the batch, one after the other."""

UNSLICED_SHARE = 1 / 32
"""It takes the whole batch at once where what a norm needs is at most this share of the layers' operands: a loop over
slices has a price, when it is compiled and when it is run."""

HELD_SHARE = 2.3
"""Book-keeping may hold written-out gradients of this many times the size of the layers' operands."""


def choose_routes(layers: list[Layer], refold: bool, max_norm: float) -> list[Layer]:
    """Writes out a layer's gradients where that takes less time than its tables, as far as memory allows.

    `refold` (ghost mode) holds nothing after a layer's sum, so there is no limit, but each norm is taken twice.
    `max_norm`: the bound's; of a tiny one (`WRITTEN_OUT_BELOW`) all are written out.
    """
    if 0 < max_norm < WRITTEN_OUT_BELOW:
        return [replace(layer, route="instantiated") if layer.folds else layer for layer in layers]
    budget = HELD_SHARE * sum(operand_floats(layer) for layer in layers)
    budget -= sum(gradient_floats(layer) for layer in layers if layer.route == "instantiated")
    gains = {j: _gain(layer, refold) for j, layer in enumerate(layers) if layer.route == "ghost"}
    chosen = list(layers)
    for j in sorted(gains, key=lambda j: gains[j] / gradient_floats(layers[j]), reverse=True):
        held = gradient_floats(layers[j])
        if gains[j] > 0 and (refold or held <= budget):
            chosen[j] = replace(layers[j], route="instantiated")
            budget -= held
    return chosen


def _gain(layer: Layer, refold: bool) -> float:
    """Multiply-adds that writing out one example's gradient saves, all told."""
    costs, touch = [rule.macs() for rule in layer.rules], TOUCH_MACS.get(jax.default_backend(), 40)
    positions, size = sum(rule.sizes.positions for rule in layer.rules), gradient_floats(layer)
    tables = sum(cost["ghost"] for cost in costs) + 2 * touch * layer.rules[0].sizes.parts * positions**2
    tables *= len(layer.rules)  # the products meet each other too
    folded, written = (sum(cost[route] for cost in costs) for route in ("folded", "instantiated"))
    if refold:  # of the five touches two are the first norm's, three the second's and the sum's
        return 2 * tables + folded - 2 * written - 5 * touch * size
    return tables + folded - written - 3 * touch * size


def gradient_floats(layer: Layer) -> int:
    return prod(layer.shape)


def operand_floats(layer: Layer) -> int:
    """Size of one example's operands as the products hold them."""
    lengths = [prod(frame.length for frame in rule.product.frames) for rule in layer.rules]
    sizes = [sum(prod(x.shape) for x in rule.operands) for rule in layer.rules]
    return sum(n * size for n, size in zip(lengths, sizes, strict=True))


def _together(rules: tuple[Rule, ...]) -> bool:
    """Whether several products of one leaf (a weight used twice, tied weights) can share their tables.

    They must be dense or embeddings, without stacked parts, and agree on which axes are the layer's input and output.
    """
    if any(rule.sizes.parts != 1 for rule in rules):
        return False
    layouts = [leaf_layout(rule.product) for rule in rules]
    if any(not layout for layout in layouts):
        return False
    first = layouts[0] or []
    swapped = [("g" if side == "a" else "a", i, n) for side, i, n in first]
    return all(layout in (first, swapped) for layout in layouts)


Pair = tuple[jax.Array, jax.Array]


def square_of(layer: Layer, each: jax.Array) -> Squares:
    """Squared norms f[B] of gradients as `written_out` makes them."""
    square = over_parts(square_sum(each, each.ndim - batch_axis(layer) - 1))
    return Squares(square, square)


def measure(layer: Layer, pairs: list[Pair]) -> Squares:
    """Squared norms f[B]; `pairs`: the operands of each rule, [scans.., B, own axes..]."""
    rule, pair = layer.rules[0], pairs[0]
    if layer.route == "instantiated":
        return square_of(layer, written_out(layer, pairs))
    floats = [factor_dtype(x.dtype) for both in pairs for x in both if jnp.issubdtype(x.dtype, jnp.floating)]
    low = min(floats, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))
    error = delta(sum(rule.sizes.positions for rule in layer.rules), low, uses_tf32())
    if layer.route == "outer":
        assert isinstance(rule, Dense)
        square, most = rule.outer_squares(*pair)
        return Squares(square, most * (1 + 2 * error) ** 2)
    tables = rule.tables(*pair) if len(pairs) == 1 else _shared_tables(layer.rules, pairs)
    widths = rule.sizes.width_a, rule.sizes.width_g
    if len(pairs) > 1 and not _begins_with_a(rule):
        widths = widths[1], widths[0]
    return from_tables(*tables, widths, kappa(*widths, low), error)


def measure_in_slices(layer: Layer, pairs: list[Pair], room: float) -> Squares:
    """The squares of `measure`. Where one example's norm needs more than `room` floats, a slice of the batch at a time
    bounds the memory."""
    count = _slices(layer, pairs, room)
    if count == 1:
        return measure(layer, pairs)
    squares = jax.lax.map(lambda k: measure(layer, _slice(layer, pairs, k, count)), jnp.arange(count))
    return jax.tree.map(jnp.ravel, squares)


def sum_within(layer: Layer, pairs: list[Pair], factor: jax.Array, allowed: jax.Array, room: float) -> jax.Array:
    """The leaf's sum of contributions factor_b e_b, each made smaller where its norm here is more than `allowed` says.

    `factor`: f[B], 0 where a row counts as nothing. `allowed`: f[B], the squared norms that the factors are made for
    (`capped`). Operands that are not scaled must be finite. `room`: as in `measure_in_slices`.
    """
    if layer.folds:
        square = measure_in_slices(layer, pairs, room).upper
        return sum_factors(layer, pairs, capped(factor, allowed, square, gradient_floats(layer)))
    count = _slices(layer, pairs, room)

    def sum_of(pairs: list[Pair], factor: jax.Array, allowed: jax.Array, onto: list[jax.Array] | None = None):
        each = held(written_out(layer, pairs), factor != 0)
        weights = capped(factor, allowed, square_of(layer, each).upper, gradient_floats(layer))
        return row_sums([each], [batch_axis(layer)], [weights], [0], onto)

    def add(k, total):
        rows = [_part(x, 0, k, count) for x in (factor, allowed)]
        return sum_of(_slice(layer, pairs, k, count), rows[0], rows[1], total)

    if count == 1:
        (total,) = sum_of(pairs, factor, allowed)
    else:
        zero = 0 * factor[0]  # inside shard_map it varies as the sums do
        like = jax.eval_shape(lambda: sum_of(pairs, factor, allowed))
        start = [jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype) for x in like]
        (total,) = jax.lax.fori_loop(0, count, add, start)
    return layer.rules[0].finish(total) if _is_plain(layer) else total


def capped(factor: jax.Array, allowed: jax.Array, square: jax.Array, size: int) -> jax.Array:
    """f[B]: the factor, made so small that factor * norm is at most what it is by the squared norm `allowed`.

    `square`: an upper bound of the squared norm of what is summed, in which `size` floats may have been flushed to
    zero, as in `allowed` (`clip_factors` counts both). 0 where it is not finite.
    """
    hidden_square = hidden(size)
    allowed, square = allowed + hidden_square, square + hidden_square
    share = jnp.where(square > allowed, jnp.sqrt(allowed / square), 1)
    return jnp.where(jnp.isfinite(square), factor * share.astype(factor.dtype), 0)


def _slices(layer: Layer, pairs: list[Pair], room: float) -> int:
    rows = pairs[0][0].shape[len(layer.rules[0].product.frames)]
    known = isinstance(rows, int)  # jax.export may leave it open
    return math.gcd(rows, SLICES) if known and norm_floats(layer) > room else 1


def _slice(layer: Layer, pairs: list[Pair], k: jax.Array, count: int) -> list[Pair]:
    """Slice k of `count` of every operand."""
    axes = [len(rule.product.frames) for rule in layer.rules]
    return [(_part(a, at, k, count), _part(g, at, k, count)) for (a, g), at in zip(pairs, axes, strict=True)]


def _part(x: jax.Array, axis: int, k: jax.Array, count: int) -> jax.Array:
    length = x.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(x, k * length, length, axis)


def norm_floats(layer: Layer) -> int:
    """Size of what one example's norm is taken from: its gradient, or its tables."""
    if layer.route == "outer":
        return 0
    positions = sum(rule.sizes.positions for rule in layer.rules)
    return gradient_floats(layer) if layer.route == "instantiated" else 2 * layer.rules[0].sizes.parts * positions**2


def batch_axis(layer: Layer) -> int:
    """Where B is in what `written_out` gives."""
    return layer.rules[0].batch_axis if _is_plain(layer) else 0


def _is_plain(layer: Layer) -> bool:
    return len(layer.rules) == 1 and layer.tail is None


def written_out(layer: Layer, pairs: list[Pair]) -> jax.Array:
    """Every example's gradient: in the rule's own form, or [B, leaf's shape] where several products make it up."""
    parts = [rule.written_out(*pair) for rule, pair in zip(layer.rules, pairs, strict=True)]
    if _is_plain(layer):
        return parts[0]
    parts = [r.finish(jnp.moveaxis(x, r.batch_axis, 0), 1) for r, x in zip(layer.rules, parts, strict=True)]
    if layer.tail is None:
        return functools.reduce(jnp.add, parts)
    tail = layer.tail
    return jax.vmap(lambda *terms: run(tail, *layer.leaves, *terms)[0])(*parts)


def sum_written_out(
    layers: list[Layer], each: list[jax.Array], factors: list[jax.Array], groups: list[int]
) -> list[jax.Array]:
    """The leaves' sums sum_b factor_b e_b from gradients that were written out. `groups`: each leaf's factors."""
    totals = row_sums(each, list(map(batch_axis, layers)), factors, groups)
    plain = [layer.rules and _is_plain(layer) for layer in layers]
    return [x.rules[0].finish(y) if on else y for x, y, on in zip(layers, totals, plain, strict=True)]


def sum_factors(layer: Layer, pairs: list[Pair], factor: jax.Array) -> jax.Array:
    """The leaf's sum_b factor_b e_b from the operands."""
    terms = [rule.summed(*pair, factor) for rule, pair in zip(layer.rules, pairs, strict=True)]
    return functools.reduce(jnp.add, terms)


def _shared_tables(rules: tuple[Rule, ...], pairs: list[Pair]) -> Pair:
    """Tables over the positions of all products together, each side of the leaf by itself."""
    oriented = []
    for rule, pair in zip(rules, pairs, strict=True):
        left, right = rule.sides(*pair)
        oriented.append((left, right) if _begins_with_a(rule) else (right, left))
    first, second = zip(*oriented, strict=True)
    return _block_table(first), _block_table(second)


def _begins_with_a(rule: Rule) -> bool:
    """Whether the leaf's first axis is the first operand's: that side's table is the first of several products'."""
    layout = leaf_layout(rule.product)
    return bool(layout) and layout[0][0] == "a"


def _block_table(sides: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate([jnp.concatenate([_table(x, y) for y in sides], axis=2) for x in sides], axis=1)


def _table(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products [B, T, S] of rows [B, T, D] or of one-hot rows given by their ids [B, T]."""
    if x.ndim == y.ndim == 2:
        return (x[:, :, None] == y[:, None, :]).astype(jnp.float32)
    if x.ndim == 2:
        return jnp.swapaxes(_table(y, x), 1, 2)
    if y.ndim == 2:
        return jnp.take_along_axis(x, y[:, None, :], axis=2).astype(sum_dtype(x.dtype))
    return cross_gram(x, y)
