"""One figure of a run: held-out accuracy and the epsilon spent, against steps (extra `plots`)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpscale.errors import InputError
from dpscale.metrics.files import SHARED_MODE, replace_file
from dpscale.metrics.records import Record, read_records
from dpscale.privacy.shown import shown_epsilon

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#595959"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#262626",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "dpscale",  # equal runs give equal files
}
MARKED_POINTS = 40  # with more points than this, markers would merge into a thick line

Series = list[tuple[int, float]]


class NoMatplotlibError(InputError):
    """A plot was asked for where there is nothing to draw it with."""

    def __init__(self) -> None:
        super().__init__("A plot needs matplotlib, which is not installed: pip install 'dpscale[plots]'")


def plot_run(
    run_dir: str | os.PathLike[str],
    *,
    epsilon_allowed: float | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Draw RUN/metrics/public.jsonl to `path` (.svg or .png; RUN/metrics/plot.svg by default) and return it.

    Accuracy in percent above, epsilon below, against logical steps; `epsilon_allowed` is a dotted line.

    Edge cases: a quantity without a value gets no panel; a single point is drawn as a point. Where a later
    attempt went back behind an earlier one, the later one's values are shown.

    Raises: InputError when matplotlib is not installed, the suffix is neither, or there is nothing to draw;
    RunDirectoryError when a file cannot be read or written.
    """
    target = Path(path) if path is not None else Path(run_dir) / "metrics" / "plot.svg"
    if target.suffix not in (".svg", ".png"):
        raise InputError(f"{target} ends in {target.suffix!r}: a plot is an .svg or a .png file.")
    kind = "svg" if target.suffix == ".svg" else "png"
    replace_file(target, [draw_run(run_dir, epsilon_allowed=epsilon_allowed, kind=kind)], SHARED_MODE)
    return target


def draw_run(
    run_dir: str | os.PathLike[str], *, epsilon_allowed: float | None = None, kind: Literal["svg", "png"]
) -> bytes:
    """The file that `plot_run` writes."""
    source = Path(run_dir) / "metrics" / "public.jsonl"
    records = latest(read_records(source))
    accuracy = [(step, 100 * value) for step, value in _series(records, "validation_accuracy")]
    epsilon = _series(records, "epsilon")
    if not accuracy and not epsilon:
        raise InputError(
            f"{source} holds neither validation_accuracy nor epsilon: there is nothing to draw. "
            "They appear with the first checkpoint after an evaluation."
        )
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise NoMatplotlibError from error
    with mpl.rc_context(STYLE):
        image = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        _figure(accuracy, epsilon, epsilon_allowed).savefig(image, format=kind, dpi=150, metadata=metadata)
    return image.getvalue()


def latest(records: list[Record]) -> list[Record]:
    """The records without those of steps that a later attempt ran again."""
    kept: list[Record] = []
    attempt = 0
    for record in records:
        now = record.get("attempt") or attempt
        if now != attempt:  # a copied run's number may be smaller
            kept = [earlier for earlier in kept if (earlier["step"] or 0) < (record["step"] or 0)]
            attempt = int(now)
        kept.append(record)
    return kept


def _series(records: list[Record], key: str) -> Series:
    points = {int(record["step"] or 0): record[key] for record in records if record.get(key) is not None}
    return [(step, float(value)) for step, value in sorted(points.items()) if value is not None]


def _figure(accuracy: Series, epsilon: Series, epsilon_allowed: float | None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panels = int(bool(accuracy)) + int(bool(epsilon))
    figure = Figure(figsize=(5.4, 1.0 + 2.0 * panels), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)  # no pyplot: no window, no global state
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    figure.suptitle(_title(accuracy, epsilon), fontsize=12)
    if accuracy:
        _draw(axes[0], accuracy, BLUE, "Held-out accuracy (%)")
        axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 100.0))
    if epsilon:
        _draw(axes[-1], epsilon, VERMILION, "Privacy spent (epsilon)")
        _allow(axes[-1], epsilon_allowed)
        axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("Step (logical batches)")
    axes[-1].set_xlim(0, 1.04 * max(_last_step(accuracy, epsilon), 1))
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels(axes)
    return figure


def _last_step(*series: Series) -> int:
    return max(points[-1][0] for points in series if points)


def _title(accuracy: Series, epsilon: Series) -> str:
    last_step = _last_step(accuracy, epsilon)
    parts = [f"epsilon {shown_epsilon(epsilon[-1][1], 2)}"] if epsilon else []
    if accuracy:
        step, value = accuracy[-1]
        when = "" if step == last_step else f" (step {step:,})"
        parts.append(f"held-out accuracy {value:.1f} %{when}")
    return f"After {last_step:,} step{'s' if last_step != 1 else ''}: " + ", ".join(parts)


def _draw(axes: Axes, points: Series, colour: str, label: str) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= MARKED_POINTS else ""
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4)
    axes.set_ylabel(label)


def _allow(axes: Axes, epsilon_allowed: float | None) -> None:
    if epsilon_allowed is None:
        return
    axes.axhline(epsilon_allowed, color=GREY, linestyle=":", linewidth=1.5)
    axes.annotate(
        f"allowed: {epsilon_allowed:g}",
        xy=(0.0, epsilon_allowed),
        xycoords=("axes fraction", "data"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=GREY,
    )
