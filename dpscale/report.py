"""A run or a scaling sweep as one self-contained HTML page. Reads public files only; imports no jax."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpscale.config import load_config
from dpscale.data.builtin import BUILTIN
from dpscale.durable import write_atomically
from dpscale.errors import DpscaleError, InputError
from dpscale.metrics.plot import draw_run, latest
from dpscale.metrics.records import Record, read_records
from dpscale.metrics.status import read_status
from dpscale.page import Page, inline_svg
from dpscale.privacy.card import ACCOUNTANTS, USER, relation_words, unit_name, unit_words
from dpscale.privacy.shown import shown_epsilon
from dpscale.scaling.curves import Curves, curves, law_text, overhead_text
from dpscale.scaling.environment import machine
from dpscale.scaling.fits import Interval
from dpscale.scaling.plots import Draw, prediction_figures, scaling_figures, to_svg
from dpscale.scaling.point import MODES, Mode
from dpscale.scaling.predict import LABELS, PUBLISHED_TEXT, Prediction, fit_lines
from dpscale.scaling.record import PARTS_METHOD
from dpscale.scaling.sweep import Collected, collect

SHARED_MODE = 0o644
NO_PLOTS = (
    "The plots need matplotlib, which was not installed when this page was written: pip install 'dpscale[plots]'."
)
MOST_ROWS = 12


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


def run_page(run: Path) -> Page:
    """The page of a run."""
    plan, status = _json(run / "plan.json"), read_status(run) or {}
    records = read_records(run / "metrics" / "public.jsonl")
    config = load_config(run / "config.toml") if (run / "config.toml").exists() else None
    seeded = config is not None and config.privacy.insecure_seed is not None
    status |= {"guarantee": False} if seeded else {}
    name = config.run.name if config else run.name
    state = {"finished": "finished", "stopped": "stopped, to be continued"}.get(status.get("state", ""), "under way")
    page = Page(name, f"A training run of dpscale, {state}. Written {_now()}.")
    page.facts(_run_facts(plan, status, records))
    if seeded:
        page.note("A fixed seed was used in place of a secret: this run has NO privacy guarantee.")
    _run_curves(page, run, plan, records)
    page.section("Privacy")
    _privacy(page, plan, status)
    page.section("Time of a step")
    page.text(
        "Not shown: the time of a step follows the number of drawn records, which is private. "
        "dpscale scaling measure splits it on made-up rows of the same shape."
    )
    page.section("What ran")
    if config is not None:
        page.pairs(_what_ran(config))
    page.section("Environment")
    page.pairs(_environment(run))
    return page


def sweep_page(
    collected: Collected, found: Curves, others: Sequence[Curves] = (), prediction: Prediction | None = None
) -> Page:
    """The page of a scaling sweep."""
    page = Page(f"Scaling of {found.name}", f"Measured on {found.where}. Written {_now()}.")
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
    page.text(PARTS_METHOD)
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
    page = Page(f"Predicted scaling, {found.network}", f"Written {_now()}.")
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
    except InputError:
        page.text(NO_PLOTS)


def _run_facts(plan: dict[str, Any], status: dict[str, Any], records: Sequence[Record]) -> dict[str, str]:
    facts: dict[str, str] = {}
    accuracy = [record["validation_accuracy"] for record in records if record.get("validation_accuracy") is not None]
    if accuracy:
        facts["held-out accuracy"] = f"{100 * float(accuracy[-1] or 0):.1f} %"
    if not status.get("guarantee", True):
        facts["privacy"] = "NONE (fixed seed)"
    elif plan.get("enabled", True):
        epsilon = status.get("epsilon")
        facts["epsilon spent"] = "-" if epsilon is None else shown_epsilon(epsilon)
        facts["delta"] = f"{plan.get('delta') or 0:g}"
    else:
        facts["privacy"] = "none"
    facts["steps done"] = f"{status.get('step', 0)} of {plan.get('steps', '?')}"
    return facts


def _run_curves(page: Page, run: Path, plan: dict[str, Any], records: Sequence[Record]) -> None:
    page.section("Accuracy and epsilon along the run")
    if not records:
        page.text("Nothing is public yet: metrics appear with the first checkpoint after an evaluation.")
        return
    drawn, source = run / "plot.svg", run / "metrics" / "public.jsonl"
    try:
        if drawn.exists() and drawn.stat().st_mtime >= source.stat().st_mtime:
            svg = drawn.read_text(encoding="utf-8")
        else:
            svg = draw_run(run, epsilon_allowed=plan.get("epsilon_target"), kind="svg").decode()
        page.figures({"accuracy and epsilon against steps": inline_svg(svg)})
    except DpscaleError:
        page.text(NO_PLOTS)
    records = latest(list(records))
    shown = records[:: -max(1, -(-len(records) // MOST_ROWS))][::-1]  # the last one always
    names = ("step", "epsilon", "validation_accuracy", "validation_loss", "learning_rate")
    names = [name for name in names if any(record.get(name) is not None for record in shown)]
    page.table([name.replace("_", " ") for name in names], [[_number(r.get(n)) for n in names] for r in shown])


def _privacy(page: Page, plan: dict[str, Any], status: dict[str, Any]) -> None:
    if not plan.get("enabled", True):
        page.note("This run had no privacy: nothing was clipped and no noise was added.")
        return
    spent, delta, unit = status.get("epsilon"), plan.get("delta") or 0.0, plan.get("unit", "example")
    if not status.get("guarantee", True):
        page.text("A fixed seed stands in place of the secret: whoever knows it can take the noise away again.")
    elif spent is not None and status.get("state") == "finished":
        page.text(
            f"The training is ({shown_epsilon(spent)}, {delta:g})-differentially private for one {unit_name(unit)}, "
            "by the ledger of every step that was charged."
        )
    elif spent is not None:
        page.text(
            f"The run has not finished. For what is charged now, it is ({shown_epsilon(spent)}, {delta:g})-"
            f"differentially private for one {unit_name(unit)} if it was decided in advance that it ends here; if it "
            "ends here because of what its results look like, the epsilon of its planned end counts."
        )
    relation, accountant = plan.get("neighboring_relation", ""), plan.get("accountant", "")
    page.pairs(
        {
            "protected": unit_words(unit, plan.get("max_examples_per_user")),
            "neighbouring data sets": relation_words(relation, unit) if relation else "-",
            "laws checked at the last start": _checked(status),
            "sampling": f"Poisson, rate {plan.get('sampling_rate', 0):.6g}",
            **_sizes(plan),
            "noise multiplier": f"{plan.get('noise_multiplier', 0):.4f}",
            "clip norm": f"{plan.get('clip_norm') or 0:g} ({plan.get('bound')})",
            "accountant": ACCOUNTANTS.get(accountant, accountant),
            "allowed epsilon": "not set" if plan.get("epsilon_target") is None else f"{plan['epsilon_target']:g}",
        }
    )
    page.text("What the statement covers, and what not, is in docs/privacy.md.")


def _sizes(plan: dict[str, Any]) -> dict[str, object]:
    """What gives the number of records away, where that is public: not when records may be added or removed."""
    if plan.get("neighboring_relation") == "add_or_remove":
        return {}
    each = "users" if plan.get("unit") == USER else "records"
    return {each: plan.get("num_examples", "-"), "expected batch": f"{plan.get('expected_batch_size', 0):g}"}


def _checked(status: dict[str, Any]) -> str:
    laws = status.get("verified_laws")
    return "no" if laws is None else f"{laws} held on the run's own processes and devices, before its first step"


def _named(spec: str) -> str:
    """A data set's own name: the page may be shared, and where private files lie may not."""
    built_in = spec.startswith("made_up:") or spec.partition("/")[0] in BUILTIN
    return spec if built_in else Path(spec).name


def _what_ran(config: Any) -> dict[str, object]:
    options = ", ".join(f"{name} {value}" for name, value in config.model.options.items())
    held_out = f"{_named(config.data.validation)} ({config.data.validation_is})" if config.data.validation else "none"
    return {
        "training data": _named(config.data.train) if config.data.train else "given from Python",
        "held-out data": held_out,
        "model": config.model.name + (f" ({options})" if options else ""),
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "schedule": config.optimizer.schedule,
        "physical batch": config.performance.physical_batch_size,
        "compute dtype": config.performance.compute_dtype,
    }


def _environment(run: Path) -> dict[str, object]:
    """Of the newest attempt that wrote it down; else of the machine that writes the page."""
    found = sorted((run / "attempts").glob("*/env.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        here = machine()
        packages = here.pop("packages")
        return {
            "machine that wrote this page": f"{here['cpu']}, {here['cores']} cores",
            "Python": here["python"],
        } | packages
    values = _json(found[-1])
    packages = {name: version for name, version in values.get("packages", {}).items() if version}
    tasks = values.get("variables", {}).get("SLURM_STEP_NUM_TASKS", "1")
    return {"Python": values.get("python", "-"), "processes": tasks, **packages}


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


def _percents(interval: Interval) -> str:
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


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
