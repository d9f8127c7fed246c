"""The command line. jax and dp-accounting are imported by the verbs that need them; the others answer at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
import typer.main

from dpscale.cli_audit import register as register_audit
from dpscale.cli_bench import register as register_bench
from dpscale.cli_cluster import register as register_cluster
from dpscale.cli_data import register as register_data
from dpscale.cli_privacy import register as register_privacy
from dpscale.cli_scaling import register as register_scaling

app = typer.Typer(
    help="Differentially private training of JAX models, from a laptop to a SLURM cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="the TOML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="set single keys")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def _print_keys(wanted: bool) -> None:
    if wanted:
        from dpscale.config import describe_keys

        typer.echo(describe_keys())
        raise typer.Exit


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="where the run lives; default runs/NAME")] = None,
    local_processes: Annotated[int, typer.Option(min=1, help="processes on this machine, joined by jax")] = 1,
    new_attempt: Annotated[bool, typer.Option(help="go on although the program changed; charged on top")] = False,
    help_config: Annotated[
        bool, typer.Option("--help-config", callback=_print_keys, is_eager=True, help="list every key of CONFIG")
    ] = False,
    debug: Debug = False,
) -> int:
    """Train here, or go on from the last checkpoint in the run directory.

    Example: dpscale train configs/quickstart.toml privacy.epsilon=2 --run-dir runs/first
    """
    from dpscale.config import load_config
    from launch.runtime import TaskArguments, run_task

    parsed = load_config(config, overrides or [])  # every error is found before a process starts
    where = run_dir or Path("runs") / parsed.run.name
    arguments = TaskArguments(config, tuple(overrides or ()), str(where), new_attempt)
    if local_processes == 1:
        return run_task(arguments)
    from launch.local import run_locally

    return run_locally(arguments, local_processes)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option(help="compile and time one step on made-up rows")] = True,
    simulate_at: Annotated[
        str | None,
        typer.Option(metavar="batch=N", help="overrides for a cheap run at a small batch with the same dynamics"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show sampling rate, noise, steps, epsilon along the run, padding, memory and time, before anything runs.

    Example: dpscale plan configs/quickstart.toml privacy.epsilon=8
    Example: dpscale plan configs/quickstart.toml --simulate-at batch=256
    """
    from dpscale.config import load_config
    from dpscale.plan_text import plan_lines
    from dpscale.simulate import simulation_lines

    parsed = load_config(config, overrides or [])
    if simulate_at is None:
        lines = plan_lines(parsed, measure=measure)
    else:
        lines = simulation_lines(parsed, simulate_at, given=[config, *(overrides or [])])
    for line in lines:
        typer.echo(line)


register_cluster(app)
register_audit(app)
register_bench(app)
register_data(app)
register_privacy(app)
register_scaling(app)


def command_line(words: Sequence[str]) -> Callable[..., int | None]:
    """What is called for these words: the verb that they begin with, or all verbs where they name none.

    The options of a verb cost milliseconds to build, and the verbs that only ask SLURM shall answer at once.
    """
    named = [verb for verb in app.registered_commands if verb.callback and verb.callback.__name__ in words[:1]]
    chosen = copy.copy(app)
    if named:
        chosen.registered_commands, chosen.registered_groups = named, []
    return typer.main.get_group(chosen)
