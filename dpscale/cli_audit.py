"""The verbs that check the promise: verify and audit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dpscale.errors import InputError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="set single keys")]
Processes = Annotated[int, typer.Option(min=1, help="processes on this machine, joined by jax")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
POWER_RUNS = 10


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (verify, audit):
        app.command()(verb)


def verify(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="the TOML file of the run")],
    overrides: Overrides = None,
    local_processes: Processes = 1,
    debug: Debug = False,
) -> int:
    """Check clipping, noise and agreement of a config's own step on these processes and devices, with made-up rows.

    Reads no training example and charges nothing; ends with code 1 where a law does not hold. Under srun it uses the
    job's processes.

    Example: dpscale verify configs/quickstart.toml --local-processes 2
    """
    from dpscale.config import load_config
    from launch.runtime import TaskArguments

    load_config(config, overrides or [])  # every error is found before a process starts
    with tempfile.TemporaryDirectory(prefix="dpscale-verify-") as logs:
        return _run(TaskArguments(config, tuple(overrides or ()), logs, verb="verify"), local_processes)


def audit(
    what: Annotated[str, typer.Argument(metavar="RUN-OR-CONFIG", help="a run directory, or the TOML file of a run")],
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(min=2, help="records that become canaries")] = 1000,
    steps: Annotated[int | None, typer.Option(min=1, help="fewer than the plan's; the claim is for as many")] = None,
    confidence: Annotated[float, typer.Option(help="of the lower bound")] = 0.95,
    run_dir: Annotated[Path | None, typer.Option(help="the audit's own directory; default runs/NAME-audit")] = None,
    simulate: Annotated[bool, typer.Option(help="only show what such an audit would see of planted bugs")] = False,
    local_processes: Processes = 1,
    debug: Debug = False,
) -> int:
    """Train with canaries, and show an empirical lower bound on epsilon beside the claimed one.

    Uses a secret and a directory of its own, and throws the parameters away; of a run it reads config and plan. Ends
    with code 1 where the claim is refuted.

    Example: dpscale audit configs/quickstart.toml --canaries 1000
    """
    from dpscale.config import load_config
    from launch.runtime import TaskArguments

    config, plan, where = _config_of(what)
    parsed = load_config(config, overrides or [])
    if simulate:
        for line in _power(parsed, canaries, steps, confidence):
            typer.echo(line)
        return 0
    where = run_dir or where or Path("runs") / f"{parsed.run.name}-audit"
    options = [f"canaries={canaries}", f"confidence={confidence}"]
    options += [f"steps={steps}"] if steps is not None else []
    options += [f"plan={plan}"] if plan is not None else []
    arguments = TaskArguments(
        str(config), tuple(overrides or ()), os.path.abspath(where.expanduser()), verb="audit", options=tuple(options)
    )
    return _run(arguments, local_processes)


def _run(arguments, local_processes: int) -> int:
    from launch.local import run_locally
    from launch.runtime import run_task

    return run_task(arguments) if local_processes == 1 else run_locally(arguments, local_processes)


def _config_of(what: str) -> tuple[Path, Path | None, Path | None]:
    """(config, plan, directory for the audit) of a run directory; (config, None, None) of a config."""
    path = Path(what).expanduser()
    if not path.is_dir():
        return path, None, None
    if not (path / "config.toml").exists():
        raise InputError(f"{path} is a directory without a config.toml: give a run directory, or a config")
    path = Path(os.path.abspath(path))
    plan = path / "plan.json"
    return path / "config.toml", plan if plan.exists() else None, path.with_name(f"{path.name}-audit")


def _power(config, canaries: int, steps: int | None, confidence: float) -> list[str]:
    from dpscale.audit.bound import reach
    from dpscale.audit.power import power, power_lines
    from dpscale.audit.scores import SCORES
    from dpscale.privacy.plan import PrivacyPlan
    from dpscale.privacy.shown import shown_epsilon
    from dpscale.train import find_source

    plan = PrivacyPlan.from_config(config, num_examples=len(find_source(config, None, config.data.train, "train")))
    if not plan.enabled or plan.noise_multiplier == 0 or plan.delta is None:
        raise InputError("without clip or noise nothing is claimed: set privacy.enabled and privacy.epsilon to audit")
    count = min(steps or plan.steps, plan.steps)
    furthest = reach(canaries, plan.delta, (1 - confidence) / len(SCORES))
    head = (
        f"claimed epsilon {shown_epsilon(plan.epsilon_after(count))} after {count} steps; {canaries} canaries reach "
        f"{furthest:.3f}. "
        f"Mean lower bounds with {100 * confidence:g} % confidence over {POWER_RUNS} simulated audits:"
    )
    return [head, *power_lines(power(plan, canaries, count, confidence=confidence, runs=POWER_RUNS))]
