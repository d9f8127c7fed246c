"""Losses as plain programs. The one file that touches jax's own program representation.

A loss is traced once, for one example. What comes out is inlined (jit, custom derivatives, checkpoint), so that the
rest of the package sees a flat list of equations in which only a scan has a body of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from dpscale.clipping.equations import Constant, Equation, Name, Operand, Program

CHECKED_VERSIONS = ("0.10.0", "0.10.2")
"""Versions of jax whose programs this file was checked with, by all of tests/test_clipping_*.py; the newest last."""

INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
CHECKPOINTS = ("checkpoint", "remat2")


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of fun(*args), whose outputs are the flattened results; and the results' shapes, as a pytree.

    Arguments may be tracers.
    """
    closed, results = jax.make_jaxpr(fun, return_shape=True)(*args)
    return _convert(closed.jaxpr, closed.consts), results


def _convert(jaxpr: Any, consts: Sequence[Any]) -> Program:
    names: dict[Any, Operand] = {var: Constant(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}
    inputs = [_new_name(var) for var in jaxpr.invars]
    names.update(zip(jaxpr.invars, inputs, strict=True))
    program = Program(inputs, [], [])
    _append(program, jaxpr, names)
    program.outputs = [_read(names, var) for var in jaxpr.outvars]
    return program


def _new_name(var: Any) -> Name:
    return Name(tuple(var.aval.shape), var.aval.dtype)


def _read(names: dict[Any, Operand], var: Any) -> Operand:
    return Constant(var.val) if isinstance(var, Literal) else names[var]


def _append(program: Program, jaxpr: Any, names: dict[Any, Operand]) -> None:
    for eqn in jaxpr.eqns:
        inputs = [_read(names, var) for var in eqn.invars]
        kind = eqn.primitive.name
        if kind in INLINED and INLINED[kind] in eqn.params:
            names.update(zip(eqn.outvars, _inline(program, eqn, inputs), strict=True))
            continue
        outputs = [_new_name(var) for var in eqn.outvars]
        names.update(zip(eqn.outvars, outputs, strict=True))
        body = _convert(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts) if kind == "scan" else None
        program.checkpointed |= body is not None and body.checkpointed
        inside = frozenset() if body is not None else frozenset(_operations(eqn))
        program.equations.append(
            Equation(kind, inputs, outputs, eqn.params, _binder(eqn), body, inside, bool(eqn.effects))
        )


def _operations(eqn: Any) -> Iterator[str]:
    """The operations of the programs that an equation holds; and "rng_bit_generator" where it takes a key that is made
    for it, since a draw from such a key becomes one when it is lowered."""
    if any("rbg" in str(getattr(var.aval, "dtype", "")) for var in eqn.invars):
        yield "rng_bit_generator"
    for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else [value]:
            inner = getattr(inner, "jaxpr", inner)
            for each in getattr(inner, "eqns", ()):
                yield each.primitive.name
                yield from _operations(each)


def _inline(program: Program, eqn: Any, inputs: list[Operand]) -> list[Operand]:
    """Appends the equations of a called program and gives its results.

    A differentiated checkpoint recomputes its forward pass: a barrier on what it reads keeps the compiler from merging
    that with the first forward pass, as jax's own lowering does.
    """
    inner = eqn.params[INLINED[eqn.primitive.name]]
    jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
    if eqn.primitive.name in CHECKPOINTS:
        program.checkpointed = True
        if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
            fenced = [_new_name(var) for var in jaxpr.invars]
            barrier = Equation("optimization_barrier", inputs, fenced, {}, lambda *x: jax.lax.optimization_barrier(x))
            program.equations.append(barrier)
            inputs = list(fenced)
    names: dict[Any, Operand] = {var: Constant(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}
    names.update(zip(jaxpr.invars, inputs, strict=True))
    _append(program, jaxpr, names)
    return [_read(names, var) for var in jaxpr.outvars]


def _binder(eqn: Any) -> Callable[..., Any]:
    """Applies an equation under the settings that it was traced under, as how keys draw."""
    apply = _without_unit_axes(eqn)

    def under_its_settings(*values):
        with eqn.ctx.manager:
            return apply(*values)

    return under_its_settings


def _without_unit_axes(eqn: Any) -> Callable[..., Any]:
    """Applies an equation, sums and products without their axes of length 1.

    Losses of one example are full of those (a model for batches, applied to a batch of one). XLA's CPU backend takes up
    to ten times as long for the sum of a product over [B, 1, T, D] as over [B, T, D], and copies what it need not for
    products of such arrays.
    """

    def apply(*values):
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return list(out) if eqn.primitive.multiple_results else out  # shard_map's are no list

    unit = any(1 in var.aval.shape for var in eqn.invars)
    if unit and eqn.primitive.name == "reduce_sum":
        return _sum_without_unit_axes(tuple(eqn.invars[0].aval.shape), tuple(eqn.params["axes"]))
    return _product_without_unit_axes(eqn) if unit and eqn.primitive.name == "dot_general" else apply


def _sum_without_unit_axes(shape: tuple[int, ...], axes: tuple[int, ...]) -> Callable[[Any], Any]:
    left = [i for i, n in enumerate(shape) if n != 1]
    inner = tuple(place for place, i in enumerate(left) if i in axes)
    result = [n for i, n in enumerate(shape) if i not in axes]

    def apply(x):
        squeezed = jax.lax.reshape(x, [shape[i] for i in left])
        return jax.lax.reshape(jax.lax.reduce_sum(squeezed, inner), result)

    return apply


def _product_without_unit_axes(eqn: Any) -> Callable[[Any, Any], Any]:
    shapes = [var.aval.shape for var in eqn.invars]
    left = [[i for i, n in enumerate(shape) if n != 1] for shape in shapes]
    dimensions = tuple(
        tuple(tuple(keep.index(i) for i in axes if i in keep) for axes, keep in zip(pair, left, strict=True))
        for pair in eqn.params["dimension_numbers"]
    )

    def apply(*values):
        squeezed = [
            jax.lax.reshape(x, [shape[i] for i in keep]) for x, shape, keep in zip(values, shapes, left, strict=True)
        ]
        product = eqn.primitive.bind(*squeezed, **eqn.params | {"dimension_numbers": dimensions})
        return jax.lax.reshape(product, eqn.outvars[0].aval.shape)

    return apply
