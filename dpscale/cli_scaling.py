"""The verbs of scaling (submit, measure, curves, predict) and report. Only what runs in a measurement imports jax."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpscale.errors import InputError

scaling_app = typer.Typer(help="Strong and weak scaling: measured, explained, predicted.", no_args_is_help=True)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="the TOML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="set single keys")]
Out = Annotated[Path | None, typer.Option(help="the sweep's directory; default runs/NAME-scaling")]
Modes = Annotated[str, typer.Option("--mode", help="strong (one logical batch), weak (it grows with the devices)")]
Compare = Annotated[str, typer.Option("--compare", help="measured in turn in each job: private,nonprivate")]
Windows = Annotated[int, typer.Option(min=1, help="timed windows of each kind, in turn")]
Steps = Annotated[int, typer.Option(min=1, help="logical steps in a window")]
Cores = Annotated[int, typer.Option("--cores-per-process", min=0, help="keep each process to so many cores; 0: do not")]
Public = Annotated[bool, typer.Option("--public-data", help="I declare the config's data public")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (submit, measure, curves, predict):
        scaling_app.command()(verb)
    app.add_typer(scaling_app, name="scaling")
    app.command()(report)


def submit(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="numbers of devices, one process each: 1,2,4 or 1..64")] = "1,2,4,8",
    mode: Modes = "strong,weak",
    compare: Compare = "private,nonprivate",
    repeats: Annotated[int, typer.Option(min=1, help="jobs for each point")] = 3,
    profile: Annotated[str, typer.Option(help="site profile: a name, or a .toml file")] = "generic",
    via: Annotated[Literal["submitit", "sbatch"], typer.Option(help="what submits")] = "submitit",
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="default: the profile's; 0: CPU processes")] = None,
    per_node: Annotated[int | None, typer.Option(min=1, help="processes on a node without GPUs")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPUs for each process")] = None,
    time_limit: Annotated[str, typer.Option("--time", help="limit of one job")] = "0:30:00",
    windows: Windows = 5,
    steps: Steps = 8,
    cores_per_process: Cores = 0,
    one_at_a_time: Annotated[bool, typer.Option(help="jobs of the sweep wait for each other")] = False,
    order_seed: Annotated[int, typer.Option(help="of the random order of the points")] = 0,
    public_data: Public = False,
    sbatch_arg: Annotated[list[str] | None, typer.Option(help="further option: --mail-type=FAIL")] = None,
    srun_arg: Annotated[list[str] | None, typer.Option(help="further option: --cpu-bind=cores")] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the points and one script; change nothing")] = False,
    debug: Debug = False,
) -> None:
    """Submit every point of a sweep as a SLURM job, in random order; each writes its records into the sweep.

    The same command again submits the points that have no record yet.

    Example: dpscale scaling submit configs/quickstart.toml --gpus 1,2,4,8,16 --repeats 3 --profile mysite
    """
    from dpscale.config import load_config
    from dpscale.scaling.job import Wanted, submit_sweep
    from dpscale.scaling.point import MODES, VARIANTS, parse_counts, parse_names
    from launch.submission import Submission

    parsed = load_config(config, overrides or [])
    wanted = Wanted(
        devices=tuple(parse_counts(gpus)),
        modes=parse_names(mode, MODES, "--mode"),
        variants=parse_names(compare, VARIANTS, "--compare"),
        repeats=repeats,
        per_node=per_node,
        windows=windows,
        steps=steps,
        cores=cores_per_process,
        declared_public=public_data,
        one_at_a_time=one_at_a_time,
        order_seed=order_seed,
    )
    arguments = (tuple(sbatch_arg or ()), tuple(srun_arg or ()))
    asked = Submission(1, time_limit, gpus_per_node, 1, cpus_per_task, profile, via, *arguments)
    where = _absolute(out or Path("runs") / f"{parsed.run.name}-scaling")
    jobs = submit_sweep(parsed, where, wanted, asked, dry_run=dry_run)
    if not jobs:
        typer.echo("every point has its records: nothing to submit")
    if dry_run and jobs:
        typer.echo(jobs[0].script)
    for job in jobs:
        number = "not submitted" if job.job is None else f"job {job.job}"
        typer.echo(f"{job.setting.name:<24} {'+'.join(job.setting.modes):<12} {number}")
    if not dry_run:
        typer.echo(f"sweep   {where}")
        typer.echo(f"look    dpscale scaling curves {_short(where)}")


def measure(
    config: Config,
    overrides: Overrides = None,
    mode: Modes = "strong,weak",
    compare: Compare = "private,nonprivate",
    base: Annotated[int, typer.Option(min=1, help="devices at which the logical batch is the config's (weak)")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="which repeat this is: its records get that number")] = 1,
    local_processes: Annotated[int, typer.Option(min=1, help="processes on this machine, joined by jax")] = 1,
    windows: Windows = 5,
    steps: Steps = 8,
    cores_per_process: Cores = 0,
    checkpoint: Annotated[bool, typer.Option(help="also time one checkpoint")] = True,
    public_data: Public = False,
    out: Out = None,
    debug: Debug = False,
) -> int:
    """Measure one point on the devices that are here, alone or under srun, on made-up or public data.

    With both modes, the weak point is measured after the strong one where they differ.

    Example: dpscale scaling measure configs/quickstart.toml --local-processes 2 --cores-per-process 1
    """
    from dpscale.config import load_config
    from dpscale.scaling.by_hand import measure_by_hand
    from dpscale.scaling.options import Effort
    from dpscale.scaling.point import MODES, VARIANTS, parse_names

    parsed = load_config(config, overrides or [])
    return measure_by_hand(
        parsed,
        config,
        tuple(overrides or ()),
        _absolute(out or Path("runs") / f"{parsed.run.name}-scaling"),
        modes=parse_names(mode, MODES, "--mode"),
        variants=parse_names(compare, VARIANTS, "--compare"),
        base=base,
        repeat=repeat,
        local_processes=local_processes,
        effort=Effort(windows, steps, checkpoint),
        cores=cores_per_process,
        declared_public=public_data,
    )


def curves(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="the sweep's directory, or one of records")],
    compare: Annotated[list[Path] | None, typer.Option(help="another sweep, drawn beside it; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="where to; default SWEEP/curves")] = None,
    png: Annotated[bool, typer.Option(help="also write PNG files")] = True,
    debug: Debug = False,
) -> None:
    """Collect the records that are there into a table, plots (SVG, PNG), CSV, JSON and one HTML page.

    Example: dpscale scaling curves runs/quickstart-scaling --compare runs/old-scaling
    """
    from dpscale.scaling.curves import curves as computed
    from dpscale.scaling.curves import table_lines
    from dpscale.scaling.output import write_curves
    from dpscale.scaling.sweep import collect

    collected = collect(sweep)
    found, others = computed(collected), [computed(collect(other)) for other in compare or []]
    for line in table_lines(found):
        typer.echo(line)
    folder = out or (sweep if sweep.is_dir() else sweep.parent) / "curves"
    typer.echo(f"written to {write_curves(collected, found, others, folder, png=png)}")


def predict(
    source: Annotated[Path | None, typer.Argument(metavar="[SWEEP-OR-RECORD]")] = None,
    gpus: Annotated[str, typer.Option(help="numbers of devices: 8..1024 (doublings) or 20,40,80")] = "8..1024",
    network: Annotated[
        str, typer.Option(help="network profile: puhti-v100, lumi-g, h100, localhost, or a .toml")
    ] = "h100",
    mode: Modes = "strong",
    batch_size: Annotated[
        float | None, typer.Option(help="logical batch (at the smallest count); default: measured")
    ] = None,
    physical_batch_size: Annotated[int | None, typer.Option(min=1, help="most rows on a device at once")] = None,
    examples_per_second: Annotated[float | None, typer.Option(help="ASSUMED: non-private, one device")] = None,
    private_ratio: Annotated[float, typer.Option(help="ASSUMED: private over non-private time of a row")] = 1.10,
    parameters: Annotated[int | None, typer.Option(min=1, help="with --examples-per-second: of the model")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="in the data set; default: measured, or 1281167")] = None,
    assumption: Annotated[str, typer.Option(help="where the assumed speed comes from")] = "no source given",
    update_sharding: Annotated[
        Literal["replicated", "sharded"] | None, typer.Option(help="noise and update on 1/devices; default: measured")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write JSON, plots and a page to this folder")] = None,
    debug: Debug = False,
) -> None:
    """Predict DP-SGD and SGD on any number of devices, from one device's times and a model of the network.

    Example: dpscale scaling predict runs/vit-scaling --gpus 8..1024 --network h100
    """
    from dpscale.scaling.forecast import Asked, forecast
    from dpscale.scaling.output import write_prediction
    from dpscale.scaling.point import MODES, parse_counts, parse_names
    from dpscale.scaling.prediction_text import prediction_lines

    asked = Asked(
        counts=tuple(parse_counts(gpus)),
        modes=parse_names(mode, MODES, "--mode"),
        network=network,
        batch=batch_size,
        physical_batch_size=physical_batch_size,
        examples_per_s=examples_per_second,
        private_ratio=private_ratio,
        num_parameters=parameters,
        num_examples=examples,
        assumption=assumption,
        update_sharding=update_sharding,
    )
    found, measured = forecast(source, asked)
    for line in prediction_lines(found):
        typer.echo(line)
    if out is not None:
        typer.echo(f"written to {write_prediction(found, measured, out)}")


def report(
    where: Annotated[Path, typer.Argument(metavar="RUN|SWEEP", help="a run's or a sweep's directory")],
    out: Annotated[Path | None, typer.Option(help="the file; default report.html in it")] = None,
    debug: Debug = False,
) -> None:
    """Write a run or a scaling sweep as one HTML page that needs no network.

    Example: dpscale report runs/quickstart --out quickstart.html
    """
    from dpscale.report import write_report

    if not where.exists():
        raise InputError(f"{where} does not exist: give the directory of a run or of a sweep")
    typer.echo(write_report(where, out))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
