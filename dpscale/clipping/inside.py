"""Layers stacked in a scan, in ghost mode: the scan's body takes each layer's norms, and later its sum, by itself.

Otherwise the operands of all layers would come out of the scan stacked, which jax.checkpoint is there to avoid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Constant, Equation, Name
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.hold import finite_or_zero, held
from dpscale.clipping.layers import UNSLICED_SHARE, Layer, measure_in_slices, rule_for, sum_within


@dataclass(eq=False)
class RowWeights:
    """The clip factor f[] of each group, of the row under vmap; set while it is traced."""

    factors: list[Any]


@dataclass(frozen=True, eq=False)
class Inside:
    """What the scan's body makes of a layer: its squared norms (estimate, upper bound) and its clipped sum over all
    rows.

    The sum has the shape of the product's own result; it has no row axis, whatever its inputs have. `allowed` is the
    squared norm f[scans..] of the row under vmap that each round's sum keeps to; its value is set while that is traced.
    """

    squares: tuple[Name, Name]
    total: Name
    allowed: Constant


def taken_inside(layer: Layer, group: int, weights: RowWeights, floats: int) -> Inside | None:
    """Adds all to the body of the layer's scan; None where a layer's gradient is more than one product there.

    `floats`: the size of all layers' operands, a share of which the norms may take as memory.
    """
    if len(layer.rules) != 1 or layer.tail is not None:
        return None
    product = layer.rules[0].product
    if not product.frames or any(frame.summed for frame in product.frames):
        return None
    body = product.frames[-1].scan.body
    rule = rule_for(replace(product, frames=(), chain=()), body, refold=True)
    if rule is None or not all(isinstance(x, Name) for x in rule.operands):
        return None
    result, room = product.equation.outputs[0], UNSLICED_SHARE * floats
    dtype = sum_dtype(result.dtype)
    one = replace(layer, rules=(rule,), shape=result.shape)
    found = Inside((Name((), dtype), Name((), dtype)), Name(result.shape, dtype), Constant(None))

    @_over_rows
    def norms(a, g):
        return list(measure_in_slices(one, [rule.product.scaled(a, g)], room)), [True, True]

    @_over_rows
    def clipped_sum(a, g, allowed, factor):
        if one.folds:
            pair = [a, g]
            pair[1 - rule.scaled_at] = finite_or_zero(pair[1 - rule.scaled_at])
            a, g = held(pair, factor != 0)
        return sum_within(one, [rule.product.scaled(a, g)], factor, allowed, room), False

    def weighted_sum(a, g, allowed):
        return clipped_sum(a, g, allowed, weights.factors[group])

    allowed = _each_round(product.frames, found.allowed, Name((), dtype))
    body.equations += [
        Equation("squared norms", [*rule.operands], [*found.squares], {}, norms),
        Equation("clipped sum", [*rule.operands, allowed], [found.total], {}, weighted_sum),
    ]
    return found


def _each_round(frames: tuple[Frame, ...], values: Constant, name: Name) -> Name:
    """`name`, made an input of the innermost scan's body: what each round of all scans has of the stacked `values`."""
    outer: Constant | Name = values
    for depth, frame in enumerate(frames, 1):
        inner = name if depth == len(frames) else Name(tuple(x.length for x in frames[depth:]), name.dtype)
        frame.scan.equation.inputs.append(outer)
        frame.scan.body.inputs.append(inner)
        outer = inner
    return name


def _over_rows(batch: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one row; under vmap `batch`, which is given all rows and says what of its result has rows."""

    @jax.custom_batching.custom_vmap
    def one(*values):
        out, has_rows = batch(*(x[None] for x in values))
        return jax.tree.map(lambda x, on: x[0] if on else x, out, has_rows)

    @one.def_vmap
    def rule(rows, batched, *values):
        return batch(
            *(x if on else jnp.broadcast_to(x, (rows, *x.shape)) for x, on in zip(values, batched, strict=True))
        )

    return one
