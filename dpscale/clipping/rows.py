"""The shortened program's values over a batch: what norms and clipped sums are made of."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Name, Operand, expose, run, with_zero
from dpscale.clipping.example import Problem
from dpscale.clipping.hold import cleared, held
from dpscale.clipping.norms import Squares, over_parts
from dpscale.clipping.split import Split, root_of


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The shortened program's values over the batch: scan axes first, then B, then a value's own.

    `kept`: every value that norms and sums are made of, by its name in the program (`root_of`).
    """

    losses: jax.Array
    aux: Any
    kept: dict[tuple[Operand, int | None], jax.Array]


def evaluate_rows(parts: Split, problem: Problem, factors: list[jax.Array] | None = None) -> Evaluated:
    """Runs the shortened program under vmap.

    `factors`: f[B] of each clip group, for the second pass, in which every row counts.
    """
    program, count = parts.program, len(problem.leaves)
    heads, producers = program.outputs[: 1 + parts.num_aux], program.producers()
    asked: dict[tuple[Operand, int | None], None] = {}
    for j, (layer, gradient) in enumerate(zip(parts.layers, program.outputs[-count:], strict=True)):
        inside = parts.inside.get(j)
        if inside is not None:
            depth = len(layer.rules[0].product.frames)
            asked |= dict.fromkeys(
                [(inside.total, None)] if factors is not None else [(x, depth) for x in inside.squares]
            )
        elif layer.rules:
            asked |= {root_of(x, rule.product.frames, producers): None for rule in layer.rules for x in rule.operands}
        else:
            asked[root_of(gradient, (), producers)] = None
    short = expose(program, [*heads, *(x for x, _ in asked)])
    if factors is not None:  # or the compiler merges the arrays of zeros of both passes, and keeps them all the time
        short = with_zero(short, held(jnp.zeros(()), problem.mask))
    # Both passes of ghost hold where a value is made, and so are put together alike. Else all are held at the end.
    early = {*heads, *(x for x, _ in parts.held)} & producers.keys() if parts.method == "ghost" else set[Operand]()
    given = {x for x, _ in asked if not isinstance(x, Name)} | {*program.inputs}
    late = [root for root in asked if root in parts.held and root[0] not in early | given]

    def through(name, value):
        return held(value, problem.mask) if name in early else value

    def one(row, factors):
        parts.weights.factors, parts.weights.good = factors, jnp.ones((), bool)
        values = run(short, *problem.leaves, *row, through=through)
        return tuple(values[: len(heads)]), tuple(values[len(heads) :])

    depths = tuple(depth for _, depth in asked)
    first, values = jax.vmap(one, out_axes=(0, depths))(jax.tree.leaves(problem.rows), factors)
    kept = dict(zip(asked, values, strict=True))
    kept |= zip(late, held([kept[root] for root in late], problem.mask), strict=True)
    return Evaluated(first[0], parts.aux_tree.unflatten(first[1:]), kept)


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


def without_bad_rows(parts: Split, rows: Evaluated, good: jax.Array, summed: Collection[int]) -> Evaluated:
    """The values whose rows may be multiplied by zero: first operands are zero where rows are not `good`, bool[B].

    `summed`: the layers whose sums are made of operands. Second operands are scaled by the factors, and bad rows are
    selected away in passing.
    """
    producers = parts.program.producers()
    rules = [rule for j in summed for rule in parts.layers[j].rules]
    roots = dict.fromkeys(root_of(rule.operands[0], rule.product.frames, producers) for rule in rules)
    roots = [root for root in roots if jnp.issubdtype(rows.kept[root].dtype, jnp.inexact)]
    clean = cleared([rows.kept[root] for root in roots], good, tuple(depth for _, depth in roots))
    return replace(rows, kept=rows.kept | dict(zip(roots, clean, strict=True)))
