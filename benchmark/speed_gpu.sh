#!/usr/bin/env bash
# All speed figures of one GPU: the update by part, full runs of PLASTIC† and PLASTIC on Alien with their scores, and the
# throughput of 1, 3, 8 and 16 runs side by side, without and with CUDA MPS (where nvidia-cuda-mps-control is installed).
#
#   bash benchmark/speed_gpu.sh [DIRECTORY]     # default: benchmark/results/speed
#
# Nothing else should run on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmark/results/speed}
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')

python benchmark/speed.py --device cuda --json "$out/$gpu.json"

train=(python plastic_drq_rainbow_atari.py --device cuda --env-id Alien --run-dir "$out/runs" --overwrite)
"${train[@]}" --exp-name dagger --no-crelu --sam-rho 0
"${train[@]}" --exp-name plastic

parallel_runs() { # label, number of runs
  local started=$SECONDS pids=() failed=0
  for seed in $(seq 1 "$2"); do
    "${train[@]}" --exp-name "$1" --seed "$seed" --torch-threads 1 --no-crelu --sam-rho 0 \
      --total-timesteps 12000 --eval-episodes 1 > "$out/$1_$seed.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  if [ "$failed" = 1 ]; then
    echo "$1: a run failed, see $out/$1_*.log" >&2
    return 1
  fi
  echo "$1: $2 runs of 20,002 updates in $((SECONDS - started)) s"
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
