#!/usr/bin/env bash
# All speed figures of one GPU: the update by part, full runs of PLASTIC† and PLASTIC on Alien with their scores, a
# twentieth of a run on walker-run, and the throughput of 1, 3, 8 and 16 runs of Alien side by side, without and with CUDA
# MPS (where nvidia-cuda-mps-control is installed).
#
#   bash benchmark/speed_gpu.sh [DIRECTORY]     # relative to the repository; default: benchmark/results/speed
#
# Nothing else should run on the machine, an MPS daemon included.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmark/results/speed}
mkdir -p "$out"
gpu=$(nvidia-smi -i 0 --query-gpu=name --format=csv,noheader | tr ' /' '__')

python benchmark/speed.py --device cuda --json "$out/$gpu.json"

train=(python plastic_drq_rainbow_atari.py --device cuda --env-id Alien --run-dir "$out/runs" --overwrite)
"${train[@]}" --exp-name dagger --no-crelu --sam-rho 0
"${train[@]}" --exp-name plastic
for method in dagger plastic; do
  cp "$out/runs/Alien__${method}__1/result.json" "$out/${gpu}_full_run_$method.json"
done

for quality in full fast; do
  python plastic_drq_sac_dmc.py --device cuda --env-id walker-run --run-dir "$out/runs" --overwrite \
    --exp-name "$quality" --render-quality "$quality" --total-timesteps 100000
  cp "$out/runs/walker-run__${quality}__1/result.json" "$out/${gpu}_walker-run_$quality.json"
done

parallel_runs() { # label, number of runs
  local pids=() failed=0
  for seed in $(seq 1 "$2"); do
    "${train[@]}" --exp-name "$1" --seed "$seed" --torch-threads 1 --no-crelu --sam-rho 0 \
      --total-timesteps 30000 --eval-episodes 1 > "$out/$1_$seed.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  if [ "$failed" = 1 ]; then
    echo "$1: a run failed, see $out/$1_*.log" >&2
    return 1
  fi
  # Of the training loops alone, which overlap but for their start.
  python - "$1" "$2" "$out"/runs/Alien__"$1"__*/result.json << 'PY'
import json, sys
rates = [json.load(open(path))["updates_per_second"] for path in sys.argv[3:]]
print(f"{sys.argv[1]}: {sys.argv[2]} runs, {sum(rates):.0f} updates/s together, {min(rates):.0f} to {max(rates):.0f} each")
PY
}

{
  for n in 1 3 8 16; do parallel_runs "without_mps_$n" "$n"; done
  if command -v nvidia-cuda-mps-control > /dev/null; then
    nvidia-cuda-mps-control -d
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
    for n in 1 3 8 16; do parallel_runs "with_mps_$n" "$n"; done
  else
    echo "nvidia-cuda-mps-control is not installed: no figures with MPS"
  fi
} | tee "$out/${gpu}_parallel.txt"
