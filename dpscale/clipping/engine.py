"""Clipped sums by a backward pass that is cut before each weight's gradient.

1. Trace value_and_grad of one example's loss (`trace`).
2. Cut it: in place of each weight's gradient return the two operands of the product that makes it (`split_backward`).
3. vmap the shortened program over the batch: nothing of size batch x parameters appears (`evaluate_rows`).
4. Norms of each layer from the operands; clip factors from their sum (`measure_rows`).
5. Book-keeping: the clipped sum of each layer from the same operands, one product over the whole batch (`sum_rows`).
   Ghost: the same pass again, once the factors are known; nothing is kept between the two.
"""

from collections.abc import Callable, Sequence
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
    measure,
    measure_in_slices,
    operand_floats,
    sum_factors,
    sum_written_out,
)
from dpscale.clipping.norms import Squares, square_sum
from dpscale.clipping.rows import Evaluated, evaluate_rows, layer_values, without_bad_rows
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
    """Norms f[B], factors f[B] of each clip group, flags bool[B], and of each leaf what was written out, if it was."""

    norms: jax.Array
    factors: list[jax.Array]
    finite: jax.Array
    good: jax.Array
    each: list[jax.Array | None]
    group_norms: jax.Array | None


def measure_rows(parts: Split, problem: Problem, rows: Evaluated, refold: bool) -> Measured:
    """Everything that decides the factors. A row's numbers meet no other row's."""
    values = layer_values(parts, rows)
    squares, each = dict[int, Squares](), list[jax.Array | None]([None] * len(parts.layers))
    room = UNSLICED_SHARE * sum(map(operand_floats, parts.layers))
    for places in bundles(parts, problem):
        first = places[0]  # stands for the bundle
        layer, value = parts.layers[first], values[first]
        if isinstance(value, Squares):
            squares[first] = value
        elif layer.rules and refold:
            squares[first] = measure_in_slices(layer, value, room)
        elif layer.rules:
            squares[first], each[first] = measure(layer, value, problem.mask)
        else:
            written = _written(parts, places, values, problem.mask)
            squares[first] = Squares(*[_joint_square(list(written.values()))] * 2)
            for j in written.keys() - parts.views:  # a view is made again, of what is summed
                each[j] = written[j]
    estimates = {j: x.estimate for j, x in squares.items()}
    norms, factors = clip_factors(problem, estimates, {j: x.upper for j, x in squares.items()})
    by_group = group_norms(problem, estimates)
    finite = jnp.isfinite(rows.losses) & jnp.isfinite(norms) & jnp.all(jnp.isfinite(jnp.stack(factors)), axis=0)
    good, factors = held((finite & problem.mask, factors), problem.mask)  # or each sum makes its own
    return Measured(norms, factors, finite | ~problem.mask, good, each, by_group)


def _written(parts: Split, places: Sequence[int], values: list[Any], mask: jax.Array) -> dict[int, jax.Array]:
    """The gradients that the program itself writes out, of those of `places` that have no rules; at least float32."""
    wide = {j: values[j].astype(sum_dtype(values[j].dtype)) for j in places if not parts.layers[j].rules}
    computed = {j: x for j, x in wide.items() if j not in parts.views}
    return wide | (held(computed, mask) if computed else {})


def _joint_square(each: list[jax.Array]) -> jax.Array:
    """|e|^2 f[B] of leaves f[B, ...] together."""
    rows = [x.reshape(x.shape[0], -1) for x in each]
    return square_sum(rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1), 1)


def sum_rows(parts: Split, problem: Problem, found: Measured, rows: Evaluated) -> list[Any]:
    """Every leaf's clipped sum: from its gradients where they were written out, else from its operands."""
    values = layer_values(parts, rows)
    missing = [j for j, x in enumerate(found.each) if x is None]
    each = {j: x for j, x in enumerate(found.each) if x is not None}
    each |= _written(parts, missing, values, found.good)
    places, layers = list(each), [parts.layers[j] for j in each]
    groups = [problem.groups[j] for j in places]
    written = sum_written_out(layers, list(each.values()), found.factors, groups, found.good)
    sums: dict[int, Any] = dict(zip(places, written, strict=True))
    for j, layer in enumerate(parts.layers):
        if j in parts.inside:
            sums[j] = values[j]
        elif j not in each:
            sums[j] = sum_factors(layer, values[j], found.factors[problem.groups[j]], found.good)
    return [sums[j] for j in range(len(parts.layers))]


def clipped_sum(problem: Problem, method: str) -> ClippedSum:
    """The clipped sum by "bookkeeping", "ghost" or "auto"."""
    parts = split_backward(problem, method)
    return ghost(problem, parts) if parts.method == "ghost" else bookkeeping(problem, parts)


def bookkeeping(problem: Problem, parts: Split) -> ClippedSum:
    """One backward pass; the operands of every layer are kept until the factors are known."""
    rows = evaluate_rows(parts, problem)
    found = measure_rows(parts, problem, rows, refold=False)
    clean = without_bad_rows(parts, rows, found.good, [j for j, x in enumerate(found.each) if x is None])
    return _result(problem, rows, found, sum_rows(parts, problem, found, clean))


def ghost(problem: Problem, parts: Split) -> ClippedSum:
    """Two passes, norms first; nothing is kept between them but the factors.

    The second one makes every row's operands again, from the same cotangents, and sums those. (A gradient of sum_i
    factor_i * loss_i would round other cotangents than the norms were taken of.) A row that does not count is replaced
    by a good one: its own values could be NaN, and NaN * 0 is NaN.
    """
    rows = evaluate_rows(parts, problem)
    found = measure_rows(parts, problem, rows, refold=True)
    again = replace(problem, rows=replace_rows(found.good, problem.rows))
    factors = [jnp.where(found.good, factor, 0) for factor in found.factors]
    if any(rule.product.frames for layer in parts.layers for rule in layer.rules):
        second = _where_any(found.good, lambda: _sum_again(again, parts, found, factors))
    else:
        second = _sum_again(again, parts, found, factors)
    sums, losses, aux = jax.tree.map(
        lambda x, first: jnp.where(jnp.any(found.good), x, first),
        second,
        ([jnp.zeros((), x.dtype) for x in second[0]], rows.losses, rows.aux),
    )
    return _result(problem, replace(rows, losses=losses, aux=aux), found, sums)


Second = tuple[list[jax.Array], jax.Array, Any]


def _sum_again(again: Problem, parts: Split, found: Measured, factors: list[jax.Array]) -> Second:
    """The clipped sums from operands made again; and the losses and the auxiliary output, also made again: were they
    not asked for, the compiler would put this pass together in another way than the first one, and round otherwise.

    No row is bad any more, so nothing is selected away. The barrier keeps the compiler from holding the first pass's
    operands instead of making them again. The rows are held because the first pass reads them from memory: fused with
    what replaces bad rows, the first operations on them would be rounded otherwise (1.8 of the bound was seen).
    """
    rows, factors = held(jax.lax.optimization_barrier((again.rows, factors)), found.good)
    everything = replace(found, factors=factors, good=jnp.ones_like(found.good), each=[None] * len(found.each))
    again = replace(again, rows=rows)
    evaluated = evaluate_rows(parts, again, factors)
    return sum_rows(parts, again, everything, evaluated), evaluated.losses, evaluated.aux


def _where_any(good: jax.Array, second: Callable[[], Second]) -> Second:
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
