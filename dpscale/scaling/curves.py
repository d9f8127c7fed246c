"""From records to scaling curves: throughput, speed-up, efficiency, intervals and fitted laws. Imports no jax."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dpscale.scaling.fits import Interval, amdahl, centre, gustafson, interval, resampled
from dpscale.scaling.point import MODES, VARIANTS, Mode, Variant
from dpscale.scaling.record import INSIDE, PARTS, Record
from dpscale.scaling.sweep import Collected, Missing

BOOTSTRAP_SEED = 0
MAY_FOLLOW_THE_COUNT = ("physical_batch_size",)


@dataclass(frozen=True)
class Row:
    """One point of a curve, over its repeats. Speed-up and efficiency are relative to the smallest count of the curve.

    `device_hours_per_epoch`: as many examples as the data set has, in expectation. `parts`: seconds of a step, medians,
    of all that a record splits it into (`record.Parts`); None for a checkpoint that was not timed.
    """

    variant: Variant
    mode: Mode
    devices: int
    batch: float
    repeats: int
    windows: int
    step_s: Interval
    examples_per_s: Interval
    examples_per_s_per_device: float
    speed_up: Interval
    efficiency: Interval
    padded_rows_share: float
    device_hours_per_epoch: float
    parts: dict[str, float | None]


@dataclass(frozen=True)
class Law:
    """A fitted law. `serial`: the part of the time that does not shrink with devices; below 0: better than linear."""

    variant: Variant
    mode: Mode
    law: str
    serial: Interval
    points: int


@dataclass(frozen=True)
class Overhead:
    """Private over non-private step time, of windows measured in turn on the same devices."""

    mode: Mode
    devices: int
    ratio: Interval


@dataclass(frozen=True)
class Curves:
    """Everything that the table, the plots and the page show. `directory`: its last name, not the path to it."""

    name: str
    directory: str
    where: str
    caveat: str
    rows: tuple[Row, ...]
    laws: tuple[Law, ...]
    overheads: tuple[Overhead, ...]
    missing: tuple[Missing, ...]
    unreadable: tuple[str, ...]

    def curve(self, variant: Variant, mode: Mode) -> list[Row]:
        """The rows of one curve, by devices."""
        return [row for row in self.rows if (row.variant, row.mode) == (variant, mode)]

    def to_json(self) -> str:
        """Everything, as indented JSON."""
        return json.dumps({"schema_version": 1, "kind": "scaling curves", **asdict(self)}, indent=1) + "\n"

    def to_csv(self) -> str:
        """One line a row, intervals as three columns, parts as one each."""
        out = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()


def curves(collected: Collected) -> Curves:
    """Compute every curve that the records allow; points without a record are named in `missing`."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    rows: list[Row] = []
    laws: list[Law] = []
    overheads: list[Overhead] = []
    for mode in MODES:
        for variant in VARIANTS:
            chosen = [r for r in collected.records if r.variant == variant and mode in r.modes]
            if chosen:
                curve, law = _curve(variant, mode, chosen, rng)
                rows += curve
                laws += law
        overheads += _overheads(mode, collected.records, rng)
    first = collected.records[0]
    return Curves(
        name=collected.name,
        directory=_directory_name(collected.directory),
        where=_where(first),
        caveat=_caveat(collected.records),
        rows=tuple(rows),
        laws=tuple(laws),
        overheads=tuple(overheads),
        missing=collected.missing,
        unreadable=collected.unreadable,
    )


def table_lines(found: Curves) -> list[str]:
    """The curves as lines of text, the fitted laws, and what is missing."""
    lines = [f"{found.name}, measured on {found.where}"]
    head = f"{'mode':<7}{'':<11}{'devices':>7}{'batch':>9}{'step ms':>9}{'examples/s':>12}{'95 % interval':>19}"
    lines += [head + f"{'speed-up':>10}{'efficiency':>12}{'padding':>9}{'ex/s/dev':>10}{'dev-h/epoch':>13}"]
    for row in found.rows:
        rate = row.examples_per_s
        between = f"{rate.low:,.0f} to {rate.high:,.0f}"
        line = f"{row.mode:<7}{row.variant:<11}{row.devices:>7}{row.batch:>9g}{1e3 * row.step_s.value:>9.1f}"
        line += f"{rate.value:>12,.0f}{between:>19}{row.speed_up.value:>10.2f}{row.efficiency.value:>12.1%}"
        line += f"{row.padded_rows_share:>9.1%}{row.examples_per_s_per_device:>10,.0f}"
        lines.append(line + f"{row.device_hours_per_epoch:>13.2g}")
    lines += [law_text(law) for law in found.laws]
    lines += [overhead_text(one) for one in found.overheads]
    lines += [f"missing   {one.name}: {one.why}" for one in found.missing]
    lines += [f"unreadable {text}" for text in found.unreadable]
    return [*lines, f"note      {found.caveat}"] if found.caveat else lines


def law_text(law: Law) -> str:
    """One sentence about a fitted law."""
    s = law.serial
    what = f"{law.law}, {law.mode} {law.variant}: serial part {s.value:.2%} ({s.low:.2%} to {s.high:.2%})"
    rest = "above 100 %: slower with more devices" if s.value > 1 else f"parallel {1 - s.value:.2%}"
    return f"{what}, {rest}, from {law.points} counts"


def overhead_text(one: Overhead) -> str:
    """One sentence about the price of privacy."""
    r = one.ratio
    devices = f"{one.devices} device{'s' if one.devices > 1 else ''}"
    return f"private / non-private step, {one.mode}, {devices}: {r.value:.2f} ({r.low:.2f} to {r.high:.2f})"


def _curve(
    variant: Variant, mode: Mode, records: list[Record], rng: np.random.Generator
) -> tuple[list[Row], list[Law]]:
    counts = sorted({record.devices for record in records})
    groups = [[r for r in records if r.devices == count] for count in counts]
    rates = [[[w.examples_per_s for w in r.windows] for r in group] for group in groups]
    rate = np.array([centre(values) for values in rates])
    draws = np.stack([resampled(values, rng) for values in rates], axis=-1)
    ratio = np.array(counts) / counts[0]
    rows = []
    for at, (count, group) in enumerate(zip(counts, groups, strict=True)):
        first = group[0]
        speed_up = interval(rate[at] / rate[0], draws[:, at] / draws[:, 0])
        rows.append(
            Row(
                variant=variant,
                mode=mode,
                devices=count,
                batch=first.batch,
                repeats=len(group),
                windows=sum(len(r.windows) for r in group),
                # At the expected batch: the windows' own step times follow their draws.
                step_s=interval(first.batch / rate[at], first.batch / draws[:, at]),
                examples_per_s=interval(rate[at], draws[:, at]),
                examples_per_s_per_device=float(rate[at] / count),
                speed_up=speed_up,
                efficiency=Interval(*(value / ratio[at] for value in asdict(speed_up).values())),
                padded_rows_share=first.padded_rows_share,
                device_hours_per_epoch=float(first.num_examples / rate[at] * count / 3600),
                parts={name: _median(getattr(r.parts, name) for r in group) for name in (*PARTS, *INSIDE)},
            )
        )
    if len(counts) < 2:
        return rows, []
    if mode == "strong":
        serial = interval(float(amdahl(counts, 1 / rate)), amdahl(counts, 1 / draws))
        return rows, [Law(variant, mode, "Amdahl", serial, len(counts))]
    serial = interval(float(gustafson(counts, rate)), gustafson(counts, draws))
    return rows, [Law(variant, mode, "Gustafson", serial, len(counts))]


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else None


def _overheads(mode: Mode, records: Iterable[Record], rng: np.random.Generator) -> list[Overhead]:
    pairs: dict[int, list[list[float]]] = {}
    by_key = {(r.variant, r.setting): r for r in records if mode in r.modes}
    for (variant, setting), record in by_key.items():
        other = by_key.get(("nonprivate", setting))
        if variant == "private" and other is not None:
            both = zip(record.windows, other.windows, strict=False)
            pairs.setdefault(setting.devices, []).append([mine.loop_s / theirs.loop_s for mine, theirs in both])
    return [
        Overhead(mode, devices, interval(centre(groups), resampled(groups, rng)))
        for devices, groups in sorted(pairs.items())
    ]


def _directory_name(directory: Path) -> str:
    inner = directory.resolve()
    return inner.parent.name if inner.name == "records" else inner.name


def _where(record: Record) -> str:
    if record.device_kind.lower() != "cpu":
        return record.device_kind
    return f"{record.environment.get('cpu', 'CPU')}, {record.environment.get('cores', '?')} cores"


def _caveat(records: Sequence[Record]) -> str:
    return " ".join(text for text in (unlike(records), _of_cpus(records)) if text)


def unlike(records: Sequence[Record]) -> str:
    """Names what the points of one curve do not share: speed-up and efficiency then compare different things."""
    shared: dict[str, set[str]] = {}
    for record in records:
        environment, performance = record.environment, record.performance
        versions = environment.get("packages") or {}
        facts = {
            "device": _where(record),
            "model": f"{record.model} of {record.num_parameters:,} parameters",
            "examples in the data set": f"{record.num_examples:,}",
            "versions": ", ".join(f"{name} {versions[name]}" for name in ("dpscale", "jax") if name in versions)
            or "not said",
        }
        facts |= {name: str(value) for name, value in performance.items() if name not in MAY_FOLLOW_THE_COUNT}
        if "strong" in record.modes:
            facts["logical batch of strong scaling"] = f"{record.batch:g}"
        if "weak" in record.modes:
            facts["logical batch a device of weak scaling"] = f"{record.batch / record.devices:g}"
        for name, value in facts.items():
            shared.setdefault(name, set()).add(value)
    differ = [f"{name}: {' / '.join(sorted(values))}" for name, values in shared.items() if len(values) > 1]
    if not differ:
        return ""
    return f"NOT ALIKE: the points differ in {'; '.join(differ)}; speed-up and efficiency compare different things."


def _of_cpus(records: Sequence[Record]) -> str:
    if any(record.device_kind.lower() != "cpu" for record in records):
        return ""
    cores = records[0].environment.get("cores") or 1
    most = max(record.processes for record in records)
    text = "CPU processes of one machine share memory and caches: this shows ratios, not GPUs or a network"
    if most > cores:
        text += f"; up to {most} processes shared {cores} cores, which shows overhead only"
    loads = [(record.environment.get("load_average") or {}).get("before") for record in records]
    busiest = max((load for load in loads if load is not None), default=0.0)
    if busiest > cores + 0.5:
        text += f"; other programs were running (load average up to {busiest:.1f} on {cores} cores)"
    return text + "."


def _flat(row: Row) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in asdict(row).items():
        if name == "parts":
            flat |= {f"{part}_s": seconds for part, seconds in value.items()}
        elif isinstance(value, dict):
            flat |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            flat[name] = value
    return flat
