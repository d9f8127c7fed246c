#!/usr/bin/env bash
# Scaling on this machine: 1 and 2 processes with a core each, strong and weak, private and non-private, 3 repeats.
# Some minutes on two otherwise idle cores; the records and curves go to benchmarks/results/scaling-2cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
dpscale=${DPSCALE:-.venv/bin/dpscale}
out=${1:-benchmarks/results/scaling-2cpu}
options=(privacy.expected_batch_size=256 performance.physical_batch_size=64 --windows 3 --steps 4 --cores-per-process 1)
for repeat in 1 2 3; do
  for processes in $(shuf -e 1 2); do
    $dpscale scaling measure configs/quickstart.toml --local-processes "$processes" --repeat "$repeat" --out "$out" \
      "${options[@]}"
  done
done
rm -rf "$out/by-hand"
$dpscale scaling curves "$out" --no-png
rm -f "$out"/curves/index.html "$out"/curves/*-throughput.svg  # dpscale report makes the page again
$dpscale scaling predict "$out" --gpus 1,2 --network localhost --mode strong,weak
