#!/usr/bin/env bash
# The speed figures of one GPU, a part at a time, 8 minutes each at most on an H200 (but for a full run of PLASTIC, 11):
#
#   bash benchmark/speed_gpu.sh update     # one update of each script, by part
#   bash benchmark/speed_gpu.sh dagger     # a full run of PLASTIC† on Boxing; plastic: of PLASTIC
#   bash benchmark/speed_gpu.sh dmc        # base on cheetah-run for 40,000 steps
#   bash benchmark/speed_gpu.sh parallel   # 1, 4, 8 and 16 short runs of PLASTIC† side by side; mps: under CUDA MPS
#
# Results go to the directory OUT (benchmark/results/speed). Nothing else should run on the machine.
set -euo pipefail
part=${1:?update, dagger, plastic, dmc, parallel or mps}
cd "$(dirname "$0")/.."
out=${OUT:-benchmark/results/speed}
mkdir -p "$out"
gpu=$(nvidia-smi -i 0 --query-gpu=name --format=csv,noheader | tr ' /' '__')
atari="python plastic_drq_rainbow_atari.py --device cuda --env-id Boxing --run-dir $out/runs --overwrite --checkpoint-interval 0"
dagger="--no-crelu --sam-rho 0"

side_by_side() { # LABEL: updates per second of 1, 4, 8 and 16 runs, of their training loops alone
    local n seed
    for n in 1 4 8 16; do
        rm -rf "$out/runs/Boxing__$1_"*
        for seed in $(seq "$n"); do
            $atari $dagger --exp-name "$1_$n" --seed "$seed" --torch-threads 1 --total-timesteps 8000 --eval-episodes 1 2> /dev/null &
        done
        wait
        python - "$1" "$n" "$out/runs/Boxing__$1_$n"__*/result.json << 'PY'
import json, sys
rates = [json.load(open(path))["updates_per_second"] for path in sys.argv[3:]]
print(f"{sys.argv[1]}: {len(rates)} of {sys.argv[2]} runs, {sum(rates):.0f} updates/s together, {min(rates):.0f} at least each")
PY
    done
}

case $part in
    update) python benchmark/speed.py --device cuda --json "$out/$gpu.json" ;;
    dagger) $atari --exp-name ln_reset $dagger ;;
    plastic) $atari --exp-name plastic ;;
    dmc)
        python plastic_drq_sac_dmc.py --device cuda --env-id cheetah-run --run-dir "$out/runs" --overwrite --exp-name base \
            --no-layer-norm --no-crelu --sam-rho 0 --reset-interval 0 --buffer-size 100000 --total-timesteps 40000
        ;;
    parallel) side_by_side parallel | tee "$out/${gpu}_parallel.txt" ;;
    mps)
        env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d
        trap 'echo quit | nvidia-cuda-mps-control' EXIT
        side_by_side mps | tee "$out/${gpu}_mps.txt"
        ;;
    *)
        echo "error: $part is none of update, dagger, plastic, dmc, parallel and mps" >&2
        exit 2
        ;;
esac
