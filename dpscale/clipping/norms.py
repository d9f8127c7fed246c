"""Per-example squared norms of sum_t a_t (x) g_t from its factors, and how much rounding may hide in them.

A layer that is applied at T positions of one example has the gradient e = sum_t a_t g_t^T, with a_t in R^D and g_t in
R^P. Its squared norm is sum_{t,s} (a_t . a_s)(g_t . g_s): two T x T tables instead of e (Goodfellow 2015; Li et al.
2021). In floating point the tables can cancel, so each norm comes with an upper bound that clipping uses.

Let u be the unit roundoff of the sums and S = sum_t |a_t||g_t|.
* A dot product of length n in any order of summation errs by at most n u |x||y| to first order (Higham 2002, 3.1). So
  an entry of the product of the tables errs by at most (D + P + 1) u |a_t||a_s||g_t||g_s|, and their sum over t and s,
  made in a tree whose depth is at most 186, by at most 186 u S^2 more. Together: n^2 <= ghost + kappa S^2 with
  kappa = (D + P + 187) u. Contractions longer than `BLOCK` are made in blocks of it, so that D counts for
  BLOCK + D / BLOCK at most.
* The contribution c e is itself computed from the factors, in a sum over t that errs by at most delta = (T + 2) u S
  (plus one rounding of the operand that c scales, to its own precision). The clip factor is taken from n + 2 delta, so
  that the contribution is at most C even where e cancels to nothing.
* A product below the smallest normal number may be flushed to zero, so a dot product of length n hides up to n TINY. A
  tiny a may meet a huge g: so |a_t|^2 counts as D TINY more, |g_t|^2 as P TINY more, and the tables' product as
  D TINY (sum_t |g_t|)^2 + P TINY (sum_t |a_t|)^2 more. (What is flushed of a factor times g_t is beside any bound but a
  tiny one: `layers.WRITTEN_OUT_BELOW`.)
Where the example's gradient is written out and that very array is scaled and summed, none of these is needed.
"""

import functools
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.clipping.example import sum_dtype

BLOCK = 1024
WINDOW = 32
"""So many numbers are added up one after the other in each node of a `tree_sum`."""

TREE_DEPTH = 6 * (WINDOW - 1)
"""Additions in a row in a `tree_sum` of a T x T table with T up to 32^3."""
TINY = float(np.finfo(np.float32).tiny)


class Squares(NamedTuple):
    """Squared norms f[B]: `estimate`, and `upper`, which no rounding puts below what is contributed."""

    estimate: jax.Array
    upper: jax.Array


def roundoff(dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def effective_length(length: int) -> int:
    """How many roundings a contraction of this length meets in a row."""
    return length if length <= BLOCK else BLOCK + -(-length // BLOCK)


def kappa(width_a: int, width_g: int, dtype) -> float:
    """Largest relative error of a ghost norm, in units of S^2."""
    return (effective_length(width_a) + effective_length(width_g) + TREE_DEPTH + 1) * roundoff(sum_dtype(dtype))


def factor_dtype(dtype) -> Any:
    """What scaled factors of this type are rounded to: itself, if it has the numbers.

    The smallest normal numbers of float16 and of 8-bit floats are so large that scaling could leave a few bits: those
    stay float32.
    """
    return jnp.dtype(dtype) if jnp.finfo(dtype).tiny < 1e-30 else sum_dtype(dtype)


def delta(positions: int, dtype, tf32: bool) -> float:
    """Largest error of a contribution that is computed from its factors, in units of S; `dtype`: `factor_dtype`'s."""
    low = roundoff(dtype) if np.dtype(dtype).itemsize < 4 else 2.0**-10 if tf32 else 0.0
    return (positions + 2) * roundoff(sum_dtype(dtype)) + low


def sum_precision() -> jax.lax.Precision:
    """Of the products that sums are made of. DEFAULT is TF32 on a GPU; it is asked for by name, since jax's own setting
    may say less than the bound allows for."""
    whole = str(jax.config.values["jax_default_matmul_precision"]) in ("float32", "highest")
    return jax.lax.Precision.HIGHEST if whole else jax.lax.Precision.DEFAULT


def uses_tf32() -> bool:
    """Whether those products may be rounded to 10 bits on this backend."""
    return jax.default_backend() == "gpu" and sum_precision() == jax.lax.Precision.DEFAULT


def gram(x: jax.Array) -> jax.Array:
    """[..., T, D] -> [..., T, T], as `cross_gram`."""
    return cross_gram(x, x)


def cross_gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., T, D], [..., S, D] -> [..., T, S], dot products in full precision, long ones in blocks."""
    starts = range(0, x.shape[-1], BLOCK)
    pairs = [(x[..., i : i + BLOCK], y[..., i : i + BLOCK]) for i in starts] if len(starts) > 1 else [(x, y)]
    highest = jax.lax.Precision.HIGHEST
    return functools.reduce(jnp.add, [contract("...td,...sd->...ts", a, b, highest) for a, b in pairs])


def contract(spec: str, x: jax.Array, y: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """einsum of two operands with sums in at least float32; by default in `sum_precision`."""
    x, y, dtype = widened(x, y)
    return jnp.einsum(spec, x, y, precision=precision or sum_precision(), preferred_element_type=dtype)


def widened(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """The operands of a product and the type of its sums. XLA's CPU backend has no bfloat16 product with float32
    sums, so there the operands are widened, which changes no bit of the result."""
    dtype = jnp.promote_types(sum_dtype(x.dtype), sum_dtype(y.dtype))
    if jax.default_backend() == "cpu" or x.dtype != y.dtype:
        return x.astype(dtype), y.astype(dtype), dtype
    return x, y, dtype


def hidden(length: int) -> float:
    """What flushing may hide in a dot product of this length."""
    return length * TINY


def square_sum(x: jax.Array, axes: int) -> jax.Array:
    """Sum of squares over the last `axes` axes, as `tree_sum`."""
    wide = x.astype(sum_dtype(x.dtype))
    return tree_sum(wide * wide, axes)


def tree_sum(x: jax.Array, axes: int) -> jax.Array:
    """Sum over the last `axes` axes, on a CPU in a tree of windows, which take one axis at a time; elsewhere XLA's.

    On a CPU XLA of jax 0.10.0 makes trees of one long axis only, and undoes a reshape that makes several axes one:
    half a million equal squares gave 4e-4 too little.
    """
    summed = range(x.ndim - axes, x.ndim)
    while jax.default_backend() == "cpu" and prod(x.shape[i] for i in summed) > WINDOW:
        at = x.ndim - 1 if x.shape[-1] >= WINDOW else max(summed, key=lambda i: x.shape[i])
        window = [min(WINDOW, n) if i == at else 1 for i, n in enumerate(x.shape)]
        padding = [(0, -n % window[i]) if i == at else (0, 0) for i, n in enumerate(x.shape)]
        x = jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, window, window, padding)
    return jnp.sum(x, axis=tuple(summed))


def from_tables(table_a: jax.Array, table_g: jax.Array, widths: tuple[int, int], kappa: float, delta: float) -> Squares:
    """The ghost norm from two tables [..., B, T, T]; leading axes are independent parts of one gradient.

    `widths`: how long the dot products in each of them are.
    """
    ghost = jnp.maximum(tree_sum(table_a * table_g, 2), 0)
    flushed_a, flushed_g = map(hidden, widths)
    norms_a = jnp.sqrt(jnp.maximum(_diagonal(table_a), 0) + flushed_a)
    norms_g = jnp.sqrt(jnp.maximum(_diagonal(table_g), 0) + flushed_g)
    spread, sum_a, sum_g = jnp.sum(jnp.stack([norms_a * norms_g, norms_a, norms_g]), axis=-1)
    # Roots before squares: the square of a sum of huge cotangents alone would overflow.
    flushed = jnp.square(flushed_a**0.5 * sum_g) + jnp.square(flushed_g**0.5 * sum_a)
    upper = jnp.square(jnp.sqrt(ghost + kappa * jnp.square(spread) + flushed) + 2 * delta * spread)
    return Squares(over_parts(ghost), over_parts(upper))


def over_parts(x: jax.Array) -> jax.Array:
    """[..., B] -> [B], added up as `tree_sum` does."""
    return x if x.ndim == 1 else tree_sum(jnp.moveaxis(x, -1, 0), x.ndim - 1)


def _diagonal(table: jax.Array) -> jax.Array:
    """[..., T, T] -> [..., T], without a gather."""
    *lead, _, length = table.shape
    return table.reshape(*lead, length * length)[..., :: length + 1]
