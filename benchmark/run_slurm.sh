#!/usr/bin/env bash
# Run the lines of a grid as a Slurm job array, several lines to a task.
#
#     bash benchmark/table1_atari.sh | bash benchmark/run_slurm.sh --per-gpu 3 --partition gpu --gres gpu:1 --time 1-0
#
#     --per-gpu N   lines that share a task, and so what is asked for it: --gres gpu:1, --mem, --time (default 1)
#     --cpus N      cores of a line (default 4)
#     --jobs N      tasks at a time (default 64)
#     --submit N    tasks to submit, where the cluster limits how many one may have queued (default: its MaxArraySize)
#     --logs DIR    where each grid gets a directory (default runs/grids, from here) with a log and an exit code of each line
#     --dry-run     print what would be submitted, of how many tasks, and which lines have failed so far
#
# All other flags are sbatch's; with its --wait this stays until the tasks have ended, and exits with 1 if one of them failed.
# When they have ended, the same command submits what is left: lines that ended well are left out, those not begun come first,
# the others go on by their own --resume, as they do in a task that Slurm requeues. Two minutes before a task's --time (of 8
# minutes at least) its lines write checkpoints and it is queued again; scancel, too, lets them write checkpoints.
set -euo pipefail
unset CDPATH

per_gpu=1 cpus=4 jobs=64 submit=999999 logs=runs/grids dry_run=0 options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=1 ;;
        --per-gpu | --cpus | --jobs | --submit | --logs)
            if [[ -z ${2:-} ]]; then
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
if [[ $dir == *[%\\]* ]]; then
    echo "error: $dir: sbatch would read % and \\ as its own; choose another --logs" >&2
    exit 2
fi
cd "$(dirname "$0")/.." # where the lines' python finds the scripts
exec 9> "$dir/.lock"
if ! flock -n 9; then
    echo "error: $dir: another run_slurm.sh or run_local.sh is at work on this grid" >&2
    exit 1
fi
name=grid-$(basename "$dir")
queued=$(squeue -h -n "$name" -u "$(id -un)") # an error here ends the script
if [[ $dry_run == 0 && -n $queued ]]; then
    echo "error: jobs of this grid are queued or running (squeue -n $name); wait, or scancel -n $name" >&2
    exit 1
fi

mapfile -t -O 1 lines <<< "$grid"
todo=() failed=() # numbers of lines
for number in "${!lines[@]}"; do
    code=$(cat "$dir/$number.exit" 2> /dev/null || echo none)
    if [[ $code == none ]]; then
        todo+=("$number")
    elif [[ $code != 0 ]]; then
        failed+=("$number")
        echo "failed before, exit code $code: ${lines[number]}" >&2
        echo "    $dir/$number.log: $(tail -n 1 "$dir/$number.log" 2> /dev/null)" >&2
    fi
done
todo+=("${failed[@]}")
tasks=$(((${#todo[@]} + per_gpu - 1) / per_gpu))
if [[ $tasks == 0 ]]; then
    echo "all lines are done; logs in $dir"
    exit
fi

most=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p') # one more than the largest index
now=$(printf '%s\n' "$tasks" "$submit" "${most:-1001}" | sort -n | head -n 1)
command=(sbatch "${options[@]}" --job-name "$name" --array "0-$((now - 1))%$jobs" --requeue --open-mode append
    --signal B:USR1@120 --ntasks 1 --cpus-per-task $((cpus * per_gpu)) --output "$dir/slurm-%A_%a.log"
    "$dir/task.sh" "$dir" "$per_gpu")
if [[ $dry_run == 1 ]]; then
    printf '%q ' "${command[@]}"
    printf '\n# %s of %s tasks\n' "$now" "$tasks"
    exit
fi
printf '%s\n' "$grid" > "$dir/grid.txt"
printf '%s\n' "${todo[@]}" > "$dir/todo"
cat > "$dir/task.sh" << 'TASK'
#!/usr/bin/env bash
# DIR LINES: one task, its lines side by side. Near the time limit (USR1), they write checkpoints and it is queued again.
dir=$1 lines=$2 failed=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / lines))}
declare -A processes
stop() {
    for process in "${processes[@]}"; do kill -TERM -- "-$process" 2> /dev/null; done
}
trap 'again=1; stop' USR1
trap stop TERM
run_line() { # NUMBER: writes its exit code when it has ended, even if the task is no more
    trap : TERM
    bash -c -- "$(sed -n "$1p" "$dir/grid.txt")"
    echo $? > "$dir/$1.exit"
}
export -f run_line
export dir
first=$((SLURM_ARRAY_TASK_ID * lines + 1))
for number in $(sed -n "$first,$((first + lines - 1))p" "$dir/todo"); do
    [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] && continue # of a task that is queued again
    rm -f "$dir/$number.exit"
    setsid bash -c "run_line $number" >> "$dir/$number.log" 2>&1 < /dev/null &
    processes[$number]=$!
done
for number in "${!processes[@]}"; do
    while kill -0 "${processes[$number]}" 2> /dev/null; do
        wait "${processes[$number]}" # a signal ends this too
    done
    [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] || failed=1
done
if [[ -n ${again:-} && $failed == 1 && $SECONDS -gt 300 ]]; then # with a limit of minutes, this would go on for ever
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && sleep 60 # Slurm ends the task
fi
exit $failed
TASK
echo "submitting $now of $tasks tasks; logs in $dir"
echo "squeue -n $name shows what is queued, scancel -n $name ends it; --dry-run lists the lines that have failed"
"${command[@]}"
