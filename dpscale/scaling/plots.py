"""Scaling curves and predictions as figures (matplotlib, extra `plots`): SVG text, and PNG where it is asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dpscale.metrics.plot import BLUE, GREY, STYLE, VERMILION, NoMatplotlibError
from dpscale.page import inline_svg
from dpscale.scaling.curves import Curves, Row
from dpscale.scaling.point import MODES, VARIANTS, Mode, Variant
from dpscale.scaling.predict import LABELS, PUBLISHED, PUBLISHED_DEVICE, SCHEMES, Prediction, Scheme
from dpscale.scaling.record import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (5.2, 3.6)  # inches: on a phone the text stays readable
GREEN, ORANGE, SKY, PURPLE = "#009E73", "#E69F00", "#56B4E9", "#CC79A7"  # the rest of Okabe and Ito's palette
VARIANT_COLOUR: dict[Variant, str] = {"private": BLUE, "nonprivate": VERMILION}
VARIANT_LABEL: dict[Variant, str] = {"private": "DP-SGD", "nonprivate": "SGD"}
SCHEME_COLOUR: dict[Scheme, str] = {"private": BLUE, "nonprivate": VERMILION, "reduce every batch": PURPLE}
PART_COLOUR = dict(zip(PARTS, (BLUE, ORANGE, GREEN, SKY, GREY), strict=True))
OTHER_LINES = ("--", ":", "-.")

Draw = Callable[["Figure"], None]


def scaling_figures(found: Curves, others: Sequence[Curves] = ()) -> dict[str, Draw]:
    """Name -> what draws it: throughput and efficiency of each mode, and the split of the step's time."""
    figures: dict[str, Draw] = {}
    for mode in MODES:
        if any(row.mode == mode for row in found.rows):
            figures[f"{mode}-throughput"] = lambda figure, mode=mode: _throughput(figure, found, others, mode)
            figures[f"{mode}-efficiency"] = lambda figure, mode=mode: _efficiency(figure, found, others, mode)
            figures[f"{mode}-step-time"] = lambda figure, mode=mode: _step_time(figure, found, mode)
    return figures


def prediction_figures(found: Prediction, measured: Curves | None = None) -> dict[str, Draw]:
    """Name -> what draws it: predicted efficiency of each mode, with measured points and published figures."""
    figures: dict[str, Draw] = {}
    for mode in MODES:
        if any(point.mode == mode for point in found.points):
            figures[f"predicted-{mode}"] = lambda figure, mode=mode: _predicted(figure, found, measured, mode)
    return figures


def to_svg(name: str, draw: Draw) -> str:
    """A figure as one <svg> element, with ids that no other figure of a page has, and no prologue or metadata."""
    return inline_svg(_drawn(draw, "svg", f"dpscale {name}").decode())


def to_png(draw: Draw) -> bytes:
    """A figure as PNG, 200 dots an inch."""
    return _drawn(draw, "png", "dpscale")


def _drawn(draw: Draw, kind: str, salt: str) -> bytes:
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise NoMatplotlibError from error
    with mpl.rc_context({**STYLE, "font.size": 9.5, "svg.hashsalt": salt}):
        figure = Figure(figsize=SIZE, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        FigureCanvasAgg(figure)
        draw(figure)
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()


def _throughput(figure: Figure, found: Curves, others: Sequence[Curves], mode: Mode) -> None:
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for curves, style, label, colour, rows in _each_curve(found, others, mode):
        _with_interval(axes, rows, [row.examples_per_s for row in rows], style, label, colour)
        if curves is found:
            ideal = [rows[0].examples_per_s.value * row.devices / rows[0].devices for row in rows]
            axes.plot([row.devices for row in rows], ideal, color=colour, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.plot([], [], color=GREY, linewidth=0.9, linestyle=(0, (2, 3)), label="ideal")
    axes.set_ylabel("Examples a second")
    _finish(figure, axes, f"{mode.capitalize()} scaling: throughput", found, others)


def _efficiency(figure: Figure, found: Curves, others: Sequence[Curves], mode: Mode) -> None:
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for _, style, label, colour, rows in _each_curve(found, others, mode):
        percent = [_Percent(row) for row in rows]
        _with_interval(axes, rows, percent, style, label, colour)
    axes.axhline(100, color=GREY, linewidth=0.9, linestyle=(0, (2, 3)), label="ideal")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Efficiency (% of ideal)")
    _finish(figure, axes, f"{mode.capitalize()} scaling: efficiency", found, others)


class _Percent:
    def __init__(self, row: Row) -> None:
        self.value, self.low, self.high = (100 * x for x in _ends(row.efficiency))


def _ends(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _each_curve(
    found: Curves, others: Sequence[Curves], mode: Mode
) -> Iterator[tuple[Curves, str, str, str, list[Row]]]:
    names = legend_names(found, others)
    for number, curves in enumerate((found, *others)):
        style = "-" if number == 0 else OTHER_LINES[(number - 1) % len(OTHER_LINES)]
        for variant in VARIANTS:
            rows = curves.curve(variant, mode)
            if rows:
                label = VARIANT_LABEL[variant] + (f", {names[number]}" if others else "")
                yield curves, style, label, VARIANT_COLOUR[variant], rows


def _with_interval(axes: Axes, rows: list[Row], values: Sequence[Any], style: str, label: str, colour: str) -> None:
    # A little apart, so that the bars of both kinds can be seen where they meet.
    devices = [row.devices * (0.985 if rows[0].variant == "private" else 1.015) for row in rows]
    centre, low, high = zip(*(_ends(value) for value in values), strict=True)
    # The interval of a median need not hold the median of medians: bars never point inwards.
    below = [max(0.0, c - l) for c, l in zip(centre, low, strict=True)]
    above = [max(0.0, h - c) for c, h in zip(centre, high, strict=True)]
    axes.errorbar(
        devices,
        centre,
        yerr=[below, above],
        color=colour,
        linestyle=style,
        marker="o",
        markersize=4,
        capsize=2.5,
        linewidth=1.6,
        label=label,
    )


def _step_time(figure: Figure, found: Curves, mode: Mode) -> None:
    """Stacked bars: the shares of a step at every count, side by side for each kind."""
    kinds: list[tuple[Variant, list[Row]]] = [(one, rows) for one in VARIANTS if (rows := found.curve(one, mode))]
    panels = list(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0])
    for axes, (variant, rows) in zip(panels, kinds, strict=True):
        bottom = [0.0] * len(rows)
        for part in PARTS:
            heights = [100 * max(0.0, row.parts[part] or 0.0) / row.step_s.value for row in rows]
            axes.bar(range(len(rows)), heights, 0.7, bottom=bottom, color=PART_COLOUR[part], label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.axhline(100, color=GREY, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.set_xticks(range(len(rows)), [str(row.devices) for row in rows], fontsize=8)
        axes.grid(visible=False, axis="x")
        axes.set_title(VARIANT_LABEL[variant], fontsize=9.5)
        axes.set_xlabel("Devices")
    panels[0].set_ylabel("% of the whole step")
    panels[0].set_ylim(top=max(105.0, panels[0].get_ylim()[1]))
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, ncols=len(PARTS), frameon=False, loc="outside upper center"
    )
    _caption(figure, "", f"{mode.capitalize()} scaling: where the time of a step goes. {found.caveat}".strip())


def _predicted(figure: Figure, found: Prediction, measured: Curves | None, mode: Mode) -> None:
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    counts: set[int] = set()
    for scheme in SCHEMES:
        points = found.curve(scheme, mode)
        if points:
            counts |= {point.devices for point in points}
            shares = [100 * point.efficiency for point in points]
            x = [point.devices for point in points]
            axes.plot(x, shares, color=SCHEME_COLOUR[scheme], linewidth=1.6, label=LABELS[scheme])
    limits = found.curve("private", mode) or found.curve("nonprivate", mode)
    x = [point.devices for point in limits]
    axes.plot(
        x, [100 * p.limit for p in limits], color=GREY, linestyle=":", label="physical limit (whole rows, bare wire)"
    )
    _measured_points(axes, measured, mode, counts)
    if mode == "strong" and PUBLISHED_DEVICE in found.device and any(x[0] <= n <= x[-1] for n, _, _ in PUBLISHED):
        for devices, scheme, share in PUBLISHED:
            axes.plot(devices, 100 * share, "*", color=SCHEME_COLOUR[scheme], markersize=9, linestyle="none")
        axes.plot([], [], "*", color=GREY, linestyle="none", label="published, 80 V100, another library (recalled)")
    axes.set_ylim(0, 105)
    axes.set_ylabel("Efficiency (% of ideal)")
    axes.set_xlabel("Devices")
    _device_ticks(axes, sorted(counts))
    axes.legend(fontsize=7.5, frameon=False, loc="best")  # where curves fall fast, not below them
    basis = "from one device's measured times" if found.measured else "from ASSUMED single-device speed"
    caveat = f" {measured.caveat}" if measured and measured.caveat else ""
    text = f"A prediction {basis}; nothing here was measured at scale.{caveat}"
    _caption(figure, f"Predicted {mode} scaling, {found.network}", text)


def _measured_points(axes: Axes, measured: Curves | None, mode: Mode, counts: set[int]) -> None:
    for variant in VARIANTS if measured else ():
        assert measured is not None
        rows = measured.curve(variant, mode)
        if len(rows) > 1:
            counts |= {row.devices for row in rows}
            shares = [100 * row.efficiency.value for row in rows]
            x = [row.devices for row in rows]
            label = f"measured {VARIANT_LABEL[variant]}"
            axes.plot(x, shares, "o", color=VARIANT_COLOUR[variant], markersize=5, label=label, markerfacecolor="white")


def legend_names(found: Curves, others: Sequence[Curves]) -> list[str]:
    """What tells the sweeps of one plot apart: their configs' names, else their directories', else their numbers."""
    every = (found, *others)
    for names in ([curves.name for curves in every], [curves.directory for curves in every]):
        if len(set(names)) == len(names):
            return names
    return [f"{curves.name} ({number})" for number, curves in enumerate(every, start=1)]


def _finish(figure: Figure, axes: Axes, title: str, found: Curves, others: Sequence[Curves]) -> None:
    axes.set_xlabel("Devices")
    _device_ticks(axes, sorted({row.devices for curves in (found, *others) for row in curves.rows}))
    axes.legend(fontsize=8, frameon=False, handlelength=3.2)
    _caption(figure, title, caveat_of_all(found, others))


def caveat_of_all(found: Curves, others: Sequence[Curves]) -> str:
    """What a plot of several sweeps cannot show, and where each was measured."""
    if not others:
        return found.caveat
    names, every = legend_names(found, others), (found, *others)
    where = "; ".join(f"{name} on {curves.where}" for name, curves in zip(names, every, strict=True))
    owners: dict[str, list[str]] = {}
    for name, curves in zip(names, every, strict=True):
        owners.setdefault(curves.caveat, []).append(name)
    caveats = [
        caveat if len(of) == len(every) else f"{', '.join(of)}: {caveat}" for caveat, of in owners.items() if caveat
    ]
    return " ".join([f"Measured: {where}.", *caveats])


def _device_ticks(axes: Axes, counts: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    shown = counts if len(counts) <= 10 else counts[:: -(-len(counts) // 10)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.08)


def _caption(figure: Figure, title: str, caveat: str) -> None:
    import textwrap

    if title:
        figure.suptitle(title, fontsize=11)
    if caveat:
        figure.supxlabel(textwrap.fill(caveat, 84), fontsize=7, color=GREY)
