#!/usr/bin/env bash
# Scaling on this machine: 1 and 2 processes with a core each, strong and weak, private and non-private, 3 repeats.
# About five minutes on two otherwise idle cores; records and curves go to benchmarks/results/scaling-2cpu, or to the
# folder that is given. REPEATS=5 WINDOWS=5 STEPS=8 benchmarks/scaling.sh takes longer and has narrower intervals.
set -euo pipefail
cd "$(dirname "$0")/.."
dpscale=${DPSCALE:-.venv/bin/dpscale}
out=${1:-benchmarks/results/scaling-2cpu}
options=(privacy.expected_batch_size=256 performance.physical_batch_size=64 --cores-per-process 1
  --windows "${WINDOWS:-3}" --steps "${STEPS:-4}")
rm -f "$out"/records/n*-b*-r*-*private.json "$out"/curves/*.svg
for repeat in $(seq "${REPEATS:-3}"); do
  for processes in $(shuf -e 1 2); do
    $dpscale scaling measure configs/quickstart.toml --local-processes "$processes" --repeat "$repeat" --out "$out" \
      "${options[@]}"
  done
done
rm -rf "$out/by-hand"
$dpscale scaling curves "$out" --no-png
rm -f "$out"/curves/index.html "$out"/curves/*-throughput.svg  # dpscale report makes the page again
$dpscale scaling predict "$out" --gpus 1,2 --network localhost --mode strong,weak
