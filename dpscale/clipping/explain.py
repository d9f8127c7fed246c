"""What the engine chose, layer by layer, as a table."""

from dataclasses import dataclass
from math import prod

import numpy as np

from dpscale.clipping.cut import Frame
from dpscale.clipping.equations import Operand, names_behind
from dpscale.clipping.example import Problem, sum_dtype
from dpscale.clipping.layers import Layer
from dpscale.clipping.split import Root, Split, root_of


@dataclass(frozen=True)
class LayerCost:
    """One parameter's row, for the whole batch. `macs` and `sgd_macs`: multiply-adds of the norm and the weight
    gradient, ours (in ghost mode those of both passes) and plain SGD's. `bytes`: what is held for the weight's gradient
    until the factors are known. `sgd_bytes`: what plain SGD, and each of ghost's passes, holds for it until the
    backward pass comes by: the layer's input; 0 where no product is known."""

    name: str
    shape: tuple[int, ...]
    route: str
    parts: int
    positions: int
    widths: tuple[int, int]
    macs: int
    sgd_macs: int
    bytes: int
    sgd_bytes: int


@dataclass(frozen=True)
class Explanation:
    """`method` that "auto" means here, and a row for each trainable parameter. str() gives a table."""

    method: str
    rows: int
    layers: list[LayerCost]

    def __str__(self) -> str:
        head = ["parameter", "shape", "route", "N", "T", "D x P", "MACs", "of SGD's", "held", "SGD's"]
        table = [head]
        for x in self.layers:
            share = f"{x.macs / x.sgd_macs:.2f}" if x.sgd_macs else "-"
            sizes = [str(x.parts), str(x.positions), f"{x.widths[0]} x {x.widths[1]}"] if x.parts else ["-"] * 3
            shape = "x".join(map(str, x.shape)) or "scalar"
            sgd_held = _short(x.sgd_bytes) + "B" if x.parts else "-"
            table.append([x.name, shape, x.route, *sizes, _short(x.macs), share, _short(x.bytes) + "B", sgd_held])
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        ours, sgd = sum(x.bytes for x in self.layers), sum(x.sgd_bytes for x in self.layers)
        total = f"{_short(ours)}B held until the factors are known"
        if self.method == "ghost":
            total += f"; each pass holds {_short(sgd)}B of inputs, as plain SGD does"
        elif self.method != "materialize":
            total += f"; plain SGD holds {_short(sgd)}B of inputs"
        return "\n".join([f"method: {self.method}, batch of {self.rows}, {total}", *lines])


def explanation(parts: Split, problem: Problem) -> Explanation:
    """The costs of each layer for the problem's batch. What several layers hold together counts for the first."""
    rows, producers = problem.mask.shape[0], parts.program.producers()
    costs, known, sgd_known = [], set[Root](), set[Root]()
    forward = names_behind(parts.program, parts.program.outputs[0])
    ghost = parts.method == "ghost"  # there each layer's sum is made with its norm
    for j, (layer, leaf) in enumerate(zip(parts.layers, problem.leaves, strict=True)):
        pairs = [(x, rule.product.frames) for rule in layer.rules for x in rule.operands]
        roots = {root_of(x, frames, producers): _bytes(x, frames) for x, frames in pairs}
        inputs = {root: size for root, size in roots.items() if root[0] in forward}
        sgd = _first_held(inputs, sgd_known)
        if ghost or j in parts.views:
            held = 0
        elif layer.folds:
            held = _first_held(roots, known)
        else:
            held = prod(layer.shape) * sum_dtype(leaf.dtype).itemsize
        costs.append(_cost(layer, rows, parts.method, rows * held, rows * sgd))
    return Explanation(parts.method, rows, costs)


def _first_held(roots: dict[Root, int], known: set[Root]) -> int:
    """The sizes of those that are not `known` yet, which they are then."""
    size = sum(size for root, size in roots.items() if root not in known)
    known.update(roots)
    return size


def _bytes(x: Operand, frames: tuple[Frame, ...]) -> int:
    """What one example's operand takes, of all rounds of its scans."""
    return prod(frame.length for frame in frames) * prod(x.shape) * np.dtype(x.dtype).itemsize


def _cost(layer: Layer, rows: int, method: str, held: int, sgd_held: int) -> LayerCost:
    norms = 2 if method == "ghost" else 1
    if not layer.rules:
        size = prod(layer.shape)
        macs = (norms + 1) * rows * size
        return LayerCost(layer.name, layer.shape, layer.route, 0, 0, (0, 0), macs, 0, held, sgd_held)
    macs = sgd = 0
    for rule in layer.rules:
        sizes, cost = rule.sizes, rule.macs()
        size = sizes.parts * sizes.width_a * sizes.width_g
        sgd += rows * cost["folded"]
        if layer.route == "ghost":
            macs += rows * (cost["folded"] + norms * cost["ghost"])
        elif layer.folds:
            macs += rows * (cost["folded"] + norms * sizes.parts * sizes.positions * (sizes.width_a + sizes.width_g))
        else:
            macs += rows * (norms * (cost["instantiated"] + size) + size)
    first = layer.rules[0].sizes
    widths = (first.width_a, first.width_g)
    positions = sum(rule.sizes.positions for rule in layer.rules)
    return LayerCost(layer.name, layer.shape, layer.route, first.parts, positions, widths, macs, sgd, held, sgd_held)


def _short(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"
