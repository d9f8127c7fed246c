"""Time and bytes of Poisson draws: `python benchmarks/sampling.py`, about ten seconds on one core."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from machine import machine

from dpscale.sampling import KeyedStream, PoissonSampler

KEY = bytes(range(32))  # a benchmark's key is no secret
CASES = [
    # num_examples, expected batch size
    (4_500, 1_024),
    (60_000, 256),
    (1_281_167, 4_096),
    (1_281_167, 65_536),
    (10**8, 25_000),
    (10**9, 25_000),
    (10**9, 1),
    (10**10, 25_000),
]


def measure(num_examples: int, expected_batch_size: int, draws: int) -> dict[str, Any]:
    """One row of the table: construction once, then `draws` draws of distinct steps after one to warm up."""
    start = time.perf_counter()
    sampler = PoissonSampler(num_examples, expected_batch_size / num_examples, KEY)
    table_ms = (time.perf_counter() - start) * 1e3
    sampler.indices(draws)
    draw_ms = []
    for step in range(draws):
        start = time.perf_counter()
        sampler.indices(step)
        draw_ms.append((time.perf_counter() - start) * 1e3)
    streams = [KeyedStream(KEY, 0, step) for step in range(draws)]
    sizes = [len(sampler._draw(stream)) for stream in streams]
    return {
        "num_examples": num_examples,
        "expected_batch_size": expected_batch_size,
        "draws": draws,
        "step_ms_median": statistics.median(draw_ms),
        "step_ms_min": min(draw_ms),
        "step_ms_max": max(draw_ms),
        "table_ms": table_ms,
        "random_bytes_per_step": statistics.mean(stream.bytes_read for stream in streams),
        "batch_size_mean": statistics.mean(sizes),
    }


def main() -> None:
    """Measure every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=25, help="timed draws a case, at least 5 (default 25)")
    default = Path(__file__).parent / "results" / "sampling.json"
    parser.add_argument("--out", type=Path, default=default, help="result file (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.draws < 5:
        parser.error(f"--draws {arguments.draws} is too few for a median with a spread: give at least 5")
    print(f"{'examples':>14} {'batch':>8} {'ms/step':>9} {'min':>8} {'max':>8} {'table ms':>9} {'bytes/step':>11}")
    results = []
    for num_examples, expected_batch_size in CASES:
        row = measure(num_examples, expected_batch_size, arguments.draws)
        results.append(row)
        print(
            f"{num_examples:>14,} {expected_batch_size:>8,} {row['step_ms_median']:>9.3f} {row['step_ms_min']:>8.3f} "
            f"{row['step_ms_max']:>8.3f} {row['table_ms']:>9.1f} {row['random_bytes_per_step']:>11,.0f}"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
