"""A run or a scaling sweep as one self-contained HTML page. Reads public files only; imports no jax."""

from __future__ import annotations

import os
from pathlib import Path

from dpscale.durable import write_atomically
from dpscale.errors import InputError
from dpscale.page import Page
from dpscale.run_page import run_page
from dpscale.scaling.curves import curves
from dpscale.scaling.sweep import collect
from dpscale.sweep_page import sweep_page

SHARED_MODE = 0o644


def write_report(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run's or a sweep's directory; DIRECTORY/report.html by default.

    Guarantees: one file that loads nothing; of a run, only what its public stream, plan and status hold.

    Raises: InputError for a directory that is neither, or a place that cannot be written.
    """
    where = Path(directory)
    page = _page_of(where)
    target = Path(out) if out is not None else (where if where.is_dir() else where.parent) / "report.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, page.html(), SHARED_MODE)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): choose another --out") from error
    return target


def _page_of(where: Path) -> Page:
    if (where / "run.json").exists() or (where / "plan.json").exists():
        return run_page(where)
    try:
        collected = collect(where)
    except InputError as error:
        raise InputError(
            f"{where} is no run's directory and no sweep's ({error}): give what dpscale train or scaling printed"
        ) from error
    return sweep_page(collected, curves(collected))
