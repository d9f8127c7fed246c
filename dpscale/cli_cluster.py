"""The verbs of the cluster: submit, status, logs, stop, resume, doctor. Only the last one imports jax."""

from __future__ import annotations

import codecs
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dpscale.errors import InputError

if TYPE_CHECKING:
    from launch.submission import Submission

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")]
Nodes = Annotated[int, typer.Option(min=1, help="nodes")]
Gpus = Annotated[int | None, typer.Option(help="GPUs on each node; default: the profile's")]
Tasks = Annotated[int | None, typer.Option(min=1, help="processes on each node; default: one for each GPU")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs for each process")]
ProfileName = Annotated[str, typer.Option(help="site profile: a name, or a .toml file")]
ViaOption = Annotated[Literal["submitit", "sbatch"], typer.Option(help="what submits")]
SbatchArgs = Annotated[list[str] | None, typer.Option("--sbatch-arg", help="further option: --mail-type=FAIL")]
SrunArgs = Annotated[list[str] | None, typer.Option("--srun-arg", help="further option: --cpu-bind=cores")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the script and change nothing")]
FOLLOW_POLL_S = 0.5


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (submit, status, logs, stop, resume, doctor):
        app.command()(verb)


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="the TOML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    cpus_per_task: Cpus = None,
    time_limit: Annotated[str, typer.Option("--time", help="limit of one job: 8:00:00, 2-00:00:00")] = "1:00:00",
    profile: ProfileName = "generic",
    via: ViaOption = "submitit",
    run_dir: Annotated[Path | None, typer.Option(help="where the run lives; default runs/NAME")] = None,
    new_attempt: Annotated[bool, typer.Option(help="go on although the program changed; charged on top")] = False,
    sbatch_arg: SbatchArgs = None,
    srun_arg: SrunArgs = None,
    sweep: Annotated[list[str] | None, typer.Option(help="a job array: optimizer.learning_rate=0.1,0.3,1")] = None,
    dry_run: DryRun = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Submit a run to SLURM; it saves, comes back and goes on by itself until it has finished.

    Example: dpscale submit configs/quickstart.toml --nodes 20 --gpus-per-node 4 --time 8:00:00 --profile mysite
    """
    from dpscale.config import load_config
    from launch.submission import Submission
    from launch.submit import submit_run, what_next

    asked = Submission(
        nodes,
        time_limit,
        gpus_per_node,
        tasks_per_node,
        cpus_per_task,
        profile,
        via,
        tuple(sbatch_arg or ()),
        tuple(srun_arg or ()),
    )
    if sweep:
        base = None if run_dir is None else _absolute(run_dir)
        _submit_sweep(config, overrides or [], base, asked, sweep, dry_run=dry_run)
        return
    parsed = load_config(config, overrides or [])
    where = _absolute(run_dir or Path("runs") / parsed.run.name)
    job, script = submit_run(parsed, where, asked, new_attempt=new_attempt, dry_run=dry_run)
    for line in [script] if job is None else what_next(where, job):
        typer.echo(line)


def _submit_sweep(
    config: str, overrides: list[str], base: Path | None, asked: Submission, sweep: list[str], *, dry_run: bool
) -> None:
    from launch.sweep import submit_sweep

    job, script, runs = submit_sweep(config, overrides, base, asked, sweep, dry_run=dry_run)
    if job is None:
        typer.echo(script)
        return
    typer.echo(f"job array {job}, {len(runs)} runs")
    for index, where in enumerate(runs):
        typer.echo(f"{job}_{index}  {where}")
    typer.echo("choosing among them by private results is not covered by any one run's epsilon (docs/privacy.md)")


def status(
    run: RunDir, debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False
) -> None:
    """Show state, step, epsilon spent, last checkpoint, restarts and why.

    Example: dpscale status runs/quickstart
    """
    from launch.status import status_lines

    for line in status_lines(_absolute(run)):
        typer.echo(line)


def logs(
    run: RunDir,
    rank: Annotated[int | None, typer.Option(min=0, help="of this process; default: process 0")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on printing what is added, until Ctrl-C")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Print what a process of the newest job wrote.

    Example: dpscale logs runs/quickstart --rank 3 -f
    """
    from launch.status import log_files

    where, shown = _absolute(run), 0
    path = log_files(where, rank)[-1]
    text = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        # Asked before reading: what was written until then is shown, and no line of the old file is left out.
        newest, finished = log_files(where, rank)[-1], (where / "finished").exists()
        with path.open("rb") as file:
            file.seek(shown)
            data = file.read()
        shown += len(data)
        typer.echo(text.decode(data, final=not follow), nl=False)
        if not follow or (finished and newest == path and not data):
            return
        if newest != path:  # the job came back: its new incarnation has a file of its own
            path, shown = newest, 0
        else:
            time.sleep(FOLLOW_POLL_S)


def stop(
    run: RunDir, debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False
) -> None:
    """Ask a run to save and leave, and not to come back.

    Example: dpscale stop runs/quickstart
    """
    from launch import slurm_commands
    from launch.status import require_run
    from launch.submission import jobs_of

    where = _absolute(run)
    require_run(where)
    if (where / "finished").exists():
        typer.echo(f"{where} has finished: nothing to stop")
        return
    (where / "STOP").touch(mode=0o600)
    live = slurm_commands.live_jobs(jobs_of(where)[-1:])
    for job, state in live.items():
        if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            slurm_commands.run(["scancel", job])
            typer.echo(f"job {job} was waiting: cancelled")
        else:
            typer.echo(f"job {job} is {state.lower()}: it saves at the end of its step, and leaves")
    if not live:
        typer.echo("no job of this run is known to SLURM; a run started by hand finds the STOP file within a second")


def resume(
    run: RunDir,
    nodes: Annotated[int | None, typer.Option(min=1, help="another number is fine; default: as before")] = None,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    time_limit: Annotated[str | None, typer.Option("--time", help="limit of one job; default: as before")] = None,
    profile: Annotated[str | None, typer.Option(help="site profile; default: as before")] = None,
    via: Annotated[Literal["submitit", "sbatch"] | None, typer.Option(help="default: as before")] = None,
    new_attempt: Annotated[bool, typer.Option(help="go on although the program changed; charged on top")] = False,
    dry_run: DryRun = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Submit a run again, from its newest checkpoint, on as many processes as you like.

    Example: dpscale resume runs/quickstart --nodes 10
    """
    from dpscale.config import load_config
    from launch.status import require_run
    from launch.submission import Submission, last_submission
    from launch.submit import submit_run, what_next

    where = _absolute(run)
    require_run(where)
    if not (where / "run.json").exists():
        raise InputError(f"{where} has not started yet: there is nothing to go on from. Use dpscale submit")
    if (where / "finished").exists():
        raise InputError(f"{where} has finished: there is nothing to go on with")
    before = last_submission(where) or Submission(1, "1:00:00", None, None, None, "generic", "submitit")
    changes = {
        "nodes": nodes,
        "time": time_limit,
        "gpus_per_node": gpus_per_node,
        "tasks_per_node": tasks_per_node,
        "profile": profile,
        "via": via,
    }
    asked = replace(before, **{name: value for name, value in changes.items() if value is not None})
    config = load_config(where / "config.toml")
    job, script = submit_run(config, where, asked, new_attempt=new_attempt, dry_run=dry_run)
    for line in [script] if job is None else what_next(where, job):
        typer.echo(line)


def doctor(
    directory: Annotated[Path, typer.Option(help="where runs will live")] = Path("runs"),
    nodes: Annotated[int | None, typer.Option(min=1, help="ask SLURM, and look from that many nodes")] = None,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    profile: ProfileName = "generic",
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> int:
    """Say whether this node, or a job on several, is fit to train: every finding with its remedy.

    Example: dpscale doctor --nodes 2 --gpus-per-node 4 --profile mysite
    """
    where = _absolute(directory)
    if nodes is None:
        from launch.doctor import examine

        return examine(where, typer.echo)
    from launch.doctor_job import run_on_nodes

    return run_on_nodes(where, nodes, gpus_per_node, tasks_per_node, profile)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
