"""Clipped sums by a backward pass that is cut before each weight's gradient.

1. Trace value_and_grad of one example's loss.
2. Cut it: in place of each weight's gradient return the two operands of the product that makes it.
3. vmap the shortened program over the batch: nothing of size batch x parameters appears.
4. Norms of each layer from the operands; clip factors from their sum.
5. Book-keeping: the clipped sum of each layer from the same operands, one product over the whole batch.
   Ghost: the same pass again, once the factors are known; nothing is kept between the two.

Sources: Goodfellow 2015 (arXiv 1510.01799), Li et al. 2021 (arXiv 2110.05679, ghost clipping), Bu et al. 2022
(arXiv 2210.00038, book-keeping and the mixed choice).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.convolution import batched_convolution
from dpscale.clipping.cut import Frame, cut
from dpscale.clipping.example import (
    ClippedSum,
    Problem,
    clip_factors,
    group_norms,
    replace_rows,
    select_rows,
    sum_dtype,
)
from dpscale.clipping.hold import cleared, held
from dpscale.clipping.inside import Inside, RowWeights, taken_inside
from dpscale.clipping.jaxpr import (
    MOVES,
    Constant,
    Equation,
    Name,
    Operand,
    Program,
    expose,
    moved_from,
    moving_names,
    passing,
    run,
    trace,
    walk,
    with_zero,
)
from dpscale.clipping.layers import (
    Layer,
    choose_routes,
    layer_for,
    measure,
    measure_in_slices,
    sum_factors,
    sum_written_out,
)
from dpscale.clipping.norms import Squares, over_parts, square_sum


@dataclass(frozen=True, eq=False)
class Split:
    """The traced program of one example, cut; a layer for each trainable leaf; the method that will be used.

    `inside[j]` is what the body of layer j's scan computes by itself; `weights` is what its sum reads. `held` are the
    operands that must be held, since sums are made of them; `views` the leaves whose gradients are operands of others,
    reshaped (the bias of a layer that is applied at one position).
    """

    program: Program
    method: str
    layers: list[Layer]
    num_aux: int
    aux_tree: Any
    inside: dict[int, Inside]
    weights: RowWeights
    held: frozenset[Operand]
    views: frozenset[int]


def split_backward(problem: Problem, method: str) -> Split:
    """Traces the loss for one row, finds the cuts and chooses the routes.

    "auto" is book-keeping, unless jax.checkpoint asks for the memory that it would take: then it is ghost.
    """
    traced: list[Any] = []

    def example(row):
        def fun(leaves, row):
            (loss, aux), grads = jax.value_and_grad(problem.loss, has_aux=True)(leaves, row)
            return loss, aux, grads

        program, results = trace(fun, problem.leaves, row)
        traced.extend((program, results[1]))
        return jnp.zeros(())

    jax.vmap(example)(problem.rows)  # for the types of one row, as they are inside shard_map
    program, aux = traced
    count = len(problem.leaves)
    moving = moving_names(program, program.inputs[count:])
    for equation in walk(program):
        if equation.operation == "conv_general_dilated" and all(x in moving for x in equation.inputs):
            equation.apply = batched_convolution(equation.apply)
    method = method if method != "auto" else "ghost" if program.checkpointed else "bookkeeping"
    layers = []
    for name, leaf, gradient in zip(problem.names, problem.leaves, program.outputs[-count:], strict=True):
        found = cut(program, gradient, moving, program.inputs[:count])
        layers.append(layer_for(name, leaf.shape, found, program, tuple(problem.leaves)))
    layers = choose_routes(layers, refold=method == "ghost")
    weights, inside = RowWeights([]), {}
    for j, layer in enumerate(layers):
        found = taken_inside(layer, problem.groups[j], weights, problem.mask) if method == "ghost" else None
        if found is not None:
            inside[j] = found
    producers, gradients = program.producers(), program.outputs[-count:]
    roots = [[_root(x, r.product.frames, producers) for r in layer.rules for x in r.operands] for layer in layers]
    summed = [method == "ghost" or layer.route in ("outer", "ghost") for layer in layers]
    once = {x for each in roots for x in each if _is_made_once(x, producers)}
    held = frozenset(x for each, on in zip(roots, summed, strict=True) if on for x in each) - once
    views = [j for j, x in enumerate(gradients) if not layers[j].rules and _root(x, (), producers) in held | once]
    num_aux, aux_tree = len(jax.tree.leaves(aux)), jax.tree.structure(aux)
    return Split(program, method, layers, num_aux, aux_tree, inside, weights, held, frozenset(views))


def _is_made_once(x: Operand, producers: dict[Name, Equation]) -> bool:
    """Whether a compiler makes a value once for all its uses without being told to: a product, moved or not.

    What it makes again in other loops is what costs little there, such as a product over an axis of length 1.
    """
    origin = moved_from(x, producers, MOVES)
    equation = producers.get(origin) if isinstance(origin, Name) else None
    if equation is None or equation.operation != "dot_general":
        return False
    (contracted, _), _ = equation.params["dimension_numbers"]
    return prod(equation.inputs[0].shape[i] for i in contracted) > 1


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The shortened program's values over the batch: scan axes first, then B, then a value's own.

    `kept`: every value that norms and sums are made of, by its name in the program (`_root`).
    """

    losses: jax.Array
    aux: Any
    kept: dict[Operand, jax.Array]


def evaluate_rows(parts: Split, problem: Problem, factors: list[jax.Array] | None = None) -> Evaluated:
    """Runs the shortened program under vmap.

    `factors`: f[B] of each clip group, for the second pass, in which every row counts.
    """
    program, count = parts.program, len(problem.leaves)
    heads, producers = program.outputs[: 1 + parts.num_aux], program.producers()
    asked: dict[Operand, int | None] = {}
    for j, (layer, gradient) in enumerate(zip(parts.layers, program.outputs[-count:], strict=True)):
        depth = len(layer.rules[0].product.frames) if j in parts.inside else 0
        if j in parts.inside and factors is not None:
            asked[parts.inside[j].total] = None  # a sum over the rows already
        elif j in parts.inside:
            asked |= dict.fromkeys(parts.inside[j].squares, depth)
        elif not layer.rules:
            asked[_root(gradient, (), producers)] = 0
        for rule in layer.rules if j not in parts.inside else ():
            for x in rule.operands:
                root = _root(x, rule.product.frames, producers)
                asked[root] = 0 if isinstance(root, Constant) else len(rule.product.frames)
    short = passing(expose(program, [*heads, *asked]), parts.held, lambda x: held(x, problem.mask))
    if factors is not None:  # or the compiler merges the arrays of zeros of both passes, and keeps them all the time
        short = with_zero(short, held(jnp.zeros(()), problem.mask))

    def one(row, factors):
        parts.weights.factors, parts.weights.good = factors, jnp.ones((), bool)
        return tuple(run(short, *problem.leaves, *row))

    depths = (*[0] * len(heads), *asked.values())
    results = jax.vmap(one, out_axes=depths)(jax.tree.leaves(problem.rows), factors)
    aux = parts.aux_tree.unflatten(results[1 : len(heads)])
    return Evaluated(results[0], aux, dict(zip(asked, results[len(heads) :], strict=True)))


def layer_values(parts: Split, rows: Evaluated) -> list[Any]:
    """Of each layer: its operands, its gradients [B, ...], or what its scan made of them: the squares, in a second pass
    the clipped sum."""
    producers = parts.program.producers()

    def value(x: Operand, frames: tuple[Frame, ...]) -> jax.Array:
        root = _root(x, frames, producers)
        kept = rows.kept[root]
        if not frames:
            return kept.reshape(kept.shape[0], *x.shape)
        return (
            jnp.broadcast_to(kept, (*(f.length for f in frames), *kept.shape)) if isinstance(root, Constant) else kept
        )

    values: list[Any] = []
    for j, (layer, gradient) in enumerate(zip(parts.layers, parts.program.outputs[-len(parts.layers) :], strict=True)):
        inside = parts.inside.get(j)
        if inside is not None and inside.total in rows.kept:
            values.append(layer.rules[0].product.finish(rows.kept[inside.total]))
        elif inside is not None:
            values.append(Squares(*[over_parts(rows.kept[x]) for x in inside.squares]))
        elif layer.rules:
            at = [(rule.product, [value(x, rule.product.frames) for x in rule.operands]) for rule in layer.rules]
            values.append([product.scaled(*pair) for product, pair in at])
        else:
            values.append(value(gradient, ()))
    return values


def without_bad_rows(parts: Split, rows: Evaluated, found: "Measured") -> Evaluated:
    """The values that are summed: first operands are zero in rows that do not count. (Second ones are scaled anyway,
    and a row that does not count is selected away as that is done.)"""
    producers, axes = parts.program.producers(), {}
    for layer, each in zip(parts.layers, found.each, strict=True):
        for rule in layer.rules if each is None else ():
            root, depth = _root(rule.operands[0], rule.product.frames, producers), len(rule.product.frames)
            if jnp.issubdtype(rows.kept[root].dtype, jnp.inexact):
                axes[root] = 0 if isinstance(root, Constant) else depth
    clean = cleared([rows.kept[x] for x in axes], found.good, tuple(axes.values()))
    return replace(rows, kept=rows.kept | dict(zip(axes, clean, strict=True)))


def _root(x: Operand, frames: tuple[Frame, ...], producers: dict[Name, Equation]) -> Operand:
    """The value that is kept for an operand or a gradient: where it is not in a scan, what it is a reshape of."""
    root = _outermost(x, frames)
    return root if frames else moved_from(root, producers)


def _outermost(x: Operand, frames: tuple[Frame, ...]) -> Operand:
    """What a scan's body reads from a stacked input is, stacked, that input itself."""
    while frames and not isinstance(x, Constant):
        stacked = frames[-1].scan.xs_operand(x)
        if stacked is None or isinstance(stacked, Constant):
            break
        x, frames = stacked, frames[:-1]
    return x


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
    for places in bundles(parts, problem):
        first = places[0]  # stands for the bundle
        layer, value = parts.layers[first], values[first]
        if isinstance(value, Squares):
            squares[first] = value
        elif layer.rules and refold:
            squares[first] = measure_in_slices(layer, value)
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
    sums: list[Any] = []
    for j, layer in enumerate(parts.layers):
        factor = found.factors[problem.groups[j]]
        if j in parts.inside:
            sums.append(values[j])
        elif j in each:
            sums.append(sum_written_out(layer, each[j], factor, found.good))
        else:
            sums.append(sum_factors(layer, values[j], factor, found.good))
    return sums


def clipped_sum(problem: Problem, method: str) -> ClippedSum:
    """The clipped sum by "bookkeeping", "ghost" or "auto"."""
    parts = split_backward(problem, method)
    return ghost(problem, parts) if parts.method == "ghost" else bookkeeping(problem, parts)


def bookkeeping(problem: Problem, parts: Split) -> ClippedSum:
    """One backward pass; the operands of every layer are kept until the factors are known."""
    rows = evaluate_rows(parts, problem)
    found = measure_rows(parts, problem, rows, refold=False)
    return _result(problem, rows, found, sum_rows(parts, problem, found, without_bad_rows(parts, rows, found)))


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
        sums = _where_any(found.good, lambda: _sum_again(again, parts, found, factors))
    else:
        sums = [jnp.where(jnp.any(found.good), x, 0) for x in _sum_again(again, parts, found, factors)]
    return _result(problem, rows, found, sums)


def _sum_again(again: Problem, parts: Split, found: Measured, factors: list[jax.Array]) -> list[jax.Array]:
    """The clipped sums from operands made again. No row is bad any more, so nothing is selected away.

    The barrier keeps the compiler from holding the first pass's operands instead of making them again.
    """
    rows, factors = jax.lax.optimization_barrier((again.rows, factors))
    everything = replace(found, factors=factors, good=jnp.ones_like(found.good), each=[None] * len(found.each))
    again = replace(again, rows=rows)
    return sum_rows(parts, again, everything, evaluate_rows(parts, again, factors))


def _where_any(good: jax.Array, sums: Callable[[], list[jax.Array]]) -> list[jax.Array]:
    """The second pass; zeros without any good row, since then nothing replaced the bad ones.

    A branch has its own buffers. In one stretch with the first pass, the compiler would merge the zeros that the scans
    of both passes begin with, and hold them all the time. (Without scans a branch would only cost: XLA's CPU backend
    takes ten times as long for a convolution inside of one.)
    """

    def nothing():
        zero = (good[0] & False).astype(jnp.float32)  # inside shard_map it varies as the sums do
        return [jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype) for x in jax.eval_shape(sums)]

    return jax.lax.cond(jnp.any(good), sums, nothing)


def _result(problem: Problem, rows: Evaluated, found: Measured, sums: list[jax.Array]) -> ClippedSum:
    sums = [x.astype(sum_dtype(leaf.dtype)) for x, leaf in zip(sums, problem.leaves, strict=True)]
    aux = jax.tree.map(lambda x: select_rows(found.good, x), rows.aux)
    losses = select_rows(found.good, rows.losses).astype(jnp.float32)
    by_group = None if found.group_norms is None else jnp.where(found.good, found.group_norms, 0)
    return ClippedSum(sums, select_rows(found.good, found.norms), losses, found.finite, aux, by_group)
