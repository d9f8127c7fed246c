"""The shortened program's values over a batch: what norms and clipped sums are made of."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Name, Operand, expose, run, with_zero
from dpscale.clipping.example import Problem
from dpscale.clipping.hold import cleared, finite_or_zero, held
from dpscale.clipping.norms import Squares, over_parts
from dpscale.clipping.split import Root, Split, root_of


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The shortened program's values over the batch: scan axes first, then B, then a value's own.

    `kept`: every value that norms and sums are made of, by its name in the program (`root_of`).
    """

    losses: jax.Array
    aux: Any
    kept: dict[tuple[Operand, int | None], jax.Array]


@dataclass(frozen=True, eq=False)
class Weights:
    """What ghost's second pass is given: f[B] of each clip group, 0 where a row counts as nothing; and the squared
    norms f[scans.., B] that each layer inside of a scan keeps to, by its number."""

    factors: list[jax.Array]
    allowed: dict[int, jax.Array]


def evaluate_rows(parts: Split, problem: Problem, weights: Weights | None = None) -> Evaluated:
    """Runs the shortened program under vmap. `weights`: in ghost's second pass."""
    program, count = parts.program, len(problem.leaves)
    heads, producers = program.outputs[: 1 + parts.num_aux], program.producers()
    asked: dict[tuple[Operand, int | None], None] = {}
    for j, (layer, gradient) in enumerate(zip(parts.layers, program.outputs[-count:], strict=True)):
        inside = parts.inside.get(j)
        if inside is not None:
            depth = len(layer.rules[0].product.frames)
            asked |= dict.fromkeys([(inside.total, None)] if weights else [(x, depth) for x in inside.squares])
        elif layer.rules:
            asked |= {root_of(x, rule.product.frames, producers): None for rule in layer.rules for x in rule.operands}
        else:
            asked[root_of(gradient, (), producers)] = None
    short = expose(program, [*heads, *(x for x, _ in asked)])
    through = None
    late = [x for x in asked if x in parts.held and isinstance(x[0], Name) and x[0] not in program.inputs]
    if weights:  # zeros of its own: the compiler would merge those of both passes, and keep them all the time
        short, through = with_zero(short, held(jnp.zeros(()), problem.mask)), _made_for_sums(parts, problem.mask)
    if parts.method == "ghost":  # nothing is summed of the first pass's values; the second's cannot wait
        late = [x for x in late if weights and x[0] not in producers]

    def one(row, factors, allowed):
        parts.weights.factors = factors
        for j, inside in parts.inside.items():
            inside.allowed.value = allowed.get(j)
        values = run(short, *problem.leaves, *row, through=through)
        return tuple(values[: len(heads)]), tuple(values[len(heads) :])

    factors, allowed = (weights.factors, weights.allowed) if weights else ([], {})
    given = jax.tree.leaves(problem.rows), factors, allowed
    axes = 0, 0, {j: len(parts.layers[j].rules[0].product.frames) for j in allowed}
    first, values = jax.vmap(one, axes, (0, tuple(depth for _, depth in asked)))(*given)
    kept = dict(zip(asked, values, strict=True))
    if weights:
        kept |= {x: finite_or_zero(kept[x]) for x in first_roots(parts) if x[0] not in producers}
    kept |= zip(late, held([kept[root] for root in late], problem.mask), strict=True)
    return Evaluated(first[0], parts.aux_tree.unflatten(first[1:]), kept)


def _made_for_sums(parts: Split, mask: jax.Array) -> Callable[[Name, jax.Array], jax.Array]:
    """What each value of the second pass goes through where it is made: it is held if sums are made of it. First
    operands are made finite before that, so that times 0 they are 0: a row that was finite in the first pass need not
    be in the second, which the compiler may round otherwise."""
    once, first = {x for x, _ in parts.held}, {x for x, _ in first_roots(parts)}

    def through(name: Name, value: jax.Array) -> jax.Array:
        value = finite_or_zero(value) if name in first else value
        return held(value, mask) if name in once else value

    return through


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
    """The values whose rows may be multiplied by zero: first operands are zero where rows are not `good`, bool[B].

    Second operands are scaled by the factors, and bad rows are selected away in passing.
    """
    roots = [root for root in first_roots(parts) if jnp.issubdtype(rows.kept[root].dtype, jnp.inexact)]
    clean = cleared([rows.kept[root] for root in roots], good, tuple(depth for _, depth in roots))
    return replace(rows, kept=rows.kept | dict(zip(roots, clean, strict=True)))


def first_roots(parts: Split) -> list[Root]:
    """What is kept for the first operands of layers whose sums are made of operands."""
    producers = parts.program.producers()
    summed = [layer for j, layer in enumerate(parts.layers) if layer.folds and j not in parts.inside]
    rules = [rule for layer in summed for rule in layer.rules]
    return list(dict.fromkeys(root_of(rule.operands[0], rule.product.frames, producers) for rule in rules))
