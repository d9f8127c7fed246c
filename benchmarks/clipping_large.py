"""Examples per second of each method, each at the largest physical batch that it fits into the device's memory.

    python benchmarks/clipping_large.py                       # on a GPU: ViT-B/16 and BERT-base, three precisions
    python benchmarks/clipping_large.py vit_tiny16 --precisions float32 --gib 2 --repeats 3

Batches are found by compiling, as in clipping_memory.py, for 80 % of the memory and to within 10 %; then all methods
take turns. A ratio is to plain SGD's examples per second in the same precision. "tf32" and "float32" say how float32
products are rounded, which on a CPU is the same. Writes benchmarks/results/clipping-large-MODEL.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clipping_memory import largest
from machine import machine

from dpscale.bench import BASELINE, METHODS, bench_task, made_up_rows, summed_step, values_of
from dpscale.config import partial_config
from dpscale.physical_batch import USABLE_FRACTION, free_bytes, program_bytes
from dpscale.turns import in_turn

RESULTS = Path(__file__).parent / "results"
PRECISIONS = {
    "float32": ("float32", "highest"),
    "tf32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", "tensorfloat32"),
}
"""performance.compute_dtype, and how float32 products are rounded."""


def measure(
    model: str, precision: str, methods: list[str], limit: int, size: int | None, repeats: int
) -> dict[str, Any]:
    """For each method: rows of its largest batch, seconds a step, examples per second, and their ratio to SGD's."""
    dtype, products = PRECISIONS[precision]
    config = partial_config([f'model.name="{model}"', f'performance.compute_dtype="{dtype}"'], ("model", "performance"))
    with jax.default_matmul_precision(products):
        task, metadata = bench_task(config, size, classes=100)
        values, calls, rows = values_of(task), dict[str, Callable[[], object]](), dict[str, int]()

        def arguments(count: int) -> tuple[Any, ...]:
            keys = jax.random.split(jax.random.key(0), count) if task.uses_key else None
            return values, jax.tree.map(jnp.asarray, made_up_rows(metadata, count)), keys

        for method in methods:
            program = jax.jit(summed_step(method, task))

            def needed(count: int, program: Any = program) -> int:
                return program_bytes(program.lower(*jax.eval_shape(lambda: arguments(count))).compile())

            rows[method] = largest(needed, limit, precision=0.1)
            if rows[method]:
                given = arguments(rows[method])
                compiled = program.lower(*given).compile()
                calls[method] = lambda compiled=compiled, given=given: jax.block_until_ready(compiled(*given))
        if not rows[BASELINE]:
            raise SystemExit(f"not one row of {model}'s plain step fits into {limit:,} bytes: give more by --gib")
        seconds = {method: statistics.median(times) for method, times in in_turn(calls, repeats).items()}
    rates = {method: rows[method] / seconds[method] if method in seconds else 0.0 for method in methods}
    return {
        method: {
            "rows": rows[method],
            "seconds": seconds.get(method),
            "examples_per_s": rates[method],
            "of_sgd": rates[method] / rates[BASELINE],
        }
        for method in methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["vit_b16", "bert_base"], metavar="MODEL", help="of docs/models.md"
    )
    methods = [method for method in METHODS if method != "bookkeeping"]  # which is what auto chooses here
    parser.add_argument("--methods", nargs="+", default=methods, choices=METHODS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--gib", type=float, help="memory of the device; default: what it has free")
    parser.add_argument("--size", type=int, help="pixels a side (default 224), or tokens (128)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    limit = int(USABLE_FRACTION * (free_bytes() if arguments.gib is None else arguments.gib * 2**30))
    methods = [BASELINE, *(method for method in arguments.methods if method != BASELINE)]
    for model in arguments.models:
        found = {}
        for precision in arguments.precisions:
            found[precision] = measure(model, precision, methods, limit, arguments.size, arguments.repeats)
            for method, x in found[precision].items():
                rate = f"{x['examples_per_s']:10.1f} examples/s  x{x['of_sgd']:.2f}"
                print(f"{model:12s} {precision:9s} {method:12s} {x['rows']:7,d} rows {rate}", flush=True)
            if not arguments.no_write:
                about = {"machine": machine(), "device": jax.devices()[0].device_kind, "limit_bytes": limit}
                about |= {"repeats": arguments.repeats, "model": model, "precisions": found}
                (RESULTS / f"clipping-large-{model}.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
