"""The page of a scaling sweep, and of a prediction beyond the machine. Imports no jax."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpscale.metrics.plot import NoMatplotlibError
from dpscale.page import NO_PLOTS, Page, written_at
from dpscale.scaling.curves import Curves, law_text, overhead_text
from dpscale.scaling.fits import Interval
from dpscale.scaling.plots import Draw, prediction_figures, scaling_figures, to_svg
from dpscale.scaling.point import MODES, Mode
from dpscale.scaling.predict import LABELS, PUBLISHED_TEXT, Prediction
from dpscale.scaling.prediction_text import fit_lines
from dpscale.scaling.record import INSIDE, PARTS, PARTS_METHOD
from dpscale.scaling.sweep import Collected

IN_BRACKETS = (
    "finalize is reduction, noise and update as they run, fused; the others are part of host, hidden behind the "
    "device, or not in every step"
)


def sweep_page(
    collected: Collected, found: Curves, others: Sequence[Curves] = (), prediction: Prediction | None = None
) -> Page:
    """The page of a scaling sweep."""
    page = Page(f"Scaling of {found.name}", f"Measured on {found.where}. Written {written_at()}.")
    page.facts(_sweep_facts(found))
    if found.caveat:
        page.note(found.caveat)
    if found.missing or found.unreadable:
        page.note("Not everything that was asked for is here: see the end of the page.")
    page.section("Curves")
    page.text("Bars are 95 % bootstrap intervals over repeats and windows; dashed lines are ideal scaling.")
    _figures(page, scaling_figures(found, others))
    _point_table(page, found)
    page.section("Fitted laws and the price of privacy")
    page.items([law_text(law) for law in found.laws] + [overhead_text(one) for one in found.overheads])
    page.section("How the time of a step was split")
    _parts_table(page, found)
    page.text(f"{PARTS_METHOD} In brackets: {IN_BRACKETS}.")
    if prediction is not None:
        prediction_section(page, prediction, found)
    page.section("Missing points")
    lines = [f"{one.name}: {one.why}" for one in found.missing] + list(found.unreadable)
    page.items(lines) if lines else page.text("None.")
    page.section("Environment")
    page.pairs(_sweep_environment(collected))
    return page


def prediction_page(found: Prediction, measured: Curves | None) -> Page:
    """The page of a prediction alone."""
    page = Page(f"Predicted scaling, {found.network}", f"Written {written_at()}.")
    prediction_section(page, found, measured)
    return page


def prediction_section(page: Page, found: Prediction, measured: Curves | None) -> None:
    """Figures, table, sources, check and remedies of a prediction."""
    page.section("Beyond the machine")
    basis = "the times of one device that were measured" if found.measured else "ASSUMED times of one device"
    page.note(f"A prediction from {basis} and a model of the network; nothing in this section was measured at scale.")
    _figures(page, prediction_figures(found, measured))
    head = ["mode", "kind", "devices", "logical batch", "physical", "step ms", "reduction ms", "padding", "of ideal"]
    page.table(
        [*head, "limit"],
        [
            [
                p.mode,
                LABELS[p.scheme],
                str(p.devices),
                f"{p.batch:g}",
                str(p.physical_batch_size),
                f"{1e3 * p.step_s:.1f}",
                f"{1e3 * (p.latency_s + p.wire_s):.2f}",
                f"{p.padding_s / p.step_s:.1%}",
                f"{p.efficiency:.1%}",
                f"{p.limit:.1%}",
            ]
            for p in found.points
        ],
    )
    page.text("What would help most at the largest scale:")
    page.items(found.help)
    page.text("Where it comes from:")
    page.items([*found.sources, *(fit_lines(found.fit) if found.fit else ["not checked against measured points"])])
    page.text(PUBLISHED_TEXT)


def _figures(page: Page, figures: Mapping[str, Draw]) -> None:
    try:
        page.figures({name.replace("-", " "): to_svg(name, draw) for name, draw in figures.items()})
    except NoMatplotlibError:
        page.text(NO_PLOTS)


def _sweep_facts(found: Curves) -> dict[str, str]:
    facts: dict[str, str] = {}
    for mode in MODES:
        rows = found.curve("private", mode) or found.curve("nonprivate", mode)
        if len(rows) > 1:
            last = rows[-1]
            facts[f"{mode} scaling, {last.devices} devices, {last.variant}"] = f"{last.efficiency.value:.0%}"
    if found.overheads:
        facts["private / non-private step"] = f"x {found.overheads[0].ratio.value:.2f}"
    facts["most examples a second"] = f"{max(row.examples_per_s.value for row in found.rows):,.0f}"
    return facts


def _point_table(page: Page, found: Curves) -> None:
    head = ["kind", "mode", "devices", "batch", "step ms", "examples/s", "95 %", "speed-up", "efficiency", "95 %"]
    head += ["padding", "ex/s/device", "device-h/epoch"]
    page.table(head, [_point(row.mode, row) for row in found.rows])


def _point(mode: Mode, row: Any) -> list[str]:
    rate, efficiency = row.examples_per_s, row.efficiency
    return [
        row.variant,
        mode,
        str(row.devices),
        f"{row.batch:g}",
        f"{1e3 * row.step_s.value:.1f}",
        f"{rate.value:,.0f}",
        f"{rate.low:,.0f}\u2013{rate.high:,.0f}",
        f"{row.speed_up.value:.2f}",
        f"{efficiency.value:.1%}",
        _percents(efficiency),
        f"{row.padded_rows_share:.1%}",
        f"{row.examples_per_s_per_device:,.0f}",
        f"{row.device_hours_per_epoch:.2g}",
    ]


def _parts_table(page: Page, found: Curves) -> None:
    """Everything that the records split the step into, once for each count and batch, in milliseconds."""
    head = ["kind", "devices", "batch", "whole step, ms", *PARTS, *(f"({name.replace('_', ' ')})" for name in INSIDE)]
    rows = {(row.devices, row.batch, row.variant): row for row in reversed(found.rows)}
    page.table(
        head,
        [
            [row.variant, str(row.devices), f"{row.batch:g}", *map(_ms, (row.step_s.value, *row.parts.values()))]
            for _, row in sorted(rows.items(), key=lambda item: (item[0][:2], item[1].variant == "nonprivate"))
        ],
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _percents(interval: Interval) -> str:
    if interval.low == interval.high == 1:
        return "base"
    return f"{100 * interval.low:.0f}\u2013{100 * interval.high:.0f} %"


def _sweep_environment(collected: Collected) -> dict[str, object]:
    first, last = collected.records[0], collected.records[-1]
    facts: dict[str, object] = {
        "model": f"{first.model}, {first.num_parameters:,} parameters",
        "data": f"{first.data} ({first.data_is})",
        "device": first.device_kind,
        "nodes of the largest point": ", ".join(last.nodes),
        "physical batch": first.physical_batch_size,
        "compile, left out of the times": f"{max(r.compile_s for r in collected.records):.1f} s at most",
    }
    environment = dict(first.environment)
    packages = environment.pop("packages", {})
    loads = [r.environment.get("load_average", {}) for r in collected.records]
    busiest = max((v for load in loads for v in load.values() if v is not None), default=None)
    facts["highest load average seen"] = "-" if busiest is None else f"{busiest:g}"
    for name in ("variables", "clocks", "load_average"):
        value = environment.pop(name, None)
        if value and name != "load_average":
            facts[name] = json.dumps(value) if isinstance(value, dict) else "; ".join(value)
    return facts | environment | packages
