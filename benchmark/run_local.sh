#!/usr/bin/env bash
# Run the lines of a grid on this machine, several at a time; stop it whenever you like, and start the same line again.
#
#     bash benchmark/table1_atari.sh | bash benchmark/run_local.sh -j 3
#
#     -j N              lines at a time on each GPU, or in all where there is none (default 1)
#     --no-mps          without CUDA MPS, by which processes share a GPU; else it is started where it is installed and N > 1
#                       (but for DeepMind Control), and stopped at the end
#     --logs DIR        where each grid gets a directory (default runs/grids, from here), named by the checksum of its lines: it holds
#                       the log and the exit code of each line
#
# The GPUs are those of CUDA_VISIBLE_DEVICES, or all. Lines that ended well are not run again; the others are, and go on
# where they stood by their own --resume. Ctrl-C stops the lines and waits for their checkpoints. At the end, failed lines are
# listed with their logs, and the exit code is 1.
set -euo pipefail
unset CDPATH

jobs=1 mps=yes logs=runs/grids
while [[ $# -gt 0 ]]; do
    case $1 in
        -j | --logs)
            if [[ $# -lt 2 ]]; then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            [[ $1 == -j ]] && jobs=$2 || logs=$2
            shift
            ;;
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
        --no-mps) mps=no ;;
        *) echo "error: $1: the flags are -j N, --no-mps, --logs DIR" >&2 && exit 2 ;;
    esac
    shift
done
if [[ ! $jobs =~ ^[1-9][0-9]{0,3}$ || -z $logs ]]; then
    echo "error: -j needs a number, --logs a directory" >&2
    exit 2
fi
grid=$(tr -d '\r\000' | grep -av '^[[:space:]]*$' || true)
if [[ -z $grid ]]; then
    echo "error: no lines; pipe a grid into this: bash benchmark/table1_atari.sh | bash benchmark/run_local.sh" >&2
    exit 2
fi
dir=$logs/$(sha256sum <<< "$grid" | cut -c 1-12)
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.." # where the lines' python finds the scripts
exec 9> "$dir/.lock"
if ! flock -n 9; then
    echo "error: $dir: another run_local.sh is at work on this grid, or what it left: fuser $dir/.lock" >&2
    exit 1
fi
echo "$grid" > "$dir/grid.txt"
number_of_lines=$(wc -l < "$dir/grid.txt")

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    gpus=$CUDA_VISIBLE_DEVICES
else
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null) || gpus=""
fi
gpus=$(tr ',\n' '  ' <<< "$gpus")
number_of_gpus=$(wc -w <<< "$gpus")
at_once=$((jobs * (number_of_gpus > 0 ? number_of_gpus : 1)))
threads=$(($(nproc) / at_once))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export GRID_DIR=$dir GRID_GPUS=$gpus

run_line() { # SLOT NUMBER: run line NUMBER, on the GPU of this slot (from 0); never fails, else xargs could end early
    local gpus=($GRID_GPUS) code=0
    if [[ ${#gpus[@]} -gt 0 ]]; then
        export CUDA_VISIBLE_DEVICES=${gpus[$(($1 % ${#gpus[@]}))]}
    fi
    bash -c -- "$(sed -n "$2p" "$GRID_DIR/grid.txt")" > "$GRID_DIR/$2.log" 2>&1 9>&- < /dev/null || code=$?
    echo $code > "$GRID_DIR/$2.exit"
}
export -f run_line

# DeepMind Control renders on the GPU, which crawled and died under MPS.
[[ $grid != *plastic_drq_sac_dmc.py* && $number_of_gpus -gt 0 && $jobs -gt 1 ]] || mps=no
if [[ $mps == yes ]] && command -v nvidia-cuda-mps-control > /dev/null; then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) # a short path: it will hold sockets
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$dir
    # The daemon would number the GPUs of CUDA_VISIBLE_DEVICES anew; the lines name them by their own numbers.
    env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d 9>&-
    trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$CUDA_MPS_PIPE_DIRECTORY"' EXIT
fi

left() { # numbers of the lines that have not ended well
    for number in $(seq "$number_of_lines"); do
        [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] || echo "$number"
    done
}

# In a session of their own, so that Ctrl-C reaches the lines through stop(), once, and all of them can be found.
left | setsid xargs -r -P "$at_once" -I{} --process-slot-var=SLOT bash -c 'run_line "$SLOT" {}' &
session=$!
stopped=0
stop() {
    stopped=$1
    echo "stopping, after the lines' checkpoints" >&2
    pkill -TERM -s "$session" 2> /dev/null || kill -TERM -- -"$session" 2> /dev/null || kill -TERM "$session" 2> /dev/null || true
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
while kill -0 "$session" 2> /dev/null; do
    wait "$session" || true
done
# Where there is no pgrep, the process group: lines under timeout, which makes its own, are not in it.
while pgrep -s "$session" > /dev/null 2>&1 || kill -0 -- -"$session" 2> /dev/null; do sleep 0.1; done

if [[ $stopped != 0 ]]; then
    echo "stopped; the same command goes on" >&2
    exit "$stopped"
fi
failed=0
for number in $(left); do
    failed=$((failed + 1))
    echo "failed, exit code $(cat "$dir/$number.exit" 2> /dev/null || echo none): $(sed -n "${number}p" "$dir/grid.txt")" >&2
    echo "    $dir/$number.log: $(tail -n 1 "$dir/$number.log" 2> /dev/null)" >&2
done
echo "$((number_of_lines - failed)) of $number_of_lines lines done; logs in $dir"
[[ $failed == 0 ]]
