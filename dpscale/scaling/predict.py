"""Beyond the machine: step times at any number of devices, from one device's times and a network model.

    step = rows * row_s + all-reduce + noise + update + host

rows: of one device, padding included, in expectation over Poisson's draws: all devices wait for the last physical
batch. Nothing overlaps: an upper bound for a reduction that the compiler might hide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from dpscale.scaling.network import Network, all_reduce
from dpscale.scaling.point import Mode, Variant
from dpscale.scaling.record import Record
from dpscale.scaling.workload import Workload, draws_of

Scheme = Literal["private", "nonprivate", "reduce every batch"]
SCHEMES: tuple[Scheme, ...] = ("private", "nonprivate", "reduce every batch")
LABELS: dict[Scheme, str] = {
    "private": "DP-SGD (dpscale)",
    "nonprivate": "SGD, one reduction a step (dpscale)",
    "reduce every batch": "SGD, a reduction for every physical batch",
}
# arXiv 2406.17298v3, recalled: devices, scheme, share of ideal.
PUBLISHED: tuple[tuple[int, Scheme, float], ...] = ((80, "private", 0.692), (80, "reduce every batch", 0.533))
PUBLISHED_DEVICE = "V100"
LEAST_GAP = 5e-4  # of ideal: what is printed as 0.1 points
PUBLISHED_TEXT = (
    "published for 80 V100 GPUs (arXiv 2406.17298v3, recalled, not re-read): 69.2 % of ideal with privacy, 53.3 % "
    "without; another library, another input pipeline, so beside the prediction and not a check of it"
)


@dataclass(frozen=True)
class Predicted:
    """One predicted step. Seconds; `efficiency`: of `devices` times one device; `limit`: the efficiency that remains
    when only whole rows and the wire at full bandwidth cost time.
    """

    scheme: Scheme
    mode: Mode
    devices: int
    batch: float
    physical_batch_size: int
    accumulations: float
    algorithm: str
    sharded: bool
    step_s: float
    compute_s: float
    padding_s: float
    latency_s: float
    wire_s: float
    noise_s: float
    update_s: float
    host_s: float
    examples_per_s: float
    efficiency: float
    limit: float


@dataclass(frozen=True)
class Fit:
    """Factors on the model's latency and wire times, from measured points; `residuals`: (devices, mode, variant,
    measured over predicted step time - 1) with the fitted factors, `rms_before` and `rms_after` of them all.
    """

    latency: float
    wire: float
    residuals: tuple[tuple[int, str, str, float], ...]
    rms_before: float
    rms_after: float


@dataclass(frozen=True)
class Prediction:
    """Everything that is printed, drawn and written."""

    network: str
    device: str
    sources: tuple[str, ...]
    measured: bool
    points: tuple[Predicted, ...]
    fit: Fit | None
    help: tuple[str, ...]

    def curve(self, scheme: Scheme, mode: Mode) -> list[Predicted]:
        """One curve, by devices."""
        return [p for p in self.points if (p.scheme, p.mode) == (scheme, mode)]

    def to_json(self) -> str:
        """Everything, as indented JSON."""
        return json.dumps({"schema_version": 1, "kind": "scaling prediction", **asdict(self)}, indent=1) + "\n"


def predict(
    workloads: dict[Variant, Workload],
    network: Network,
    counts: Sequence[int],
    modes: Sequence[Mode],
    records: Sequence[Record] = (),
) -> Prediction:
    """Predict every count for DP-SGD and SGD; fitted to records of more than the smallest count, if there are any."""
    fit = fit_network(workloads, network, records)
    factors = (fit.latency, fit.wire) if fit else (1.0, 1.0)
    base = min(counts)
    points = []
    for mode in modes:
        for scheme in SCHEMES:
            workload = workloads.get("private" if scheme == "private" else "nonprivate")
            if workload is not None:
                points += [step(workload, network, n, mode, scheme, base, factors) for n in counts]
    largest = [p for p in points if p.devices == max(counts) and p.scheme in ("private", "nonprivate")]
    return Prediction(
        network=network.name,
        device=network.device.name,
        sources=_sources(workloads, network, fit),
        measured=all(workload.measured for workload in workloads.values()),
        points=tuple(points),
        fit=fit,
        help=(*(what_would_help(largest[0]) if largest else ()), *private_against_sgd(points)),
    )


def step(
    workload: Workload,
    network: Network,
    devices: int,
    mode: Mode,
    scheme: Scheme,
    base: int = 1,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Predicted:
    """One predicted step; `factors`: on latency and wire."""
    draws = draws_of(workload, devices, mode, base)
    batch = workload.batch * (devices / base if mode == "weak" else 1.0)
    reduction = all_reduce(network, devices, workload.message_bytes)
    times = draws.accumulations if scheme == "reduce every batch" else 1.0
    compute = workload.row_s * batch / devices
    padding = workload.row_s * draws.rows - compute
    latency, wire = times * factors[0] * reduction.latency_s, times * factors[1] * reduction.wire_s
    noise, update = (part / (devices if workload.sharded else 1) for part in (workload.noise_s, workload.update_s))
    fixed = noise + update + workload.host_s
    seconds = compute + padding + latency + wire + fixed
    # One device with the same share of the work, whose own padding counts: the ideal that efficiency refers to.
    alone = draws_of(workload, 1, "strong", 1)
    one = workload.row_s * alone.rows + workload.noise_s + workload.update_s + workload.host_s
    ideal_rate = workload.batch / one
    return Predicted(
        scheme=scheme,
        mode=mode,
        devices=devices,
        batch=batch,
        physical_batch_size=draws.physical_batch_size,
        accumulations=draws.accumulations,
        algorithm=reduction.algorithm,
        sharded=workload.sharded,
        step_s=seconds,
        compute_s=compute,
        padding_s=padding,
        latency_s=latency,
        wire_s=wire,
        noise_s=noise,
        update_s=update,
        host_s=workload.host_s,
        examples_per_s=batch / seconds,
        efficiency=batch / seconds / devices / ideal_rate,
        limit=min(1.0, batch / (compute + reduction.limit_s) / devices / ideal_rate),
    )


def fit_network(workloads: dict[Variant, Workload], network: Network, records: Sequence[Record]) -> Fit | None:
    """Least squares, not below zero, of what measured steps take beyond compute, on the model's latency and wire."""
    smallest = min((r.devices for r in records), default=0)
    chosen = [r for r in records if r.devices > smallest and r.variant in workloads]
    if not chosen:
        return None
    seen = np.array([np.median([window.step_s for window in r.windows]) for r in chosen])
    without = np.array([_without_reduction(workloads[r.variant], r) for r in chosen])
    reductions = [all_reduce(network, r.devices, r.reduced_bytes) for r in chosen]
    terms = np.array([[reduction.latency_s, reduction.wire_s] for reduction in reductions])
    factors = _not_negative(terms / seen[:, None], (seen - without) / seen)
    after = seen / (without + terms @ factors) - 1
    before = seen / (without + terms.sum(axis=1)) - 1
    return Fit(
        latency=float(factors[0]),
        wire=float(factors[1]),
        residuals=tuple(
            (r.devices, "+".join(r.modes), r.variant, float(left)) for r, left in zip(chosen, after, strict=True)
        ),
        rms_before=float(np.sqrt(np.mean(before**2))),
        rms_after=float(np.sqrt(np.mean(after**2))),
    )


def _without_reduction(workload: Workload, record: Record) -> float:
    """Seconds of a step of the record but for the reduction, with the rows that it really computed."""
    rows = sum(window.rows for window in record.windows) / sum(window.steps for window in record.windows)
    shared = (workload.noise_s + workload.update_s) / (record.devices if workload.sharded else 1)
    return workload.row_s * rows / record.devices + shared + workload.host_s


def what_would_help(point: Predicted) -> list[str]:
    """What the step's time beyond pure compute goes to, the largest first, each with its remedy."""
    remedies = [
        (point.wire_s / 2, "twice the network bandwidth (or half the bytes)"),
        (point.latency_s / 2, "half the network latency"),
        (point.padding_s, "no padding: a logical batch that fills whole physical batches, or truncated sampling"),
        (
            0.0 if point.sharded else (point.noise_s + point.update_s) * (1 - 1 / point.devices),
            'performance.update_sharding = "sharded": noise and update on 1/devices of the parameters',
        ),
        (point.host_s, "input, sampling and dispatch hidden behind the device"),
    ]
    reduction = point.latency_s + point.wire_s
    fixed = reduction + point.noise_s + point.update_s + point.host_s
    doubled = point.compute_s * 2 / (2 * point.step_s - fixed) if point.mode == "strong" else 0.0
    lines = [
        f"{saved / point.step_s:.1%} of the step: {what}"
        for saved, what in sorted(remedies, reverse=True)
        if saved > 1e-4 * point.step_s
    ]
    if doubled:
        now = point.compute_s / point.step_s
        lines.append(f"twice the logical batch would raise useful compute from {now:.1%} to {doubled:.1%} of the step")
    return lines


def private_against_sgd(points: Sequence[Predicted]) -> list[str]:
    """Whether DP-SGD keeps as much of ideal as SGD with one reduction a step at every count; the remedy where not."""
    found = {(p.scheme, p.mode, p.devices): p for p in points}
    lines = []
    for mode in dict.fromkeys(p.mode for p in points):
        both = [
            (p, found.get(("nonprivate", mode, p.devices))) for p in points if (p.scheme, p.mode) == ("private", mode)
        ]
        behind = [(p, sgd.efficiency - p.efficiency) for p, sgd in both if sgd is not None]
        worse = [(p, gap) for p, gap in behind if gap > LEAST_GAP]
        if not worse:
            lines += [f"{mode}: DP-SGD keeps at least as much of ideal as SGD does, at every count"] if behind else []
            continue
        point, gap = max(worse, key=lambda one: one[1])
        line = f"{mode}: DP-SGD keeps {100 * gap:.1f} points less of ideal than SGD at {point.devices} devices"
        if not point.sharded:
            line += (
                ', since each draws the noise of all parameters: performance.update_sharding = "sharded" draws it once'
            )
        lines.append(line)
    return lines


def _sources(workloads: dict[Variant, Workload], network: Network, fit: Fit | None) -> tuple[str, ...]:
    found = [f"{variant}: {workload.source}" for variant, workload in workloads.items()]
    found += [f"inside a node: {network.intra.source}", f"between nodes: {network.inter.source}"]
    if not all(workload.measured for workload in workloads.values()):
        found.append(f"noise and update: {network.device.source}")
    if fit is not None:
        found.append("latency and wire scaled to the measured points")
    return tuple(found)


def _not_negative(terms: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[2]: the least squares among both terms, either alone, and none, whose factors are not negative."""
    best, error = np.zeros(2), float(target @ target)
    for columns in ([0, 1], [0], [1]):
        part = terms[:, columns]
        if np.linalg.matrix_rank(part) < len(columns):
            continue
        factors = np.linalg.lstsq(part, target, rcond=None)[0]
        left = target - part @ factors
        if np.all(factors >= 0) and float(left @ left) < error * (1 - 1e-12):
            best, error = np.zeros(2), float(left @ left)
            best[columns] = factors
    return best
