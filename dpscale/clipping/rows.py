"""The shortened program's values over a batch: what norms and clipped sums are made of."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Constant, Operand, expose, passing, run, with_zero
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
            asked[root_of(gradient, (), producers)] = 0
        for rule in layer.rules if j not in parts.inside else ():
            for x in rule.operands:
                root = root_of(x, rule.product.frames, producers)
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
        root = root_of(x, frames, producers)
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


def without_bad_rows(parts: Split, rows: Evaluated, good: jax.Array, summed: Collection[int]) -> Evaluated:
    """The values whose rows may be multiplied by zero: first operands are zero where rows are not `good`, bool[B].

    `summed`: the layers whose sums are made of operands. Second operands are scaled by the factors, and bad rows are
    selected away in passing.
    """
    producers, axes = parts.program.producers(), {}
    for j in summed:
        for rule in parts.layers[j].rules:
            root, depth = root_of(rule.operands[0], rule.product.frames, producers), len(rule.product.frames)
            if jnp.issubdtype(rows.kept[root].dtype, jnp.inexact):
                axes[root] = 0 if isinstance(root, Constant) else depth
    clean = cleared([rows.kept[x] for x in axes], good, tuple(axes.values()))
    return replace(rows, kept=rows.kept | dict(zip(axes, clean, strict=True)))
