"""What the noise costs: time an element and temporary memory, against jax.random.normal.

    python benchmarks/noise.py [--elements 10000000] [--repeats 5]

writes benchmarks/results/noise.json: nanoseconds an element (the median repeat), compile seconds and temporary bytes
an element, of the ChaCha20 noise and of the normals of jax's own generators, all added to a flat float32 vector.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine

from dpscale.chacha import chacha20_words
from dpscale.noise import add_gaussian_noise

RESULT = Path(__file__).parent / "results" / "noise.json"
STDDEV = np.float32(2.5)


def jax_noise(flat: jax.Array, key: jax.Array, stddev: jax.Array) -> jax.Array:
    return flat + stddev * jax.random.normal(key, flat.shape, jnp.float32)


def words_only(flat: jax.Array, key: jax.Array, _: jax.Array) -> tuple[jax.Array, ...]:
    """As many ChaCha20 blocks as the noise of `flat` takes; the part of its cost that is the cipher."""
    chunk = min(2**14, flat.shape[0] // 10)

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        words = chacha20_words(key, i.astype(jnp.uint32) * np.uint32(chunk) + jax.lax.iota(jnp.uint32, chunk))
        return tuple(a ^ b for a, b in zip(sums, words, strict=True))

    return jax.lax.fori_loop(0, flat.shape[0] // 10 // chunk, add_chunk, (jnp.zeros(chunk, jnp.uint32),) * 16)


def measure(function: Callable, flat: jax.Array, key: jax.Array | np.ndarray, repeats: int) -> dict[str, float]:
    begin = time.perf_counter()
    program = jax.jit(function).lower(flat, key, STDDEV).compile()
    compile_s = time.perf_counter() - begin
    jax.block_until_ready(program(flat, key, STDDEV))
    times_s = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(flat, key, STDDEV))
        times_s.append(time.perf_counter() - begin)
    temp_bytes = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    return {
        "ns_per_element": statistics.median(times_s) / flat.size * 1e9,
        "ns_per_element_fastest": min(times_s) / flat.size * 1e9,
        "compile_s": compile_s,
        "temp_bytes": temp_bytes,
        "temp_bytes_per_element": temp_bytes / flat.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    flat = jnp.zeros(arguments.elements, jnp.float32)
    words = np.arange(8, dtype=np.uint32)
    cases = {
        "chacha20_box_muller": (add_gaussian_noise, words),
        "chacha20_words_only": (words_only, words),
        "jax_threefry_normal": (jax_noise, jax.random.key(0, impl="threefry2x32")),
        "jax_rbg_normal": (jax_noise, jax.random.key(0, impl="rbg")),
    }
    results = {name: measure(f, flat, key, arguments.repeats) for name, (f, key) in cases.items()}
    ratio = results["chacha20_box_muller"]["ns_per_element"] / results["jax_threefry_normal"]["ns_per_element"]
    report = {
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "elements": arguments.elements,
        "repeats": arguments.repeats,
        "results": results,
        "times_threefry": ratio,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        time_ns, temp = result["ns_per_element"], result["temp_bytes_per_element"]
        print(f"{name:22} {time_ns:7.1f} ns/element  {temp:6.2f} temp bytes/element")
    print(f"{ratio:.2f} times threefry; wrote {RESULT}")


if __name__ == "__main__":
    main()
