"""Finding the cut: from a parameter's gradient back to the bilinear operations that it comes from.

In the traced backward pass of one example a weight's gradient is, but for changes of shape, the result of a product of
a layer's input and its output's cotangent. `cut` walks back over those changes of shape, over sums (a weight used
twice) and into scans (a stack of layers: the gradients are stacked; a recurrent cell: they are added up).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np

from dpscale.clipping.equations import Constant, Equation, Name, Operand, Program, Scan, subprogram
from dpscale.clipping.example import sum_dtype

BILINEAR = ("dot_general", "conv_general_dilated", "scatter-add")
SHAPE_ONLY = ("transpose", "reshape", "squeeze", "expand_dims", "copy", "pvary")
SUMS = ("add_any", "add")


@dataclass(frozen=True, eq=False)
class Frame:
    """A scan around a product: its results are stacked (one weight an iteration) or summed (one weight for all)."""

    scan: Scan
    summed: bool

    @property
    def length(self) -> int:
        return self.scan.equation.params["length"]


@dataclass(frozen=True, eq=False)
class Product:
    """One bilinear equation, the scans around it (outermost first), and the changes of shape that follow it.

    `chain` holds pairs (equation, number of stacked axes in front of what it works on). `scale` is the product of the
    constants by which the gradient multiplies the equation's result; it goes into the second operand (`scaled`), so
    that norm and sum both hold it.
    """

    equation: Equation
    frames: tuple[Frame, ...]
    chain: tuple[tuple[Equation, int], ...] = ()
    scale: float = 1.0

    @property
    def stacked(self) -> tuple[int, ...]:
        return tuple(frame.length for frame in self.frames if not frame.summed)

    def scaled(self, a: Any, g: Any) -> tuple[Any, Any]:
        """The operands, with `scale` in the second; in at least float32, so that this rounds like one more product."""
        return (a, g) if self.scale == 1.0 else (a, g.astype(sum_dtype(g.dtype)) * self.scale)

    def finish(self, x: Any, lead: int = 0) -> Any:
        """The gradient from the equation's result, which has `lead` batch axes and then the stacked axes in front."""
        for equation, depth in self.chain:
            apply = _unary(equation)
            for _ in range(depth + lead):
                apply = jax.vmap(apply)
            x = apply(x)
        return x


@dataclass(frozen=True, eq=False)
class Cut:
    """A leaf's gradient as a linear, example-independent function of products.

    `tail` is None where the gradient is the plain sum of the finished products; otherwise it is a program from (the
    leaves, the finished product of each term) to the gradient, and the products need not have the gradient's norm.
    """

    products: tuple[Product, ...]
    tail: Program | None = None


def cut(program: Program, gradient: Operand, moving: set[Name], leaves: Sequence[Name]) -> Cut | None:
    """The cut of one gradient, or None where it does not come from products alone."""
    if not isinstance(gradient, Name) or gradient not in moving:
        return None
    walk = _Walk(moving)
    products = walk.back(program, gradient, (), None)
    if products:
        return Cut(tuple(products))
    return _linear_cut(program, gradient, moving, leaves)


MAX_STEPS = 256
"""A walk that takes more steps is given up: a weight used hundreds of times in an unrolled loop."""


@dataclass
class _Walk:
    moving: set[Name]
    steps: int = 0

    def back(
        self, program: Program, at: Operand, frames: tuple[Frame, ...], carry: Name | None
    ) -> list[Product] | None:
        """The products whose sum `at` is, or None. `carry` counts as nothing: the part summed by earlier rounds."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            return None
        if at is carry:
            return []
        producers = program.producers()
        if is_zeros(at, producers):
            return []
        equation = producers.get(at) if isinstance(at, Name) else None
        if equation is None:
            return None
        if equation.operation in SUMS:
            parts = [self.back(program, x, frames, carry) for x in equation.inputs]
            return None if any(part is None for part in parts) else [x for part in parts for x in part or ()]
        if equation.operation in SHAPE_ONLY or is_cast(equation) or constant_factor(equation) is not None:
            return self._through(program, equation, frames)
        if equation.operation in BILINEAR:
            return [Product(equation, frames)] if _has_rule(equation, frames) else None
        if equation.body is not None:
            return self._into(program, equation, at, frames)
        return None

    def _through(self, program, equation, frames) -> list[Product] | None:
        factor = constant_factor(equation)
        source = next(x for x in equation.inputs if isinstance(x, Name))
        products = self.back(program, source, frames, None)  # a carry that is changed is not summed
        if products is None:
            return None
        if is_cast(equation):  # the sum stays in float32
            return products
        if factor is not None:
            return [replace(x, scale=x.scale * factor) for x in products]
        depth = sum(not frame.summed for frame in frames)
        return [replace(x, chain=(*x.chain, (equation, depth))) for x in products]

    def _into(self, program, equation, at, frames) -> list[Product] | None:
        scan = Scan.of(equation)
        j = next(j for j, x in enumerate(equation.outputs) if x is at)
        summed = j < scan.carry
        inner = (*frames, Frame(scan, summed))
        products = self.back(scan.body, scan.body.outputs[j], inner, scan.carry_input(j) if summed else None)
        if products is None or not summed:
            return products
        if not _sums_into(scan, j):
            return None
        before = self.back(program, equation.inputs[scan.consts + j], frames, None)
        return None if before is None else before + products


def _has_rule(equation: Equation, frames: tuple[Frame, ...] = ()) -> bool:
    """Whether a bilinear equation makes at least one product, of floats that `is_cast` may widen, and a row that does
    not count can be 0 in it."""
    arrays = [*equation.inputs, *equation.outputs]
    whole = all(prod(x.shape) for x in arrays) and all(frame.length for frame in frames)
    return whole and _is_wide(equation.outputs[0].dtype) and all(_has_zero(x.dtype) for x in equation.inputs)


def _is_wide(dtype: Any) -> bool:
    """Whether it is of floats of at least 16 bits."""
    return jax.numpy.issubdtype(dtype, np.floating) and np.dtype(dtype).itemsize >= 2


def _has_zero(dtype: Any) -> bool:
    """False for float8_e8m0fnu, which has powers of two only."""
    return bool(np.zeros((), dtype) == 0)


def _sums_into(scan: Scan, j: int) -> bool:
    """Whether the new carry is the old one plus something, the old one taken exactly once."""
    producers = scan.body.producers()

    def count(at: Operand) -> int:
        if at is scan.carry_input(j):
            return 1
        equation = producers.get(at) if isinstance(at, Name) else None
        return sum(map(count, equation.inputs)) if equation is not None and equation.operation in SUMS else 0

    return count(scan.body.outputs[j]) == 1


def is_cast(equation: Equation) -> bool:
    """Whether it changes the type of floats of at least 16 bits. What is lost in smaller floats, and in integers, is no
    rounding that one may leave out."""
    if equation.operation != "convert_element_type":
        return False
    return _is_wide(equation.inputs[0].dtype) and _is_wide(equation.outputs[0].dtype)


def is_zero(x: Operand) -> bool:
    """Whether a constant is known to be zero while tracing."""
    return isinstance(x, Constant) and x.literal is not None and not np.any(x.literal)


def is_zeros(x: Operand, producers: dict[Name, Equation]) -> bool:
    """Whether x is zero, or an array made of it."""
    equation = producers.get(x) if isinstance(x, Name) else None
    return is_zero(x) if equation is None else equation.operation == "broadcast_in_dim" and is_zero(equation.inputs[0])


def constant_factor(equation: Equation) -> float | None:
    """c where the equation multiplies or divides one value by a real scalar that is known while tracing."""
    if equation.operation == "neg":
        return -1.0
    if equation.operation not in ("mul", "div"):
        return None
    for value, other in ((0, 1), (1, 0)):
        x, c = equation.inputs[value], equation.inputs[other]
        known = c.literal if isinstance(c, Constant) else None
        if isinstance(x, Constant) or known is None or known.ndim or np.iscomplexobj(known):
            continue
        if equation.operation == "div" and value == 1:
            continue
        factor = float(known)
        return factor if equation.operation == "mul" else 1 / factor if factor else None
    return None


def _unary(equation: Equation):
    return lambda x: _first(equation.apply(*(y.value if isinstance(y, Constant) else x for y in equation.inputs)))


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result


LINEAR = (*SHAPE_ONLY, *SUMS, "neg", "sub", "mul", "div", "reduce_sum", "broadcast_in_dim", "select_n")


def _linear_cut(program: Program, gradient: Name, moving: set[Name], leaves: Sequence[Name]) -> Cut | None:
    """A cut through linear operations that do not depend on the example, as behind a standardised weight.

    Only products of the gradient's own size are taken: behind a bias, say, there are larger ones, and the bias's
    gradient is best written out.
    """
    if len(gradient.shape) < 2 or np.dtype(gradient.dtype).itemsize < 4:
        return None
    producers, found, todo, seen = program.producers(), [], [gradient], {gradient}
    while todo:
        equation = producers.get(todo.pop())
        if equation is None or len(seen) > MAX_STEPS:
            return None
        if np.dtype(equation.outputs[0].dtype).itemsize < 4:  # `tail` would round whole sums
            return None
        sources = [x for x in equation.inputs if isinstance(x, Name) and x in moving]
        same_size = prod(equation.outputs[0].shape) == prod(gradient.shape)
        if equation.operation in BILINEAR[:2] and len(sources) == 2 and same_size and _has_rule(equation):
            found.append(equation)
        elif not (is_cast(equation) or equation.operation in LINEAR) or not _linear_in(equation, sources, producers):
            return None
        else:
            todo += [x for x in sources if x not in seen]
            seen.update(sources)
    terms = [equation.outputs[0] for equation in found]
    tail = subprogram(program, [*leaves, *terms], [gradient])
    return Cut(tuple(Product(equation, ()) for equation in found), tail)


def _linear_in(equation: Equation, moving: list[Name], producers: dict[Name, Equation]) -> bool:
    """Whether an equation of LINEAR is linear (and not affine) in its moving inputs."""
    if equation.operation == "mul":
        return len(moving) == 1
    if equation.operation == "div":
        return len(moving) == 1 and moving[0] is equation.inputs[0]
    if equation.operation == "select_n":
        cases = [x for x in equation.inputs[1:] if x not in moving]
        return equation.inputs[0] not in moving and all(is_zeros(x, producers) for x in cases)
    return len(moving) == len(equation.inputs)
