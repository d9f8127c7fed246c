"""Where one example's backward pass is cut, which route each leaf takes, and what must be made only once.

Sources: Goodfellow 2015 (arXiv 1510.01799), Li et al. 2021 (arXiv 2110.05679, ghost clipping), Bu et al. 2022
(arXiv 2210.00038, book-keeping and the mixed choice).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dpscale.clipping.convolution import batched_convolution
from dpscale.clipping.cut import Frame, cut
from dpscale.clipping.equations import (
    Constant,
    Equation,
    Name,
    Operand,
    Program,
    moved_from,
    moving_names,
    walk,
)
from dpscale.clipping.example import Problem
from dpscale.clipping.inside import Inside, RowWeights, taken_inside
from dpscale.clipping.jaxpr import trace
from dpscale.clipping.layers import Layer, choose_routes, layer_for, operand_floats
from dpscale.errors import InputError

CONVOLUTION = "conv_general_dilated"

Root = tuple[Operand, int]
"""A value that is kept, and how many scan axes it has in front of its batch axis."""


@dataclass(frozen=True, eq=False)
class Split:
    """The traced program of one example, cut; a layer for each trainable leaf; the method that will be used.

    `inside[j]` is what the body of layer j's scan computes by itself; `weights` is what its sum reads. `held` are the
    operands that must be held, since sums are made of them; `views` the leaves whose gradients are operands of others,
    reshaped (the bias of a layer that is applied at one position). `mixes`: whether a row's NaN may reach other rows.
    """

    program: Program
    method: str
    layers: list[Layer]
    num_aux: int
    aux_tree: Any
    inside: dict[int, Inside]
    weights: RowWeights
    held: frozenset[Root]
    views: frozenset[int]
    mixes: bool


def split_backward(problem: Problem, method: str) -> Split:
    """Traces the loss for one row, finds the cuts and chooses the routes.

    "auto" is book-keeping, unless jax.checkpoint asks for the memory that it would take: then it is ghost.
    Raises InputError where rows would depend on each other (`check_draws`).
    """

    def fun(leaves, row):
        (loss, aux), grads = jax.value_and_grad(problem.loss, has_aux=True)(leaves, row)
        return loss, aux, grads

    program, (_, aux, _) = _traced(problem, fun)
    count = len(problem.leaves)
    moving = moving_names(program, program.inputs[count:])
    check_draws(program, moving)
    for equation in walk(program):
        if equation.operation == CONVOLUTION and all(x in moving for x in equation.inputs):
            equation.apply = batched_convolution(equation.apply)
    method = method if method != "auto" else "ghost" if program.checkpointed else "bookkeeping"
    layers = []
    for name, leaf, gradient in zip(problem.names, problem.leaves, program.outputs[-count:], strict=True):
        found = None if method == "materialize" else cut(program, gradient, moving, program.inputs[:count])
        layers.append(layer_for(name, leaf.shape, found, program, tuple(problem.leaves), method == "ghost"))
    layers = choose_routes(layers, method == "ghost", problem.bound.max_norm)
    weights, floats = RowWeights([]), sum(map(operand_floats, layers))
    found = [taken_inside(x, problem.groups[j], weights, floats) for j, x in enumerate(layers) if method == "ghost"]
    inside = {j: x for j, x in enumerate(found) if x is not None}
    producers, gradients = program.producers(), program.outputs[-count:]
    operands = [(x, rule) for layer in layers if layer.folds for rule in layer.rules for x in rule.operands]
    held = frozenset(root_of(x, rule.product.frames, producers) for x, rule in operands)
    views = [j for j, x in enumerate(gradients) if not layers[j].rules and root_of(x, (), producers) in held]
    num_aux, aux_tree = len(jax.tree.leaves(aux)), jax.tree.structure(aux)
    mixes = any(CONVOLUTION in equation.inside for equation in walk(program))
    return Split(program, method, layers, num_aux, aux_tree, inside, weights, held, frozenset(views), mixes)


def _traced(problem: Problem, fun: Callable[..., Any]) -> tuple[Program, Any]:
    """The program of fun(leaves, row), and the shapes of its results, for the types of one row inside of shard_map."""
    traced: list[Any] = []

    def example(row):
        traced.extend(trace(fun, problem.leaves, row))
        return jnp.zeros(())

    jax.vmap(example)(problem.rows)
    program, results = traced
    return program, results


def check_loss(problem: Problem) -> None:
    """Raises InputError where rows would depend on each other (`check_draws`)."""
    program, _ = _traced(problem, problem.loss)
    check_draws(program, moving_names(program, program.inputs[len(problem.leaves) :]))


def check_draws(program: Program, moving: set[Name]) -> None:
    """Raises InputError where the loss draws from a key of its example by a generator that mixes rows under vmap."""
    for equation in walk(program):
        drawn = "rng_bit_generator" in (equation.operation, *equation.inside)
        if drawn and any(isinstance(x, Name) and x in moving for x in equation.inputs):
            raise InputError(
                "the loss draws from a key that follows the example by an rbg generator: under vmap this draws for all "
                "rows from the first row's key, so that rows depend on each other: make keys with "
                'jax.random.key(seed, impl="threefry2x32")'
            )


def root_of(x: Operand, frames: tuple[Frame, ...], producers: dict[Name, Equation]) -> Root:
    """What is kept for an operand or a gradient: where it is not in a scan, the value that it is a reshape of."""
    root = _outermost(x, frames)
    if not frames:
        return moved_from(root, producers), 0
    return root, 0 if isinstance(root, Constant) else len(frames)


def _outermost(x: Operand, frames: tuple[Frame, ...]) -> Operand:
    """What a scan's body reads from a stacked input is, stacked, that input itself."""
    while frames and not isinstance(x, Constant):
        stacked = frames[-1].scan.xs_operand(x)
        if stacked is None or isinstance(stacked, Constant):
            break
        x, frames = stacked, frames[:-1]
    return x
