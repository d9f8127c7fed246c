"""The shortened program's values over a batch: what norms and clipped sums are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dpscale.clipping.convolution import Convolution
from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Constant, Name, Operand, Program, expose, run, with_zero
from dpscale.clipping.example import Problem
from dpscale.clipping.hold import cleared, finite_or_zero, held
from dpscale.clipping.norms import Squares, over_parts
from dpscale.clipping.split import Root, Split, root_of

Asked = tuple[Operand, int | None]
"""A value of the program, and where its batch axis is; None where it has none."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The shortened program's values over the batch: scan axes first, then B, then a value's own.

    `kept`: every value that norms and sums are made of, by its name in the program (`root_of`).
    """

    losses: jax.Array
    aux: Any
    kept: dict[Asked, jax.Array]


def with_constants_held(parts: Split, problem: Problem) -> Problem:
    """The problem with its leaves and closed-over arrays held of which sums are made: held with the other operands,
    they would be made once for every row.

    They may have been computed just before, and a compiler makes them again as it does any other value.
    """
    leaves, summed = list(problem.leaves), {x for x, _ in parts.held}
    places = [j for j, x in enumerate(parts.program.inputs[: len(leaves)]) if x in summed]
    constants = [x for x in summed if isinstance(x, Constant) and isinstance(x.value, Tracer)]
    if not places and not constants:
        return problem
    arrays, values = held(([leaves[j] for j in places], [x.value for x in constants]), problem.mask)
    for constant, value in zip(constants, values, strict=True):
        constant.value = value
    for j, array in zip(places, arrays, strict=True):
        leaves[j] = array
    return replace(problem, leaves=leaves)


def evaluate_rows(parts: Split, problem: Problem) -> Evaluated:
    """The only pass of book-keeping, whose sums are made of it; or ghost's first, of which nothing is summed: only the
    squared norms that scans give are held, since the second pass keeps to them too."""
    asked = _asked(parts, again=False)
    rows = _vmapped(parts, asked, _shortened(parts, asked), problem.leaves, jax.tree.leaves(problem.rows))
    if parts.method == "ghost":
        squares = {x for inside in parts.inside.values() for x in inside.squares}
        return _held(rows, [x for x in asked if x[0] in squares], problem.mask)
    return _held(rows, _own(parts, asked), problem.mask)


def evaluate_again(
    parts: Split, problem: Problem, factors: list[jax.Array], allowed: dict[int, jax.Array]
) -> Evaluated:
    """Ghost's second pass. What sums are made of is held one by one, since nothing may wait for the end; the program
    itself goes on with what is not held, so that the compiler rounds it as in the first pass, if it can.

    `factors`: f[B] of each clip group, 0 where a row counts as nothing. `allowed`: the squared norms f[scans.., B] that
    layers inside of scans keep to, by their number.

    Operands that no factor scales are made finite, so that times 0 they are 0: a row that was finite in the first pass
    need not be in this one, which the compiler may round otherwise. Where they are made, if a product reads all of
    them: whatever else uses them then meets nothing new in a row whose first norm was finite. The zeros of `max(x, 0)`
    are this pass's own: the compiler would merge those of both passes, and keep them all the time.
    """
    program, asked = parts.program, _asked(parts, again=True)
    given, made = program.inputs[len(problem.leaves) :], program.producers().keys()
    unscaled = unscaled_roots(parts)
    read = {x for (x, _), whole in unscaled.items() if whole and (x in made or x in given)}

    def through(name: Name, value: jax.Array) -> jax.Array:
        return finite_or_zero(value) if name in read else value

    short = with_zero(_shortened(parts, asked), held(jnp.zeros(()), problem.mask))
    finite = list(map(through, given, jax.tree.leaves(problem.rows)))
    rows = _vmapped(parts, asked, short, problem.leaves, finite, through, factors, allowed)
    rows = replace(rows, kept=rows.kept | {x: finite_or_zero(rows.kept[x]) for x in unscaled if x[0] not in read})
    for root in _own(parts, asked):
        rows = _held(rows, [root], problem.mask)
    return rows


def _own(parts: Split, asked: list[Asked]) -> list[Asked]:
    """Of `asked` what sums are made of, and is each row's own: its inputs, and what the program makes."""
    leaves = set(parts.program.inputs[: len(parts.layers)])
    return [x for x in asked if x in parts.held and isinstance(x[0], Name) and x[0] not in leaves]


def _asked(parts: Split, again: bool) -> list[Asked]:
    """What norms are made of; `again`: what sums are. The bodies of scans make some of both themselves."""
    program, asked = parts.program, dict[Asked, None]()
    producers, gradients = program.producers(), program.outputs[-len(parts.layers) :]
    for j, (layer, gradient) in enumerate(zip(parts.layers, gradients, strict=True)):
        inside = parts.inside.get(j)
        if inside is not None:
            depth = len(layer.rules[0].product.frames)
            asked |= dict.fromkeys([(inside.total, None)] if again else [(x, depth) for x in inside.squares])
        elif layer.rules:
            asked |= {root_of(x, rule.product.frames, producers): None for rule in layer.rules for x in rule.operands}
        else:
            asked[root_of(gradient, (), producers)] = None
    return list(asked)


def _shortened(parts: Split, asked: list[Asked]) -> Program:
    """The program that ends in the loss, the auxiliary outputs and what is asked."""
    return expose(parts.program, [*parts.program.outputs[: 1 + parts.num_aux], *(x for x, _ in asked)])


def _vmapped(
    parts: Split,
    asked: list[Asked],
    short: Program,
    leaves: list[jax.Array],
    rows: list[jax.Array],
    through: Callable[[Name, jax.Array], jax.Array] | None = None,
    factors: Sequence[jax.Array] = (),
    allowed: dict[int, jax.Array] | None = None,
) -> Evaluated:
    """The program's values under vmap. What its scans' sums read, `factors` and `allowed`, is set on the way."""

    def one(row, factors, allowed):
        parts.weights.factors = list(factors)
        for j, inside in parts.inside.items():
            inside.allowed.value = allowed.get(j)
        values = run(short, *leaves, *row, through=through)
        parts.weights.factors = []  # no trace outlives its function
        for inside in parts.inside.values():
            inside.allowed.value = None
        return tuple(values[: 1 + parts.num_aux]), tuple(values[1 + parts.num_aux :])

    allowed = allowed or {}
    axes = 0, 0, {j: len(parts.layers[j].rules[0].product.frames) for j in allowed}
    head, values = jax.vmap(one, axes, (0, tuple(at for _, at in asked)))(rows, list(factors), allowed)
    return Evaluated(head[0], parts.aux_tree.unflatten(head[1:]), dict(zip(asked, values, strict=True)))


def _held(rows: Evaluated, asked: list[Asked], mask: jax.Array) -> Evaluated:
    """The values, with those of `asked` held."""
    return replace(rows, kept=rows.kept | dict(zip(asked, held([rows.kept[x] for x in asked], mask), strict=True)))


def layer_values(parts: Split, rows: Evaluated) -> list[Any]:
    """Of each layer: its operands, its gradients [B, ...], or what its scan made of them: the squares, in a second pass
    the clipped sum."""
    producers = parts.program.producers()

    def value(x: Operand, frames: tuple[Frame, ...]) -> jax.Array:
        root, depth = root_of(x, frames, producers)
        kept = rows.kept[root, depth]
        if not frames:
            return kept.reshape(kept.shape[0], *x.shape)
        return kept if depth else jnp.broadcast_to(kept, (*(f.length for f in frames), *kept.shape))  # a constant

    values: list[Any] = []
    for j, (layer, gradient) in enumerate(zip(parts.layers, parts.program.outputs[-len(parts.layers) :], strict=True)):
        inside = parts.inside.get(j)
        if inside is not None and (inside.total, None) in rows.kept:
            values.append(layer.rules[0].product.finish(rows.kept[inside.total, None]))
        elif inside is not None:
            depth = len(layer.rules[0].product.frames)
            values.append(Squares(*[over_parts(rows.kept[x, depth]) for x in inside.squares]))
        elif layer.rules:
            at = [(rule.product, [value(x, rule.product.frames) for x in rule.operands]) for rule in layer.rules]
            values.append([product.scaled(*pair) for product, pair in at])
        else:
            values.append(value(gradient, ()))
    return values


def without_bad_rows(parts: Split, rows: Evaluated, good: jax.Array) -> Evaluated:
    """The values whose rows may be multiplied by zero: operands that sums do not scale are zero in rows that are not
    `good`, bool[B]. Of the others, which are scaled by the factors, bad rows are selected away in passing.
    """
    roots = [root for root in unscaled_roots(parts) if _is_float(rows.kept[root])]
    clean = cleared([rows.kept[root] for root in roots], good, tuple(depth for _, depth in roots))
    return replace(rows, kept=rows.kept | dict(zip(roots, clean, strict=True)))


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def unscaled_roots(parts: Split) -> dict[Root, bool]:
    """What is kept for the operands that sums do not scale, and whether a product reads all of it: a convolution may
    skip some."""
    producers, found = parts.program.producers(), dict[Root, bool]()
    summed = [layer for j, layer in enumerate(parts.layers) if layer.folds and j not in parts.inside]
    for rule in (rule for layer in summed for rule in layer.rules):
        root = root_of(rule.operands[1 - rule.scaled_at], rule.product.frames, producers)
        found[root] = found.get(root, False) or not isinstance(rule, Convolution)
    return found
