"""Layers stacked in a scan, in ghost mode: the scan's body takes each layer's norms, and later its sum, by itself.

Otherwise the operands of all layers would come out of the scan stacked, which jax.checkpoint is there to avoid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.equations import Equation, Name
from dpscale.clipping.example import sum_dtype
from dpscale.clipping.hold import held
from dpscale.clipping.layers import Layer, measure, rule_for, sum_factors


@dataclass(eq=False)
class RowWeights:
    """The clip factor f[] of each group, and whether the row counts: of the row under vmap, set while it is traced."""

    factors: list[Any]
    good: Any = None


@dataclass(frozen=True, eq=False)
class Inside:
    """Names in the scan's body: a layer's squared norms (estimate, upper bound) and its clipped sum over all rows.

    The sum has the shape of the product's own result; it has no row axis, whatever its inputs have.
    """

    squares: tuple[Name, Name]
    total: Name


def taken_inside(layer: Layer, group: int, weights: RowWeights, mask: jax.Array) -> Inside | None:
    """Adds both to the body of the layer's scan; None where a layer's gradient is more than one product there.

    `mask`: bool[B], for `held`. The operands are held, so that both passes make them alike.
    """
    if len(layer.rules) != 1 or layer.tail is not None:
        return None
    product = layer.rules[0].product
    if not product.frames or any(frame.summed for frame in product.frames):
        return None
    body = product.frames[-1].scan.body
    rule = rule_for(replace(product, frames=(), chain=()), body)
    if rule is None or not all(isinstance(x, Name) for x in rule.operands):
        return None
    result = product.equation.outputs[0]
    dtype = sum_dtype(result.dtype)
    one = replace(layer, rules=(rule,), shape=result.shape)
    operands = [Name(x.shape, x.dtype) for x in rule.operands if isinstance(x, Name)]
    found = Inside((Name((), dtype), Name((), dtype)), Name(result.shape, dtype))
    total = _sum_over_rows(one)

    def norms(a, g):
        return [x[0] for x in measure(one, [rule.product.scaled(a[None], g[None])], None)[0]]

    def clipped_sum(a, g):
        return total(a, g, weights.factors[group], weights.good)

    body.equations += [
        Equation("held", list(rule.operands), list(operands), {}, lambda *x: held(x, mask)),
        Equation("squared norms", list(operands), list(found.squares), {}, norms),
        Equation("clipped sum", list(operands), [found.total], {}, clipped_sum),
    ]
    return found


def _sum_over_rows(layer: Layer) -> Callable[..., jax.Array]:
    """(a, g, factor, good) of one row -> its contribution; under vmap, the sum of all rows' contributions."""
    product = layer.rules[0].product

    @jax.custom_batching.custom_vmap
    def contribution(a, g, factor, good):
        return sum_factors(layer, [product.scaled(a[None], g[None])], factor[None], good[None])

    @contribution.def_vmap
    def sum_of_rows(rows, batched, *values):
        a, g, factor, good = (
            x if on else jnp.broadcast_to(x, (rows, *x.shape)) for x, on in zip(values, batched, strict=True)
        )
        return sum_factors(layer, [product.scaled(a, g)], factor, good), False

    return contribution
