"""Clipped sums by a backward pass that is cut before each weight's gradient.

1. Trace value_and_grad of one example's loss (`trace`).
2. Cut it: in place of each weight's gradient return the two operands of the product that makes it (`split_backward`).
3. vmap the shortened program over the batch: nothing of size batch x parameters appears (`evaluate_rows`).
4. Norms of each layer from the operands; clip factors from their sum (`measure_rows`).
5. Book-keeping: the clipped sum of each layer from the same operands, one product over the whole batch (`sum_rows`).
   Ghost: the same pass again, once the factors are known; nothing is kept between the two but norms (`sum_again`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.example import (
    ClippedSum,
    Problem,
    clip_factors,
    group_norms,
    replace_rows,
    select_rows,
    sum_dtype,
)
from dpscale.clipping.hold import held
from dpscale.clipping.layers import (
    UNSLICED_SHARE,
    capped,
    measure,
    measure_in_slices,
    operand_floats,
    square_of,
    sum_factors,
    sum_within,
    sum_written_out,
    written_out,
)
from dpscale.clipping.norms import Squares, square_sum
from dpscale.clipping.repair import repaired
from dpscale.clipping.rows import (
    Evaluated,
    evaluate_again,
    evaluate_rows,
    layer_values,
    with_constants_held,
    without_bad_rows,
)
from dpscale.clipping.split import Split, split_backward

BUNDLED_FLOATS = 2**14
"""Written-out gradients of at most this size are put side by side: hundreds of biases and scales would otherwise be
hundreds of tiny kernels, whose starting takes longer than their work."""


def bundles(parts: Split, problem: Problem) -> list[list[int]]:
    """The leaves in parts whose norms are taken together: small ones without rules, of one group; no views."""
    found: dict[Any, list[int]] = {}
    for j, (layer, leaf) in enumerate(zip(parts.layers, problem.leaves, strict=True)):
        small = not layer.rules and leaf.size <= BUNDLED_FLOATS and j not in parts.views
        asked = None if problem.norm_groups is None else problem.norm_groups[j]
        found.setdefault((problem.groups[j], asked, sum_dtype(leaf.dtype)) if small else j, []).append(j)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Measured:
    """Norms f[B], factors f[B] of each clip group (0 where a row counts as nothing), flags bool[B]; `each`: gradients
    that were written out, by their leaf's number; `allowed`: of each bundle's first leaf the squared norm f[B] that the
    factors are made for."""

    norms: jax.Array
    factors: list[jax.Array]
    finite: jax.Array
    good: jax.Array
    each: dict[int, jax.Array]
    allowed: dict[int, jax.Array]
    group_norms: jax.Array | None


def measure_rows(parts: Split, problem: Problem, rows: Evaluated) -> Measured:
    """Everything that decides the factors. A row's numbers meet no other row's."""
    values, ghost = layer_values(parts, rows), parts.method == "ghost"
    squares, each = dict[int, Squares](), {} if ghost else _gradients(parts, values, problem.mask)
    for places in bundles(parts, problem):
        first = places[0]  # stands for the bundle
        layer, value = parts.layers[first], values[first]
        if isinstance(value, Squares):
            squares[first] = value
        elif layer.rules and first in each:
            squares[first] = square_of(layer, each[first])
        elif layer.rules:
            squares[first] = measure_in_slices(layer, value, room(parts)) if ghost else measure(layer, value)
        else:
            written = _wide(parts, places, values) | {j: each[j] for j in places if j in each}
            squares[first] = Squares(*[_joint_square(list(written.values()))] * 2)
    if ghost:  # what the second pass keeps to must be what the factors are made of
        squares = held(squares, problem.mask)
    estimates, allowed = {j: x.estimate for j, x in squares.items()}, {j: x.upper for j, x in squares.items()}
    norms, factors = clip_factors(problem, estimates, allowed)
    by_group = group_norms(problem, estimates)
    finite = jnp.isfinite(rows.losses) & jnp.isfinite(norms) & jnp.all(jnp.isfinite(jnp.stack(factors)), axis=0)
    good = finite & problem.mask
    factors = [jnp.where(good, factor, 0) for factor in factors]
    good, factors = held((good, factors), problem.mask)  # or each sum makes its own
    return Measured(norms, factors, finite | ~problem.mask, good, each, allowed, by_group)


def room(parts: Split) -> float:
    """How many floats of one example ghost mode may hold for the norm of one layer."""
    return UNSLICED_SHARE * sum(map(operand_floats, parts.layers))


def _gradients(parts: Split, values: list[Any], mask: jax.Array) -> dict[int, jax.Array]:
    """All gradients that book-keeping writes out, held. Without views: they are made again, of what is summed."""
    each = _wide(parts, [j for j in range(len(parts.layers)) if j not in parts.views], values)
    each |= {j: written_out(x, values[j]) for j, x in enumerate(parts.layers) if x.route == "instantiated"}
    return held(each, mask)


def _wide(parts: Split, places: Iterable[int], values: list[Any]) -> dict[int, jax.Array]:
    """The gradients that the program itself writes out, of those of `places` that have no rules; at least float32."""
    return {j: values[j].astype(sum_dtype(values[j].dtype)) for j in places if not parts.layers[j].rules}


def _joint_square(each: list[jax.Array]) -> jax.Array:
    """|e|^2 f[B] of leaves f[B, ...] together."""
    rows = [x.reshape(x.shape[0], -1) for x in each]
    return square_sum(rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1), 1)


def clipped_sum(problem: Problem, method: str) -> ClippedSum:
    """The clipped sum by "bookkeeping", "ghost" or "auto"."""
    parts = split_backward(problem, method)
    if parts.mixes:  # split again, since each attempt is a function of its own to jax
        return repaired(problem, lambda kept: _sum_of(split_backward(kept, method), kept))
    return _sum_of(parts, problem)


def _sum_of(parts: Split, problem: Problem) -> ClippedSum:
    problem = with_constants_held(parts, problem)
    rows = evaluate_rows(parts, problem)
    found = measure_rows(parts, problem, rows)
    sums = sum_again if parts.method == "ghost" else sum_rows
    return _result(problem, rows, found, sums(parts, problem, found, rows))


def sum_rows(parts: Split, problem: Problem, found: Measured, rows: Evaluated) -> list[jax.Array]:
    """Book-keeping: every leaf's clipped sum from its gradients where they were written out, else from its operands."""
    values = layer_values(parts, without_bad_rows(parts, rows, found.good))
    each = found.each | _wide(parts, sorted(parts.views), values)
    places, layers = list(each), [parts.layers[j] for j in each]
    groups = [problem.groups[j] for j in places]
    sums = dict(zip(places, sum_written_out(layers, list(each.values()), found.factors, groups), strict=True))
    for j, layer in enumerate(parts.layers):
        if j not in each:
            sums[j] = sum_factors(layer, values[j], found.factors[problem.groups[j]])
    return [sums[j] for j in range(len(parts.layers))]


def sum_again(parts: Split, problem: Problem, found: Measured, rows: Evaluated) -> list[jax.Array]:
    """Ghost: a second pass, which makes every row's operands again and sums them; only norms are kept from the first.

    The compiler may round the two passes otherwise, and where gradients are nothing but rounding they then have little
    to do with each other. So each layer's norm is taken again, of what is summed, and keeps to the first one: whatever
    the compiler did, no layer gives more than the factors are made for. (A gradient of sum_i factor_i * loss_i, which
    is usual, is bound by nothing of the kind.)

    A row that does not count is replaced by a good one: its own values could be NaN, and NaN * 0 is NaN.
    """
    again = replace(problem, rows=replace_rows(found.good, problem.rows))
    depths = {j: len(parts.layers[j].rules[0].product.frames) for j in parts.inside}
    allowed = {j: rows.kept[x.squares[1], depths[j]] for j, x in parts.inside.items()}

    def second() -> list[jax.Array]:
        evaluated = evaluate_again(parts, again, found.factors, allowed)
        values, sums = layer_values(parts, evaluated), dict[int, jax.Array]()
        for places in bundles(parts, problem):
            first = places[0]
            layer, value = parts.layers[first], values[first]
            factor = found.factors[problem.groups[first]]
            if first in parts.inside:
                sums[first] = value
            elif layer.rules:
                sums[first] = sum_within(layer, value, factor, found.allowed[first], room(parts))
            else:
                written = _wide(parts, places, values)
                written |= held({j: x for j, x in written.items() if j not in parts.views}, found.good)
                square = _joint_square(list(written.values()))
                size = sum(problem.leaves[j].size for j in written)
                weight = capped(factor, found.allowed[first], square, size)
                layers, each = [parts.layers[j] for j in written], list(written.values())
                sums |= zip(written, sum_written_out(layers, each, [weight], [0] * len(each)), strict=True)
        return [sums[j] for j in range(len(parts.layers))]

    scans = any(rule.product.frames for layer in parts.layers for rule in layer.rules)
    return _where_any(found.good, second) if scans else second()


def _where_any(good: jax.Array, second: Callable[[], list[jax.Array]]) -> list[jax.Array]:
    """The second pass, in a branch that is taken where there is any good row to replace the bad ones.

    A branch has its own buffers. In one stretch with the first pass, the compiler would merge the zeros that the scans
    of both passes begin with, and hold them all the time. (Without scans a branch would only cost: XLA's CPU backend
    takes ten times as long for a convolution inside of one.)
    """

    def nothing():
        zero = (good[0] & False).astype(jnp.float32)  # inside shard_map it varies as the sums do
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), jax.eval_shape(second))

    return jax.lax.cond(jnp.any(good), second, nothing)


def _result(problem: Problem, rows: Evaluated, found: Measured, sums: list[jax.Array]) -> ClippedSum:
    sums = [x.astype(sum_dtype(leaf.dtype)) for x, leaf in zip(sums, problem.leaves, strict=True)]
    aux = jax.tree.map(lambda x: select_rows(found.good, x), rows.aux)
    losses = select_rows(found.good, rows.losses).astype(jnp.float32)
    by_group = None if found.group_norms is None else jnp.where(found.good, found.group_norms, 0)
    return ClippedSum(sums, select_rows(found.good, found.norms), losses, found.finite, aux, by_group)
