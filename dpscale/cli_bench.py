"""The verb bench: what each clipping method costs here, beside the same step without privacy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="set single keys")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(bench)


def bench(
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="a model of docs/models.md")] = "vit_tiny16",
    method: Annotated[str, typer.Option(help="all, or some of nonprivate,auto,bookkeeping,ghost,materialize")] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="examples in a step")] = 8,
    size: Annotated[int | None, typer.Option(min=1, help="pixels a side (default 224), or tokens (128)")] = None,
    classes: Annotated[int, typer.Option(min=2, help="outputs of a classifier")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="timed steps of each method, in turn")] = 5,
    out: Annotated[Path | None, typer.Option(help="also write the figures as JSON")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Time one accumulation of each clipping method on made-up rows, with ratios to the step without privacy.

    Example: dpscale bench --method all --model vit_b16 --batch-size 32 performance.compute_dtype=bfloat16
    """
    from dpscale.bench import METHODS, Cost, cost_lines
    from dpscale.bench import bench as measure
    from dpscale.config import partial_config
    from dpscale.durable import write_atomically

    config = partial_config([f'model.name="{model}"', *(overrides or [])], ("model", "performance"))
    methods = list(METHODS) if method == "all" else [name.strip() for name in method.split(",")]
    record = measure(config, methods, batch_size, size, classes, repeats)
    shape = " x ".join(map(str, record["features"]))
    typer.echo(f"{model}, {record['parameters']:,} parameters, {batch_size} examples of {shape}, {record['device']}")
    for line in cost_lines({name: Cost(**values) for name, values in record["methods"].items()}):
        typer.echo(line)
    if out is not None:
        write_atomically(out, json.dumps(record, indent=2).encode() + b"\n")
