#!/usr/bin/env bash
# Run the lines of a grid as a Slurm job array, several lines to a task.
#
#     bash benchmark/table1_atari.sh | bash benchmark/run_slurm.sh --per-gpu 3 --partition gpu --gres gpu:1 --time 1-0
#
#     --per-gpu N   lines that share a task and its GPU (default 1)
#     --cpus N      cores of a line (default 4)
#     --jobs N      tasks at a time (default 64)
#     --submit N    tasks that may be queued, where the cluster has such a limit (default: its MaxArraySize)
#     --logs DIR    as in run_local.sh: a directory for each grid, with a log and an exit code of each line
#     --dry-run     print what would be submitted
#
# All other flags are sbatch's; with its --wait this stays until all tasks have ended, and exits with 1 if one failed. Two
# minutes before a task's --time, its lines write checkpoints and the task is queued again.
# The same command goes on when all tasks have ended, or submits those beyond --submit: lines that ended well are left out, the
# others continue by their own --resume, and so does a task that Slurm requeues.
set -euo pipefail
unset CDPATH

per_gpu=1 cpus=4 jobs=64 submit=999999 logs=runs/grids dry_run=0 options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=1 ;;
        --per-gpu | --cpus | --jobs | --submit | --logs)
            if [[ $# -lt 2 ]]; then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            case $1 in
                --per-gpu) per_gpu=$2 ;; --cpus) cpus=$2 ;; --jobs) jobs=$2 ;; --submit) submit=$2 ;; --logs) logs=$2 ;;
            esac
            shift
            ;;
        *) options+=("$1") ;;
    esac
    shift
done
for value in "$per_gpu" "$cpus" "$jobs" "$submit"; do
    if [[ ! $value =~ ^[1-9][0-9]{0,5}$ ]]; then
        echo "error: --per-gpu, --cpus, --jobs and --submit need numbers" >&2
        exit 2
    fi
done
if ! command -v sbatch > /dev/null; then
    echo "error: no sbatch here: run this where jobs are submitted, or use run_local.sh" >&2
    exit 1
fi
grid=$(tr -d '\r\000' | grep -av '^[[:space:]]*$' || true)
if [[ -z $grid ]]; then
    echo "error: no lines; pipe a grid into this: bash benchmark/table1_atari.sh | bash benchmark/run_slurm.sh" >&2
    exit 2
fi
dir=$logs/$(sha256sum <<< "$grid" | cut -c 1-12)
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.." # where the lines' python finds the scripts
exec 9> "$dir/.lock"
if ! flock -n 9; then
    echo "error: $dir: another run_slurm.sh or run_local.sh is at work on this grid" >&2
    exit 1
fi
name=grid-$(basename "$dir")
queued=$(squeue -h -n "$name" -u "$(id -un)") # an error here ends the script
if [[ -n $queued ]]; then
    echo "error: jobs of this grid are queued or running (squeue -n $name); wait, or scancel -n $name" >&2
    exit 1
fi

echo "$grid" > "$dir/grid.txt"
for number in $(seq "$(wc -l < "$dir/grid.txt")"); do
    [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] || echo "$number"
done > "$dir/todo"
tasks=$((($(wc -l < "$dir/todo") + per_gpu - 1) / per_gpu))
if [[ $tasks == 0 ]]; then
    echo "all lines are done; logs in $dir"
    exit
fi

cat > "$dir/task.sh" << 'TASK'
#!/usr/bin/env bash
# DIR LINES: one task, its lines side by side. Near the time limit (USR1), they write checkpoints and it is queued again.
dir=$1 lines=$2 failed=0
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / lines))
declare -A processes
stop() {
    for process in "${processes[@]}"; do kill -TERM -- "-$process" 2> /dev/null; done
}
trap 'again=1; stop' USR1
trap stop TERM
first=$((SLURM_ARRAY_TASK_ID * lines + 1))
for number in $(sed -n "$first,$((first + lines - 1))p" "$dir/todo"); do
    [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] && continue # of a task that is queued again
    setsid bash -c -- "$(sed -n "${number}p" "$dir/grid.txt")" >> "$dir/$number.log" 2>&1 < /dev/null &
    processes[$number]=$!
done
for number in "${!processes[@]}"; do
    while kill -0 "${processes[$number]}" 2> /dev/null; do
        wait "${processes[$number]}" # a signal ends this too
    done
    wait "${processes[$number]}"
    code=$?
    echo $code > "$dir/$number.exit"
    [[ $code == 0 ]] || failed=1
done
if [[ -n ${again:-} && $failed == 1 && $SECONDS -gt 300 ]]; then # with a limit of minutes, this would go on for ever
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    sleep 60 # Slurm ends the task
fi
exit $failed
TASK

most=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p') # one more than the largest index
now=$(printf '%s\n' "$tasks" "$submit" "${most:-1001}" | sort -n | head -n 1)
command=(sbatch --job-name "$name" --array "0-$((now - 1))%$jobs" --requeue --open-mode append --signal B:USR1@120
    --ntasks 1 --cpus-per-task $((cpus * per_gpu)) --output "$dir/slurm-%A_%a.log" "${options[@]}"
    "$dir/task.sh" "$dir" "$per_gpu")
if [[ $dry_run == 1 ]]; then
    echo "${command[*]}"
    exit
fi
echo "$now of $tasks tasks; the same command goes on when they have ended"
echo "logs in $dir; squeue -n $name shows what is queued, scancel -n $name ends it"
echo "after that, lines that failed: grep -Lx 0 $dir/*.exit"
"${command[@]}"
