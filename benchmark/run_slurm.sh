#!/usr/bin/env bash
# Run the lines of a grid as Slurm job arrays, several lines to a task.
#
#     bash benchmark/table1_atari.sh | bash benchmark/run_slurm.sh --partition gpu --jobs 64 --per-gpu 3
#
#     --per-gpu N       lines that share a task and its GPU (default 1)
#     --jobs N          tasks at a time (default 64)
#     --submit N        at most N tasks now, where the cluster limits how many one may have queued; the same command, when they
#                       have ended, submits the next
#     --partition NAME  as sbatch has it; without it, Slurm's default
#     --gpus N          GPUs of a task (default 1; 0 = none)
#     --cpus N          cores of a line (default 4)
#     --time LIMIT      of a task, as sbatch has it; 2 minutes before it, lines write checkpoints and the task is queued again
#     --logs DIR        as in run_local.sh: a directory for each grid, with a log and an exit code of each line
#     --wait            stay until all tasks have ended, list the failed lines, and exit with 1 if there are any
#     --dry-run         print what would be submitted
#
# Start the same line again to go on: lines that ended well are left out, the others continue by their own --resume, and so
# does a task that Slurm requeues. A grid of more tasks than the cluster's MaxArraySize becomes several arrays, each of which
# starts when the one before it has ended, so that --jobs holds for all. Accounts and the like: sbatch's own environment
# variables (SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_MEM_PER_CPU).
set -euo pipefail
unset CDPATH

per_gpu=1 jobs=64 submit=999999 partition="" gpus=1 cpus=4 limit="" logs=runs/grids waiting=0 dry_run=0
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
        --wait) waiting=1 ;;
        --dry-run) dry_run=1 ;;
        --per-gpu | --jobs | --submit | --partition | --gpus | --cpus | --time | --logs)
            if [[ $# -lt 2 ]]; then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            case $1 in
                --per-gpu) per_gpu=$2 ;; --jobs) jobs=$2 ;; --submit) submit=$2 ;; --partition) partition=$2 ;;
                --gpus) gpus=$2 ;; --cpus) cpus=$2 ;; --time) limit=$2 ;; --logs) logs=$2 ;;
            esac
            shift
            ;;
        *) echo "error: $1: not a flag of run_slurm.sh" >&2 && exit 2 ;;
    esac
    shift
done
for value in "$per_gpu" "$jobs" "$submit" "$cpus" "1$gpus"; do
    if [[ ! $value =~ ^[1-9][0-9]{0,5}$ ]]; then
        echo "error: --per-gpu, --jobs, --submit, --gpus and --cpus need numbers" >&2
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
if [[ ! $dir =~ ^[A-Za-z0-9_./+=@:\ -]+$ ]]; then
    echo "error: $dir: sbatch cannot take such a path; choose another --logs" >&2
    exit 2
fi
cd "$(dirname "$0")/.." # where the lines' python finds the scripts
exec 9> "$dir/.lock"
if ! flock -n 9; then
    echo "error: $dir: another run_slurm.sh or run_local.sh is at work on this grid" >&2
    exit 1
fi
echo "$grid" > "$dir/grid.txt"
name=grid-$(basename "$dir")
queued=$(squeue -h -n "$name" -u "$(id -un)") # an error here ends the script
if [[ $dry_run == 0 && -n $queued ]]; then
    echo "error: jobs of this grid are queued or running (squeue -n $name); wait, or scancel -n $name" >&2
    exit 1
fi

# What is left to do: a list of line numbers for each submission, so that later ones do not disturb it.
todo=$dir/todo.$(date +%s).$$
for number in $(seq "$(wc -l < "$dir/grid.txt")"); do
    [[ $(cat "$dir/$number.exit" 2> /dev/null) == 0 ]] || echo "$number"
done > "$todo"
tasks=$((($(wc -l < "$todo") + per_gpu - 1) / per_gpu))
if [[ $tasks == 0 ]]; then
    rm "$todo"
    echo "all lines are done; logs in $dir"
    exit
fi

cat > "$dir/task.sh" << 'TASK'
#!/usr/bin/env bash
# One task: its lines side by side. Near the time limit (USR1), they write checkpoints and the task is queued again.
declare -A lines
stop() {
    for line in "${lines[@]}"; do kill -TERM -- "-$line" 2> /dev/null; done
}
trap 'again=1; stop' USR1
trap stop TERM
task=$((GRID_OFFSET + SLURM_ARRAY_TASK_ID)) failed=0
for number in $(sed -n "$((task * GRID_PER_TASK + 1)),$(((task + 1) * GRID_PER_TASK))p" "$GRID_TODO"); do
    [[ $(cat "$GRID_DIR/$number.exit" 2> /dev/null) == 0 ]] && continue # of a task that is queued again
    setsid bash -c -- "$(sed -n "${number}p" "$GRID_DIR/grid.txt")" >> "$GRID_DIR/$number.log" 2>&1 < /dev/null &
    lines[$number]=$!
done
for number in "${!lines[@]}"; do
    while kill -0 "${lines[$number]}" 2> /dev/null; do
        wait "${lines[$number]}" # a signal ends this too
    done
    wait "${lines[$number]}"
    code=$?
    echo $code > "$GRID_DIR/$number.exit"
    [[ $code == 0 ]] || failed=1
done
if [[ -n ${again:-} && $failed == 1 && $SECONDS -gt 300 ]]; then # with a limit of minutes, this would go on for ever
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    sleep 60 # Slurm ends the task
fi
exit $failed
TASK

go_on="the same command goes on when these have ended"
now=$((tasks < submit ? tasks : submit))
# MaxArraySize is one more than the largest index.
most=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
most=${most:-1001} # Slurm's default
id=""
for ((offset = 0; offset < now; offset += most)); do
    last=$((now - offset < most ? now - offset - 1 : most - 1))
    command=(sbatch --parsable --job-name "$name" --array "0-$last%$jobs" --requeue --open-mode append --signal B:USR1@120
        --ntasks 1 --cpus-per-task $((cpus * per_gpu)) --output "$dir/slurm-%A_%a.log"
        --export "ALL,GRID_DIR=$dir,GRID_TODO=$todo,GRID_OFFSET=$offset,GRID_PER_TASK=$per_gpu,OMP_NUM_THREADS=$cpus")
    [[ -n $partition ]] && command+=(--partition "$partition")
    [[ $gpus != 0 ]] && command+=(--gres "gpu:$gpus")
    [[ -n $limit ]] && command+=(--time "$limit")
    [[ -n $id ]] && command+=(--dependency "afterany:$id")
    if [[ $dry_run == 1 ]]; then
        echo "${command[*]} $dir/task.sh"
        id=ID
        continue
    fi
    if ! id=$("${command[@]}" "$dir/task.sh"); then
        echo "error: sbatch refused; $offset of $tasks tasks are submitted, $go_on (--submit N: only N tasks at once)" >&2
        exit 1
    fi
    id=${id%%;*} # of several clusters
    echo "submitted array $id, $((last + 1)) tasks"
done
if [[ $dry_run == 1 ]]; then
    rm "$todo"
    exit
fi
[[ $now == "$tasks" ]] || echo "$now of $tasks tasks are submitted, $go_on"
echo "logs in $dir; squeue -n $name shows what is queued, scancel -n $name ends it"
[[ $waiting == 0 ]] && exit

until queued=$(squeue -h -n "$name") && [[ -z $queued ]]; do sleep 2; done # a busy controller may not answer
failed=0
for number in $(head -n $((now * per_gpu)) "$todo"); do
    code=$(cat "$dir/$number.exit" 2> /dev/null || echo none)
    if [[ $code != 0 ]]; then
        failed=$((failed + 1))
        echo "failed, exit code $code: $(sed -n "${number}p" "$dir/grid.txt")" >&2
        echo "    $dir/$number.log: $(tail -n 1 "$dir/$number.log" 2> /dev/null)" >&2
    fi
done
later=$(tail -n +$((now * per_gpu + 1)) "$todo" | wc -l)
echo "$(($(wc -l < "$dir/grid.txt") - failed - later)) of $(wc -l < "$dir/grid.txt") lines done"
[[ $failed == 0 ]]
