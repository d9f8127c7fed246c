"""The command line. jax and dp-accounting are imported by the verbs that need them; the others answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpscale.cli_audit import register as register_audit
from dpscale.cli_cluster import register as register_cluster
from dpscale.cli_data import register as register_data
from dpscale.cli_scaling import register as register_scaling
from dpscale.config import describe_keys, load_config
from dpscale.errors import InputError

app = typer.Typer(
    help="Differentially private training of JAX models, from a laptop to a SLURM cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
privacy_app = typer.Typer(help="The privacy calculator.", no_args_is_help=True)
app.add_typer(privacy_app, name="privacy")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="the TOML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="set single keys")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
AccountantOption = Annotated[Literal["pld", "rdp"], typer.Option(help="pld is tighter, rdp faster")]
RelationOption = Annotated[
    Literal["zero_out", "add_or_remove", "replace_one"],
    typer.Option("--relation", help="which data sets are neighbours"),
]
Rate = Annotated[float | None, typer.Option("--sampling-rate", "-q", help="q; or give --batch-size and --examples")]
BatchSize = Annotated[float | None, typer.Option(help="expected batch size")]
Examples = Annotated[int | None, typer.Option(help="number of examples")]
Steps = Annotated[int, typer.Option(help="logical steps")]
Delta = Annotated[float, typer.Option(help="delta, in (0, 1)")]


def _print_keys(wanted: bool) -> None:
    if wanted:
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
    from dpscale.plan_text import plan_lines
    from dpscale.simulate import simulation_lines

    parsed = load_config(config, overrides or [])
    if simulate_at is None:
        lines = plan_lines(parsed, measure=measure)
    else:
        lines = simulation_lines(parsed, simulate_at, given=[config, *(overrides or [])])
    for line in lines:
        typer.echo(line)


@privacy_app.command("epsilon")
def privacy_epsilon(
    noise_multiplier: Annotated[float, typer.Option(help="noise std over the clip norm")],
    steps: Steps,
    delta: Delta,
    sampling_rate: Rate = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    max_batch_size: Annotated[int | None, typer.Option(help="truncated Poisson sampling")] = None,
    accountant: AccountantOption = "pld",
    relation: RelationOption = "zero_out",
    debug: Debug = False,
) -> None:
    """epsilon of a noise multiplier.

    Example: dpscale privacy epsilon --noise-multiplier 1.1 --batch-size 256 --examples 60000 --steps 10000 --delta 1e-5
    """
    from dpscale.privacy.accounting import epsilon

    value = epsilon(
        noise_multiplier=noise_multiplier,
        sampling_rate=_sampling_rate(sampling_rate, batch_size, examples),
        steps=steps,
        delta=delta,
        accountant=accountant,
        neighboring_relation=relation,
        num_examples=examples,
        max_batch_size=max_batch_size,
    )
    typer.echo(f"epsilon {value:.4f} at delta {delta:g} ({accountant}, {relation})")


@privacy_app.command("noise")
def privacy_noise(
    epsilon: Annotated[float, typer.Option(help="allowed epsilon")],
    steps: Steps,
    delta: Delta,
    sampling_rate: Rate = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    max_batch_size: Annotated[int | None, typer.Option(help="truncated Poisson sampling")] = None,
    accountant: AccountantOption = "pld",
    relation: RelationOption = "zero_out",
    debug: Debug = False,
) -> None:
    """Smallest noise multiplier that keeps to an epsilon.

    Example: dpscale privacy noise --epsilon 3 --batch-size 1024 --examples 4500 --steps 150 --delta 1e-5
    """
    from dpscale.privacy.accounting import noise_multiplier

    value = noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        sampling_rate=_sampling_rate(sampling_rate, batch_size, examples),
        steps=steps,
        accountant=accountant,
        neighboring_relation=relation,
        num_examples=examples,
        max_batch_size=max_batch_size,
    )
    typer.echo(f"noise multiplier {value:.6f} for epsilon {epsilon:g} at delta {delta:g} ({accountant}, {relation})")


def _sampling_rate(rate: float | None, batch_size: float | None, examples: int | None) -> float:
    if rate is not None:
        if batch_size is not None:
            raise InputError("both --sampling-rate and --batch-size are given: give one of them")
        return rate
    if batch_size is None or not examples:
        raise InputError("the sampling rate is missing: give --sampling-rate, or --batch-size with --examples")
    return batch_size / examples


register_cluster(app)
register_audit(app)
register_data(app)
register_scaling(app)
