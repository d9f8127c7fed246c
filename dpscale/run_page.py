"""The page of a training run: what its public stream, plan and status hold. Imports no jax."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpscale.config import load_config
from dpscale.data.builtin import BUILTIN
from dpscale.errors import InputError
from dpscale.metrics.plot import NoMatplotlibError, draw_run, latest
from dpscale.metrics.records import Record, read_records
from dpscale.metrics.status import read_status
from dpscale.page import NO_PLOTS, Page, inline_svg, written_at
from dpscale.privacy.card import ACCOUNTANTS, USER, relation_words, unit_name, unit_words
from dpscale.privacy.shown import shown_epsilon
from dpscale.scaling.environment import machine

MOST_ROWS = 12


def run_page(run: Path) -> Page:
    """The page of a run."""
    plan, status = _json(run / "plan.json"), read_status(run) or {}
    records = read_records(run / "metrics" / "public.jsonl")
    config = load_config(run / "config.toml") if (run / "config.toml").exists() else None
    seeded = config is not None and config.privacy.insecure_seed is not None
    status |= {"guarantee": False} if seeded else {}
    name = config.run.name if config else run.name
    state = {"finished": "finished", "stopped": "stopped, to be continued"}.get(status.get("state", ""), "under way")
    page = Page(name, f"A training run of dpscale, {state}. Written {written_at()}.")
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
    except NoMatplotlibError:
        page.text(NO_PLOTS)
    except InputError:
        page.text("There is neither an accuracy nor an epsilon to draw.")
    records = latest(list(records))
    shown = records[:: -max(1, -(-len(records) // MOST_ROWS))][::-1]  # the last one always
    names = ("step", "epsilon", "validation_accuracy", "validation_loss", "learning_rate")
    names = [name for name in names if any(record.get(name) is not None for record in shown)]
    page.table([name.replace("_", " ") for name in names], [[_number(n, r.get(n)) for n in names] for r in shown])


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


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "epsilon":
        return shown_epsilon(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"
