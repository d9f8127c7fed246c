"""Laws of the clipped sum, on each device by itself: padding, rows that are not finite, the clip, the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpscale.clipping import ROUNDING_SLACK, Normalized
from dpscale.gradients import clipping_bound
from dpscale.mesh import place_replicated
from dpscale.state import Statistics
from dpscale.verify.bench import Bench
from dpscale.verify.laws import Laws
from dpscale.verify.made_up import BLANK, GARBAGE, LARGE, TYPICAL

# (kind of row, factor of the parameters), tried until a row's gradient is longer than the clip norm.
CANDIDATES = ((LARGE, 1.0), (TYPICAL, 1.0), (TYPICAL, 4.0), (LARGE, 0.01), (TYPICAL, 16.0), (TYPICAL, 64.0))
LONGER = 1.5
NORM = Statistics._fields.index("norm")
Gradient = Callable[[Any, dict[str, np.ndarray], int], np.ndarray]


def check_sums(bench: Bench, laws: Laws, gradient: Gradient | None) -> float:
    """Check all of them; the largest norm that one row added, in clip norms.

    gradient: from `reference_gradient`; None leaves out what needs it (and its compilation).
    """
    typical = _check_padding_and_garbage(bench, laws)
    if gradient is not None:
        expected = clipped(bench, gradient(bench.task.params, bench.made_up.example(TYPICAL), TYPICAL))
        _compare(bench, laws, "a device's sum is the planted gradient, clipped", typical, expected)
    return _check_clip(bench, laws, typical, gradient)


def clipped(bench: Bench, gradient: np.ndarray) -> np.ndarray:
    """The gradient cut or scaled as the plan says, in float64."""
    plan, norm = bench.plan, float(np.linalg.norm(gradient))
    assert plan.clip_norm is not None
    if plan.clip_groups is not None:
        return _clipped_by_group(bench, gradient, [norm for _, norm in plan.clip_groups])
    if plan.bound == "normalized":
        return gradient * (plan.clip_norm / (norm + Normalized(plan.clip_norm).gamma))
    return gradient * min(1.0, plan.clip_norm / norm) if norm > 0 else gradient


def _clipped_by_group(bench: Bench, gradient: np.ndarray, norms: list[float]) -> np.ndarray:
    of_leaf = clipping_bound(bench.plan).groups(bench.task.params)
    of_element = np.repeat(of_leaf, bench.leaf_sizes())
    factors = [
        min(1.0, norm / max(float(np.linalg.norm(gradient[of_element == group])), 1e-300))
        for group, norm in enumerate(norms)
    ]
    return gradient * np.asarray(factors)[of_element]


def tolerance(bench: Bench) -> float:
    """Relative, between two programs for one gradient: rounding of the model's own arithmetic, generously."""
    if bench.config.performance.compute_dtype != "float32":
        return 0.1
    return 1e-3 if jax.default_backend() == "cpu" else 0.02


def _check_padding_and_garbage(bench: Bench, laws: Laws) -> np.ndarray:
    """The typical row's sum on the first device of this process."""
    _, nothing, counts = bench.sums_of([], GARBAGE)
    norm = max(float(np.abs(x).max()) for x in nothing + counts)
    laws.check("padding adds nothing", norm == 0, f"a sum or count of {norm:.3g}", "exactly 0")
    _, typical, counts = bench.sums_of([TYPICAL], BLANK)
    rows = [float(x[0]) for x in counts]
    laws.check("every row is counted once", rows == [1.0] * len(rows), f"{rows} rows", "1 on each device")
    _, padded, _ = bench.sums_of([TYPICAL], GARBAGE)
    _same(bench, laws, "what padding holds changes no bit", padded, typical)
    law = "a row that is not finite adds nothing and changes no bit"
    if bench.made_up.holds_nan:
        _, mixed, counts = bench.sums_of([TYPICAL, GARBAGE], BLANK)
        _same(bench, laws, law, mixed, typical)
        lost = [float(x[2]) for x in counts]
        laws.check(law, lost == [1.0] * len(lost), f"{lost} rows left out", "1 on each device")
    else:  # integers are always finite: the parameters are not
        broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), bench.task.params)
        _, alone, _ = bench.sums_of([TYPICAL], BLANK, place_replicated(bench.mesh, broken))
        norm = max(float(np.abs(x).max()) if np.isfinite(x).all() else np.inf for x in alone)
        laws.check(law, norm == 0, f"a sum up to {norm:.3g}", "exactly 0")
    for device in range(1, len(typical)):
        _same(bench, laws, "every device makes the same sum of the same rows", [typical[device]], typical[:1])
    return typical[0]


def _check_clip(bench: Bench, laws: Laws, typical: np.ndarray, gradient: Gradient | None) -> float:
    """The largest norm of one row's contribution, in clip norms."""
    assert bench.plan.clip_norm is not None
    clip_norm, largest = bench.plan.clip_norm, 0.0
    for kind, scale in CANDIDATES:
        params = jax.tree.map(lambda leaf, by=scale: np.asarray(leaf) * np.asarray(by, leaf.dtype), bench.task.params)
        _, sums, counts = bench.sums_of([kind], BLANK, place_replicated(bench.mesh, params))
        largest = max([largest, *(float(np.linalg.norm(x.astype(np.float64))) for x in sums)])
        own_norm = float(counts[0][NORM])  # before the clip, as the clipping itself measured it
        if own_norm > LONGER * clip_norm:
            break
    laws.check(
        "one row moves the sum by at most the clip norm",
        largest <= clip_norm * (1 + ROUNDING_SLACK),
        f"a norm of {largest:.7g}",
        f"at most {clip_norm:.7g} (1 + 2^-16)",
    )
    if gradient is not None:
        expected = clipped(bench, gradient(params, bench.made_up.example(kind), kind))
        _compare(bench, laws, "a row above the clip norm is cut to it", sums[0], expected)
    _, alone, _ = bench.sums_of([LARGE], BLANK)
    _, both, _ = bench.sums_of([TYPICAL, LARGE], BLANK)
    _compare(bench, laws, "a row adds the same in any company", both[0], typical.astype(np.float64) + alone[0])
    return largest / clip_norm


def _same(bench: Bench, laws: Laws, law: str, seen: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Equal bits; on devices whose kernels may add up in any order, equal but for rounding."""
    exact = jax.default_backend() == "cpu" or bench.config.performance.deterministic
    for x, y in zip(seen, expected, strict=True):
        difference = float(np.linalg.norm(x.astype(np.float64) - y))
        allowed = 0.0 if exact else 1e-5 * float(np.linalg.norm(y))
        laws.check(law, difference <= allowed, f"a difference of norm {difference:.3g}", f"at most {allowed:.3g}")


def _compare(bench: Bench, laws: Laws, law: str, seen: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the rounding of the model's arithmetic."""
    difference, norm = float(np.linalg.norm(seen - expected)), float(np.linalg.norm(expected))
    laws.check(
        law,
        difference <= tolerance(bench) * norm,
        f"norm {np.linalg.norm(seen):.6g}, {difference:.3g} away",
        f"norm {norm:.6g}, at most {tolerance(bench) * norm:.3g} away",
    )
