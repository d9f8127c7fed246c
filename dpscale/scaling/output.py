"""Files of curves and predictions: CSV, JSON, SVG, PNG and one page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpscale.durable import write_atomically
from dpscale.errors import InputError
from dpscale.metrics.plot import NoMatplotlibError
from dpscale.scaling.curves import Curves
from dpscale.scaling.plots import Draw, prediction_figures, scaling_figures, to_png, to_svg
from dpscale.scaling.predict import Prediction
from dpscale.scaling.record import SHARED_MODE
from dpscale.scaling.sweep import Collected
from dpscale.sweep_page import prediction_page, sweep_page

PROLOGUE = '<?xml version="1.0" encoding="utf-8"?>\n'


def write_curves(collected: Collected, found: Curves, others: Sequence[Curves], folder: Path, *, png: bool) -> Path:
    """Write table.csv, curves.json, the plots and index.html into `folder`; the page's path.

    Raises: InputError when the folder cannot be written. Without matplotlib there are no plots, and the page says so.
    """
    files = {"table.csv": found.to_csv(), "curves.json": found.to_json()}
    files["index.html"] = sweep_page(collected, found, others).html()
    return _write(folder, files, scaling_figures(found, others), png=png)


def write_prediction(found: Prediction, measured: Curves | None, folder: Path) -> Path:
    """Write prediction.json, the plots and index.html into `folder`; the page's path.

    Raises: InputError when the folder cannot be written.
    """
    files = {"prediction.json": found.to_json(), "index.html": prediction_page(found, measured).html()}
    return _write(folder, files, prediction_figures(found, measured), png=True)


def _write(folder: Path, files: Mapping[str, str], figures: Mapping[str, Draw], *, png: bool) -> Path:
    drawn: dict[str, str | bytes] = dict(files)
    with contextlib.suppress(NoMatplotlibError):  # the page says so
        for name, draw in figures.items():
            drawn[f"{name}.svg"] = PROLOGUE + to_svg(name, draw) + "\n"
            if png:
                drawn[f"{name}.png"] = to_png(draw)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            write_atomically(folder / name, content, SHARED_MODE)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
    return folder / "index.html"
