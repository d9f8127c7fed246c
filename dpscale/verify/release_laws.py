"""Laws of what a step releases: one reduction, one draw of noise, the public divisor, the run's own update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpscale.placement import cut, vector_size
from dpscale.verify.bench import Bench, jit_quickly
from dpscale.verify.laws import Laws
from dpscale.verify.made_up import BLANK, GARBAGE, TYPICAL
from dpscale.verify.noise_laws import NoiseSample, check_noise

EPS = 2.0**-24
AT_LEAST_STEPS = 2
ACCUMULATIONS = 3


def check_release(bench: Bench, laws: Laws, draws: int, most_steps: int) -> NoiseSample:
    """Check all of them, on at least `draws` draws of noise unless that takes more than `most_steps` steps."""
    everywhere, _ = bench.finalize_everywhere(bench.functions.zero_sums(), 0)
    noise = everywhere[0]
    alike = sum(np.array_equal(x.view(np.uint32), noise.view(np.uint32)) for x in everywhere)
    law = "every device gets the same noise"
    laws.check(law, alike == len(everywhere), f"{len(everywhere) - alike} devices with another", "none")
    laws.same_everywhere("every process gets the same noise", noise.tobytes())
    _check_one_draw(bench, laws, noise)
    _check_planted(bench, laws, noise)
    steps = min(max(most_steps, AT_LEAST_STEPS), max(AT_LEAST_STEPS, -(-draws // bench.count)))
    later = [bench.finalize(bench.functions.zero_sums(), step)[0] for step in range(1, steps)]
    devices = bench.mesh.size
    size = vector_size(bench.task.params, devices, bench.placement.group_sums)
    shard = size // devices if bench.placement.sharded else bench.count
    sample = NoiseSample(
        np.stack([noise, *later]), bench.plan.noise_stddev, bench.leaf_names(), bench.leaf_sizes(), shard
    )
    check_noise(sample, laws)
    bench.release()
    _check_update(bench, laws, noise)
    return sample


def _check_one_draw(bench: Bench, laws: Laws, noise: np.ndarray) -> None:
    sums = bench.functions.zero_sums()
    for _ in range(ACCUMULATIONS):
        sums = bench.sums_of([], GARBAGE, after=sums)[0]
    again, statistics = bench.finalize(sums, 0)
    changed = int(np.sum(again != noise))
    law = "one draw of noise a step, whatever was accumulated"
    laws.check(
        law, changed == 0, f"{changed} of {len(noise)} elements changed by {ACCUMULATIONS} empty batches", "none"
    )
    laws.check(
        "an empty batch is a step", statistics.examples == 0 and bool(np.isfinite(again).all()), "NaN or rows", "noise"
    )


def _check_planted(bench: Bench, laws: Laws, noise: np.ndarray) -> None:
    """What all devices' sums become: reduced once, noised once, divided by the public batch size alone."""
    sums, own, _ = bench.sums_of([TYPICAL], BLANK)
    released, statistics = bench.finalize(sums, 0)
    expected = own[0].astype(np.float64) * bench.mesh.size
    seen = released.astype(np.float64) - noise
    difference, norm = float(np.linalg.norm(seen - expected)), float(np.linalg.norm(expected))
    allowed = 1e-4 * norm + 4 * EPS * (float(np.linalg.norm(noise)) + norm)
    laws.check(
        "the release less the known noise is the sum of all devices over the public batch size",
        difference <= allowed,
        f"norm {np.linalg.norm(seen):.6g}, {difference:.3g} away",
        f"norm {norm:.6g}, at most {allowed:.3g} away",
    )
    rows = statistics.examples
    laws.check("the devices' counts add up", rows == bench.mesh.size, f"{rows:g} rows", f"{bench.mesh.size}")


def _check_update(bench: Bench, laws: Laws, noise: np.ndarray) -> None:
    """The run's own compiled program makes of an empty batch what its optimizer makes of this noise."""
    optimizer, params = bench.placement.optimizer, bench.task.params

    def update(params: Any, gradient: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(cut(gradient, params), optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    expected, state = jit_quickly(update)(params, jnp.asarray(noise / np.float32(bench.plan.expected_batch_size)))
    made = bench.run_finalize(0)
    worst = _distance(made.params, expected, params)
    if not bench.placement.sharded:
        worst = max(worst, _distance(made.opt_state, state, None))
    law = "the run's own compiled update is the optimizer's of this release"
    laws.check(law, worst <= 1, f"a leaf {worst:.3g} times as far away as rounding explains", "at most 1")


def _distance(seen: Any, expected: Any, before: Any) -> float:
    """The largest difference of a leaf, in what two roundings of its change (or of itself) allow."""
    starts = jax.tree.leaves(before) if before is not None else [None] * len(jax.tree.leaves(expected))
    worst = 0.0
    for x, y, start in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), starts, strict=True):
        x, y = np.asarray(x.addressable_data(0), np.float64), np.asarray(y, np.float64)
        base = np.zeros_like(y) if start is None else np.asarray(start, np.float64)
        allowed = 1e-3 * np.linalg.norm(y - base) + 1e-6 * np.linalg.norm(base) + 1e-12
        worst = max(worst, float(np.linalg.norm(x - y) / allowed))
    return worst if np.isfinite(worst) else np.inf
