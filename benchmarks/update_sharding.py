"""What `performance.update_sharding = "sharded"` saves: bytes on a device and time of `finalize`, private and not.

    python benchmarks/update_sharding.py [--elements 2000000] [--devices 1,2,8] [--repeats 7]

Virtual devices of one CPU share its cores, so a time is the work of all devices together: the whole update's grows with
their number, the sharded one's must stay. Writes benchmarks/results/update_sharding.json.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "update_sharding.json"
MODES = ("replicated", "sharded")


def finalize_of(devices: int, elements: int, *, private: bool, sharded: bool) -> Any:
    """(compiled step functions, state, requests, bytes on one device)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpscale.baseline import summed_grad
    from dpscale.config import OptimizerSection
    from dpscale.data.transforms import id_words
    from dpscale.mesh import data_mesh, place_rows
    from dpscale.optimizer import make_optimizer
    from dpscale.placement import Placement
    from dpscale.privacy.plan import PrivacyPlan
    from dpscale.step import Rows, build_accumulate, build_finalize, compile_steps, requests_array

    plan = PrivacyPlan(
        num_examples=1000,
        sampling_rate=0.1,
        steps=10,
        expected_batch_size=100,
        noise_multiplier=1.0 if private else 0.0,
        clip_norm=1.0 if private else None,
        delta=1e-5,
        epsilon_target=None,
        enabled=private,
    )
    mesh = data_mesh(jax.devices()[:devices])
    optimizer = make_optimizer(OptimizerSection.model_validate({"name": "adam"}), 10)
    state = Placement(mesh, optimizer, sharded=sharded).create({"w": np.zeros(elements, np.float32)})
    ids = np.zeros(devices, np.int64)
    features = place_rows(mesh, np.zeros((devices, 1), np.float32))
    rows = Rows({"features": features}, place_rows(mesh, id_words(ids)), place_rows(mesh, ids > 0))
    summed = summed_grad(lambda params, example: jnp.sum(params["w"]) * example["features"][0])
    functions = compile_steps(
        build_accumulate(mesh, summed, 1.0, False),
        build_finalize(mesh, plan, optimizer, sharded=sharded),
        mesh,
        state,
        {},
        rows,
    )
    optimizer_bytes = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state.opt_state))
    memory = functions.finalize.memory_analysis()  # type: ignore[attr-defined]
    sizes = {
        "optimizer_bytes": optimizer_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return functions, state, requests_array(mesh, stop=False, save=False), sizes


class Case:
    """One mode on one number of devices; `seconds()` runs one finalize."""

    def __init__(self, devices: int, elements: int, *, private: bool, sharded: bool) -> None:
        made = finalize_of(devices, elements, private=private, sharded=sharded)
        self.functions, self.state, self.requests, self.sizes = made
        self.sums = self.functions.zero_sums()
        self.facts = {"devices": devices, "private": private, "update_sharding": MODES[sharded]}
        self.times_s: list[float] = []

    def run(self) -> None:
        import jax

        from dpscale.chacha import key_words

        jax.block_until_ready((self.state, self.sums))
        begin = time.perf_counter()
        self.state, self.sums, _ = self.functions.finalize(self.state, self.sums, self.requests, key_words(bytes(32)))
        jax.block_until_ready(self.state)
        self.times_s.append(time.perf_counter() - begin)

    def row(self) -> dict[str, Any]:
        kept = [1e3 * seconds for seconds in self.times_s[1:]]
        times = {"finalize_ms": statistics.median(kept), "fastest_ms": min(kept), "slowest_ms": max(kept)}
        return self.facts | self.sizes | times


def noise_ms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the noise adds to `finalize`, the work of all devices together: with privacy less without."""
    times = {(row["devices"], row["update_sharding"], row["private"]): row["finalize_ms"] for row in rows}
    return [
        {
            "devices": devices,
            **{f"{mode}_ms": times[devices, mode, True] - times[devices, mode, False] for mode in MODES},
        }
        for devices in dict.fromkeys(row["devices"] for row in rows)
    ]


def main() -> None:
    """Measure the cases in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2_000_000)
    parser.add_argument("--devices", default="1,2,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.devices.split(",")]
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(counts)}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from machine import machine

    cases = [
        Case(devices, arguments.elements, private=private, sharded=sharded)
        for devices in counts
        for private in (True, False)
        for sharded in (False, True)
    ]
    for _ in range(arguments.repeats + 1):  # the first is warm-up
        for case in cases:
            case.run()
    rows = [case.row() for case in cases]
    print(f"{'devices':>7} {'privacy':>8} {'update':>11} {'optimizer MB':>13} {'temporary MB':>13} {'finalize ms':>22}")
    for row in rows:
        mb, temp = (f"{row[name] / 1e6:.2f}" for name in ("optimizer_bytes", "temporary_bytes"))
        span = f"{row['finalize_ms']:.0f} ({row['fastest_ms']:.0f} to {row['slowest_ms']:.0f})"
        privacy = "yes" if row["private"] else "no"
        print(f"{row['devices']:>7} {privacy:>8} {row['update_sharding']:>11} {mb:>13} {temp:>13} {span:>22}")
    noise = noise_ms(rows)
    for one in noise:
        whole, cut = one["replicated_ms"], one["sharded_ms"]
        print(
            f"{one['devices']:>7} devices, noise alone: {whole:.0f} ms whole, {cut:.0f} ms on shards, {cut / whole:.2f}"
        )
    head = {"benchmark": "update_sharding", "machine": machine(), "elements": arguments.elements}
    arguments.out.write_text(
        json.dumps(head | {"repeats": arguments.repeats, "rows": rows, "noise": noise}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
