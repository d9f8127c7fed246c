"""The verbs about privacy: the calculator (epsilon, noise), what runs have spent (show, sweep), and release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpscale.errors import InputError, PrivacyError

Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")]
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


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    privacy = typer.Typer(help="The privacy calculator, and what runs have spent.", no_args_is_help=True)
    for name, verb in {"epsilon": epsilon, "noise": noise, "show": show, "sweep": sweep}.items():
        privacy.command(name)(verb)
    app.add_typer(privacy, name="privacy")
    app.command()(release)


def epsilon(
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
    from dpscale.privacy import accounting
    from dpscale.privacy.shown import shown_epsilon

    value = accounting.epsilon(
        noise_multiplier=noise_multiplier,
        sampling_rate=_sampling_rate(sampling_rate, batch_size, examples),
        steps=steps,
        delta=delta,
        accountant=accountant,
        neighboring_relation=relation,
        num_examples=examples,
        max_batch_size=max_batch_size,
    )
    typer.echo(f"epsilon {shown_epsilon(value, 4)} at delta {delta:g} ({accountant}, {relation})")


def noise(
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


def show(
    run: RunDir,
    delta: Annotated[list[float] | None, typer.Option(help="also at this delta; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    debug: Debug = False,
) -> None:
    """Verify a run's ledger and show what was spent, repeated and charged on top; also while it runs.

    Example: dpscale privacy show runs/quickstart --delta 1e-6
    """
    from dpscale.run_record import read_run
    from dpscale.spending import OTHER_DELTAS, spending_json, spending_lines

    try:
        record = read_run(run)
    except PrivacyError as error:
        raise InputError(str(error)) from error  # exit code 2: what was given cannot be trusted
    own = [] if record.plan.delta is None else [record.plan.delta]
    deltas = [*own, *OTHER_DELTAS, *(delta or [])]
    if as_json:
        typer.echo(json.dumps(spending_json(record, deltas), indent=2))
        return
    for line in spending_lines(record, deltas):
        typer.echo(line)


def sweep(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="the runs of one search")],
    delta: Annotated[float | None, typer.Option(help="delta of the sum; default: the runs' own")] = None,
    accountant: AccountantOption = "pld",
    assume_same_data: Annotated[
        bool, typer.Option("--assume-same-data", help="compose although this cannot be shown")
    ] = False,
    debug: Debug = False,
) -> None:
    """epsilon of all runs of one search on the same data together.

    Example: dpscale privacy sweep runs/lr-0.1 runs/lr-0.3 runs/lr-1
    """
    from dpscale.search_cost import search_cost, search_lines

    try:
        cost = search_cost(runs, delta=delta, accountant=accountant, assume_same_data=assume_same_data)
    except PrivacyError as error:
        raise InputError(str(error)) from error
    for line in search_lines(cost):
        typer.echo(line)


def release(
    run: RunDir,
    out: Annotated[Path, typer.Option("--out", help="a new directory")],
    statements: Annotated[
        list[str] | None,
        typer.Argument(metavar="[privacy.KEY=VALUE]...", help="public_data_used, hyperparameter_search"),
    ] = None,
    step: Annotated[int | None, typer.Option(help="of this checkpoint; default: the newest")] = None,
    destroy_secret: Annotated[
        bool, typer.Option("--destroy-secret", help="end the run for good: nobody can undo its noise any more")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write weights, model config and privacy card to a new directory; nothing else of the run leaves.

    Example: dpscale release runs/a privacy.public_data_used=none privacy.hyperparameter_search=none --out model
    """
    from dpscale.release import release as write_release

    write_release(run, out, step=step, destroy_secret=destroy_secret, statements=statements or [], report=typer.echo)
