"""What clipping costs: time, temporary memory and compile time of each method and peer, next to plain SGD.

    python benchmarks/clipping.py [MODEL ...] [--methods auto ghost] [--repeats 7]
    python benchmarks/clipping.py --table          # what was measured, as README's table

All methods of a model are run in turn (A B C A B C ...), after a warm-up; a figure is the median, and its ratio is to
the faster of two SGD steps: the gradient of the vmapped loss and of the loss written for a batch. Writes
benchmarks/results/clipping-MODEL.json. Opacus is measured by benchmarks/peers/clipping_opacus.py.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clipping_models import NAMES, Workload, workload
from machine import machine

from dpscale.bench import Cost, compare, cost_lines
from dpscale.clipping import clipped_grad

RESULTS = Path(__file__).parent / "results"
METHODS = ("sgd-vmapped", "sgd-batched", "auto", "bookkeeping", "ghost", "materialize", "jax_privacy")


def step(method: str, work: Workload) -> Callable[..., Any]:
    """(params, batch, mask) -> the (clipped) gradient sum."""
    if method == "sgd-vmapped":
        losses = jax.vmap(work.loss, (None, 0))
        return lambda p, batch, mask: jax.grad(lambda q: jnp.sum(jnp.where(mask, losses(q, batch), 0)))(p)
    if method == "sgd-batched":
        return lambda p, batch, mask: jax.grad(lambda q: jnp.sum(jnp.where(mask, work.batch_losses(q, batch), 0)))(p)
    if method == "jax_privacy":
        from jax_privacy import clipping

        peer = clipping.clipped_grad(work.loss, l2_clip_norm=1.0, keep_batch_dim=False)
        return lambda p, batch, mask: peer(p, batch, is_padding_example=~mask)
    clipped = clipped_grad(work.loss, 1.0, method)  # type: ignore[arg-type]
    return lambda p, batch, mask: clipped(p, batch, mask).grad_sum


def measure(name: str, methods: list[str], repeats: int, batch: int | None) -> dict[str, Any]:
    work = workload(name, batch)
    arguments = (work.params, (work.inputs, work.targets), jnp.ones(work.inputs.shape[0], bool))
    plain = [method for method in methods if method.startswith("sgd")]
    costs = compare({method: step(method, work) for method in methods}, arguments, repeats, plain or methods[:1])
    fastest = min(plain or methods[:1], key=lambda method: costs[method].time_s)
    record = {"model": name, "batch": work.inputs.shape[0], "fastest_sgd": fastest}
    return record | {"methods": {method: asdict(cost) for method, cost in costs.items()}}


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, batch {result['batch']}, against {result['fastest_sgd']}")
    for line in cost_lines({method: Cost(**values) for method, values in result["methods"].items()}):
        print("  " + line, flush=True)


def table(names: list[str]) -> str:
    """README's table of the results that there are. Opacus is compared with PyTorch's own plain step."""
    head = "model, batch | auto: time | memory | ghost: time | memory | materialize | jax_privacy | Opacus hooks, ghost"
    lines = [f"| {head} |", "| --- " * 8 + "|"]
    for name in names:
        path, peer = RESULTS / f"clipping-{name}.json", RESULTS / f"clipping-opacus-{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            seen = result["methods"]
            cells = [f"{name}, {result['batch']}"]
            for method in ("auto", "ghost"):
                cells += [_times(seen.get(method, {}), key) for key in ("times_sgd", "memory_of_sgd")]
            cells += [_times(seen.get(method, {}), "times_sgd") for method in ("materialize", "jax_privacy")]
            torch = json.loads(peer.read_text())["methods"] if peer.exists() else {}
            cells.append(", ".join(_times(torch.get(method, {}), "times_sgd") for method in ("hooks", "ghost")))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(seen: dict[str, Any], key: str) -> str:
    if "refused" in seen:
        return "refused"
    return f"x{seen[key]:.2f}" if seen else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=NAMES, metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="instead of each model's own batch size")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--table", action="store_true", help="measure nothing: print README's table from the results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.models))
        return
    for name in arguments.models:
        result = measure(name, list(arguments.methods), arguments.repeats, arguments.batch)
        show(result)
        if not arguments.no_write:
            about = {"machine": machine(), "device": jax.devices()[0].device_kind, "repeats": arguments.repeats}
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"clipping-{name}.json").write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
