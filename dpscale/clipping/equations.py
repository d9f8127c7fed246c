"""Programs as plain equations: what they are made of, how they are cut to size, and how they are run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import numpy as np


@dataclass(eq=False)
class Name:
    """One value of a program, equal to itself only."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(eq=False)
class Constant:
    """A value that is known while tracing: a literal, or an array that the loss closes over."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.numpy.shape(self.value)

    @property
    def dtype(self) -> Any:
        return jax.numpy.result_type(self.value)

    @property
    def literal(self) -> np.ndarray | None:
        """The value where it can be looked at while tracing; arrays of jax, which may be tracers, give None."""
        return None if isinstance(self.value, jax.Array) else np.asarray(self.value)


Operand = Name | Constant


@dataclass(eq=False)
class Equation:
    """outputs = operation(inputs). `body` is the program of one iteration where the operation is a scan.

    `inside`: the operations of programs that it holds and that are not looked into (the branches of a cond, say).
    `effects`: whether it does more than to give its outputs (a callback, a check, a change of a reference).
    """

    operation: str
    inputs: list[Operand]
    outputs: list[Name]
    params: dict[str, Any]
    apply: Callable[..., Any]
    body: "Program | None" = None
    inside: frozenset[str] = frozenset()
    effects: bool = False

    @property
    def permutes(self) -> bool:
        """Whether it is a reshape that first puts the axes in another order."""
        return self.operation == "reshape" and self.params.get("dimensions") is not None


@dataclass(eq=False)
class Program:
    """Equations in order, only ever added to. `checkpointed`: whether jax.checkpoint was used anywhere inside."""

    inputs: list[Name]
    equations: list[Equation]
    outputs: list[Operand]
    checkpointed: bool = False
    _known: tuple[int, dict[Name, Equation]] = field(init=False, default=(0, {}), repr=False)

    def producers(self) -> dict[Name, Equation]:
        """The equation that makes each name. Every leaf's cut asks for it: it is made once."""
        if self._known[0] != len(self.equations):
            made = {name: equation for equation in self.equations for name in equation.outputs}
            self._known = len(self.equations), made
        return self._known[1]


@dataclass(frozen=True)
class Scan:
    """A scan equation's operands and results by their part in the loop."""

    equation: Equation
    body: Program
    consts: int
    carry: int

    @classmethod
    def of(cls, equation: Equation) -> "Scan":
        assert equation.body is not None
        return cls(equation, equation.body, equation.params["num_consts"], equation.params["num_carry"])

    def carry_input(self, j: int) -> Name:
        return self.body.inputs[self.consts + j]

    def xs_operand(self, name: Name) -> Operand | None:
        """The stacked array whose slice `name` is in each iteration, if it is one."""
        start = self.consts + self.carry
        inputs = self.body.inputs
        return next((self.equation.inputs[j] for j in range(start, len(inputs)) if inputs[j] is name), None)


def walk(program: Program) -> Iterator[Equation]:
    """Every equation of the program and of the bodies in it."""
    for equation in program.equations:
        yield equation
        if equation.body is not None:
            yield from walk(equation.body)


def moving_names(program: Program, moving: Iterable[Name]) -> set[Name]:
    """All names, in the program and in the bodies of its scans, that depend on the given inputs, or that may: what is
    read from a reference, say."""
    found = set(moving)
    for equation in program.equations:
        flags = [x in found for x in equation.inputs]
        if equation.body is None:
            found.update(equation.outputs if any(flags) or equation.effects else ())
            continue
        scan = Scan.of(equation)
        while True:  # until no further carry starts to move
            inside = moving_names(scan.body, [x for x, on in zip(scan.body.inputs, flags, strict=True) if on])
            out = [x in inside for x in scan.body.outputs]
            grown = [a or b for a, b in zip(flags[scan.consts : scan.consts + scan.carry], out, strict=False)]
            if grown == flags[scan.consts : scan.consts + scan.carry]:
                break
            flags[scan.consts : scan.consts + scan.carry] = grown
        found |= inside
        found.update(x for x, on in zip(equation.outputs, out, strict=True) if on)
    return found


def names_behind(program: Program, output: Operand) -> set[Name]:
    """The program's inputs, and all that is made by the equations that lead to `output`; none inside of scans."""
    behind, live = set(program.inputs), {output}
    for equation in reversed(program.equations):
        if live.intersection(equation.outputs):
            behind.update(equation.outputs)
            live.update(equation.inputs)
    return behind


def expose(program: Program, outputs: Sequence[Operand]) -> Program:
    """The program with other outputs, which may be names inside the bodies of its scans, and no equation in vain.

    A name inside a scan comes out stacked over the iterations; the outermost scan is the first axis.
    """
    inner: dict[Name, Name] = {}
    program = _export(program, {x for x in outputs if isinstance(x, Name)}, inner)
    program = replace(program, outputs=[inner.get(x, x) if isinstance(x, Name) else x for x in outputs])
    return _prune(program)


def subprogram(program: Program, inputs: Sequence[Name], outputs: Sequence[Operand]) -> Program:
    """The part of the program that leads from `inputs` to `outputs`."""
    given = set(inputs)
    equations = [x for x in program.equations if not given.intersection(x.outputs) and not x.effects]
    return _prune(replace(program, inputs=list(inputs), equations=equations, outputs=list(outputs)))


def _export(program: Program, wanted: set[Name], inner: dict[Name, Name]) -> Program:
    """Adds the wanted names of each scan's body to the scan's stacked results; `inner` maps them to those."""
    equations = []
    for equation in program.equations:
        if equation.body is not None:
            mine: dict[Name, Name] = {}
            body = _export(equation.body, wanted, mine)
            for name in wanted & _defined(equation.body):
                mine.setdefault(name, name)
            length = equation.params["length"]
            stacked = {name: Name((length, *at.shape), at.dtype) for name, at in mine.items()}
            body = replace(body, outputs=[*body.outputs, *mine.values()])
            equation = replace(equation, body=body, outputs=[*equation.outputs, *stacked.values()])
            inner.update(stacked)
        equations.append(equation)
    return replace(program, equations=equations)


def _defined(program: Program) -> set[Name]:
    return set(program.inputs).union(*(equation.outputs for equation in program.equations))


def _prune(program: Program) -> Program:
    live = {x for x in program.outputs if isinstance(x, Name)}
    kept = []
    for equation in reversed(program.equations):
        if not live.intersection(equation.outputs) and not equation.effects:
            continue
        equation = equation if equation.body is None else _prune_scan(equation, live)
        live.update(x for x in equation.inputs if isinstance(x, Name))
        kept.append(equation)
    return replace(program, equations=kept[::-1])


def _prune_scan(equation: Equation, live: set[Name]) -> Equation:
    """The scan without dead carries, stacked results and inputs."""
    scan = Scan.of(equation)
    carries = [x in live for x in equation.outputs[: scan.carry]]
    stacked = [x in live for x in equation.outputs[scan.carry :]]
    while True:  # until the live carries need no further carry
        body = _prune(replace(scan.body, outputs=_chosen(scan.body.outputs, carries + stacked)))
        read = {x for inner in body.equations for x in inner.inputs} | set(body.outputs)
        used = [x in read for x in body.inputs]
        grown = [a or b for a, b in zip(carries, used[scan.consts :], strict=False)]
        if grown == carries:
            break
        carries = grown
    keep = used[: scan.consts] + carries + used[scan.consts + scan.carry :]
    counts = {"num_consts": sum(used[: scan.consts]), "num_carry": sum(carries)}
    body = replace(body, inputs=_chosen(body.inputs, keep))
    return replace(
        equation,
        inputs=_chosen(equation.inputs, keep),
        outputs=_chosen(equation.outputs, carries + stacked),
        params=equation.params | counts,
        body=body,
    )


def _chosen(items: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [x for x, on in zip(items, flags, strict=True) if on]


RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


def moved_from(x: Operand, producers: dict[Name, Equation]) -> Operand:
    """The value whose entries x holds in another shape: x itself, or what a chain of reshapes begins with."""
    while isinstance(x, Name) and (equation := producers.get(x)) is not None:
        source = equation.inputs[0] if equation.operation in RESHAPES else None
        if source is None or prod(source.shape) != prod(x.shape) or equation.permutes:
            break
        x = source
    return x


UNROUNDED = ("max", "min")
"""Operations whose results do not depend on whether the compiler knows their constants."""


def with_zero(program: Program, zero: jax.Array) -> Program:
    """The program with `zero`, f32[], in place of the literal zeros of UNROUNDED operations."""

    def replaced(x: Operand) -> Operand:
        known = x.literal if isinstance(x, Constant) and x.shape == () else None
        if known is None or known or not jax.numpy.issubdtype(known.dtype, np.floating) or np.signbit(known):
            return x
        return Constant(zero.astype(known.dtype))

    def own(equation: Equation) -> Equation:
        if equation.operation not in UNROUNDED:
            return equation
        return replace(equation, inputs=[replaced(x) for x in equation.inputs])

    return replace(program, equations=[own(x) for x in program.equations])


def run(program: Program, *args: Any, through: Callable[[Name, Any], Any] | None = None) -> list[Any]:
    """The program's outputs for these inputs. Each value passes `through` a function before anything uses it; those
    inside the bodies of scans do not."""
    env: dict[Name, Any] = dict(zip(program.inputs, args, strict=True))

    def value(x: Operand) -> Any:
        return x.value if isinstance(x, Constant) else env[x]

    for equation in program.equations:
        apply = equation.apply if equation.body is None else _loop(equation)
        results = apply(*map(value, equation.inputs))
        results = results if isinstance(results, (tuple, list)) else [results]
        for name, result in zip(equation.outputs, results, strict=True):
            env[name] = result if through is None else through(name, result)
    return [value(x) for x in program.outputs]


def _loop(equation: Equation) -> Callable[..., list[Any]]:
    scan = Scan.of(equation)

    def apply(*values):
        consts, init = values[: scan.consts], values[scan.consts : scan.consts + scan.carry]

        def step(carry, xs):
            out = run(scan.body, *consts, *carry, *xs)
            like = [x.dtype for x in equation.outputs]  # literals have no type of their own
            out = [y if isinstance(y, jax.Array) else jax.numpy.asarray(y, t) for y, t in zip(out, like, strict=True)]
            return tuple(out[: scan.carry]), tuple(out[scan.carry :])

        options = {key: equation.params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(step, tuple(init), tuple(values[scan.consts + scan.carry :]), **options)
        return [*carry, *ys]

    return apply
