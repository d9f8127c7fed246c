"""The verbs of data: `dpscale data inspect` and `dpscale data convert`. They import no jax."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpscale.data.source import ExampleSource

Source = Annotated[str, typer.Argument(metavar="SRC", help="a data set, as data.train takes it")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[data.key=value]...", help="how it is read: data.image_size=224")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
LINE_EVERY_S = 10.0
WARNING = (
    "What follows is derived from the data, and no privacy guarantee covers it: it is for the "
    "owner's terminal, not for "
    "a shared log."
)

data_app = typer.Typer(help="Look at a data set, and convert it.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.add_typer(data_app, name="data")


@data_app.command()
def inspect(
    src: Source,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(min=1, help="measure reading with 1, 2, 4, .. up to so many threads")] = 2,
    check: Annotated[int, typer.Option(min=0, help="examples to look at, evenly spaced; 0: all of them")] = 1000,
    seconds: Annotated[float, typer.Option(min=0.0, help="of each measurement")] = 2.0,
    debug: Debug = False,
) -> int:
    """Say what a data set holds, how fast it is read, and what is wrong with it. Exit code 2 where something is.

    Example: dpscale data inspect /data/imagenet/train data.image_size=224 --threads 8
    """
    from dpscale.data.inspection import describe_source, look_through, read_rate

    typer.echo(WARNING, err=True)
    source = _open(src, overrides)
    for line in describe_source(source, Path(src).expanduser()):
        typer.echo(line)
    with _progress("looked at") as progress:
        found = look_through(source, check or None, threads, progress)
    for count in _thread_counts(threads):
        rate = read_rate(source, count, seconds)
        typer.echo(f"read rate         {rate:,.0f} examples/s, {count} thread{'s' if count > 1 else ''}")
    share = "all" if found.looked_at == len(source) else f"{found.looked_at:,} evenly spaced ones"
    if not found.wrong:
        typer.echo(f"problems          none in {share}")
        return 0
    typer.echo(f"problems          {found.wrong:,} of {found.looked_at:,} examples looked at")
    for problem in found.problems:
        typer.echo(f"  {problem}")
    return 2


@data_app.command()
def convert(
    src: Source,
    dst: Annotated[Path, typer.Argument(metavar="DST", help="a new folder, or one where this was interrupted")],
    overrides: Overrides = None,
    user_key: Annotated[
        str | None, typer.Option(help="keep each record's user too: what data.user_key would name in SRC")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads that read and decode")] = 4,
    debug: Debug = False,
) -> None:
    """Write a data set as ArrayRecord, decoded to its final size: fast to read in any order. Run it again to go on.

    Example: dpscale data convert /data/imagenet/train /data/imagenet-224 data.image_size=224 --threads 16
    """
    from dpscale.data.convert import convert as write
    from dpscale.data.users import read_user_ids

    source = _open(src, overrides)
    users = None if user_key is None else (user_key, read_user_ids(src, user_key))
    with _progress("converted") as progress:
        count = write(source, dst.expanduser(), users=users, num_threads=threads, progress=progress)
    typer.echo(f"{count:,} examples in {dst}, read back and compared: set data.train to it")


def _open(src: str, overrides: list[str] | None) -> ExampleSource:
    from dpscale.config import partial_config
    from dpscale.data.open import open_source
    from dpscale.data.options import SourceOptions

    return open_source(src, SourceOptions.from_config(partial_config(overrides or [], ("data",)).data))


def _thread_counts(most: int) -> list[int]:
    counts = [1]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return counts


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """`progress(done, total)`: a bar on a terminal, else a line now and then, on stderr."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= LINE_EVERY_S:
                shown = time.monotonic()
                typer.echo(f"{what} {done:,} of {total:,}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
