"""The largest physical batch of each method in a given memory.

    python benchmarks/clipping_memory.py [MODEL ...] [--methods auto ghost] [--gib 8]
    python benchmarks/clipping_memory.py --table   # what was found, as README's table

Nothing is run: each method is compiled for some batch sizes, and the compiler says what it needs for arguments, results
and temporaries. The largest size that fits is found to within 2 %. Writes benchmarks/results/clipping-memory.json; of
models that are not named, what is there stays.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from clipping import METHODS, step
from clipping_models import NAMES, workload
from machine import machine

from dpscale.physical_batch import program_bytes

RESULT = Path(__file__).parent / "results" / "clipping-memory.json"
PRECISION = 0.02
PROBES = (8, 16)


def needed_bytes(name: str, method: str) -> Callable[[int], int]:
    """What the step of the named model needs for a physical batch of so many rows."""
    work = workload(name, 1)
    function = jax.jit(step(method, work))

    def needed(rows: int) -> int:
        x, y = (jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for array in (work.inputs, work.targets))
        mask = jax.ShapeDtypeStruct((rows,), jnp.bool_)
        return program_bytes(function.lower(work.params, (x, y), mask).compile())

    return needed


def largest(needed: Callable[[int], int], limit: int, precision: float = PRECISION) -> int:
    """The largest number of rows whose bytes are within the limit, to within a share; 0 where not one row fits.

    Bytes are near a constant and a part for each row: the line through the last two sizes says where to look next.
    """
    seen = {rows: needed(rows) for rows in PROBES}
    while True:
        fits = max((rows for rows, size in seen.items() if size <= limit), default=0)
        too_many = min((rows for rows, size in seen.items() if size > limit and rows > fits), default=None)
        if too_many is not None and too_many - fits <= max(1, precision * fits):
            return fits
        (a, b), (c, d) = list(seen.items())[-2:]
        slope = (d - b) / (c - a)
        rows = int(a + (limit - b) / slope) if slope > 0 else 2 * max(seen)
        rows = max(rows, fits + max(1, int(precision * fits)))
        if too_many is not None:  # between both, wherever the line leads
            rows = min(rows, too_many - 1)
        seen[rows] = needed(rows)


def table() -> str:
    """README's table of the results that there are."""
    result = json.loads(RESULT.read_text())
    lines = ["| model | plain SGD | auto | ghost | materialize | jax_privacy |", "| --- " * 6 + "|"]
    for name in (name for name in NAMES if name in result["rows"]):
        seen = result["rows"][name]
        plain = max(rows for method, rows in seen.items() if method.startswith("sgd"))
        others = [f"{seen[x]:,}" for x in ("auto", "ghost", "materialize", "jax_privacy")]
        lines.append(f"| {name} | {plain:,} | " + " | ".join(others) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=NAMES, metavar="MODEL", help=", ".join(NAMES))
    methods = [method for method in METHODS if method != "bookkeeping"]  # which is what auto chooses here
    parser.add_argument("--methods", nargs="+", default=methods, choices=METHODS)
    parser.add_argument("--gib", type=float, default=8.0, help="memory of the device, in GiB")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--table", action="store_true", help="measure nothing: print README's table from the results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    for name in arguments.models:
        found = {}
        for method in arguments.methods:
            found[method] = largest(needed_bytes(name, method), int(arguments.gib * 2**30))
            print(f"{name:12s} {method:12s} {found[method]:8,d}", flush=True)
        if not arguments.no_write:
            known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            rows = known["rows"] if known.get("gib") == arguments.gib else {}
            about = {"machine": machine(), "device": jax.devices()[0].device_kind, "gib": arguments.gib}
            RESULT.write_text(json.dumps(about | {"rows": rows | {name: found}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
