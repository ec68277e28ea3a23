#!/usr/bin/env bash
# Figure 5: what SAM perturbs, and under which noise; 5 seeds: 1,300 runs on 26 games (a, b) and 220 on 11 tasks (c).
#
#     bash benchmark/fig5_sam.sh | bash benchmark/run_local.sh -j 3
#     BENCHMARKS=dmc TASKS=walker-run METHODS="sam sam_critic" bash benchmark/fig5_sam.sh
#
# a: the noisy layers' noise in SAM's second pass independent (sam), reused, or off in the first pass (noiseless).
# b: all perturbed (sam), the backbone or the head, without and with resets.  c: DrQ-SAC's critic or actor perturbed.
# The paper says neither how many seeds these are nor whether panel b has resets.
source "$(dirname "$0")/grid.sh"
choose BENCHMARKS "atari dmc"
choose METHODS "base sam reset sam_reset sam_reused sam_noiseless sam_backbone sam_head sam_reset_backbone sam_reset_head \
sam_critic sam_actor"
choose GAMES "$ATARI"
choose TASKS "$DMC"

any=
for seed in ${SEEDS:-$(seq 5)}; do # one seed of everything before the second
    for benchmark in $BENCHMARKS; do
        for method in $METHODS; do
            variant=${method##*_}
            case $benchmark-$variant in
                *-base | *-sam | atari-reset) flags="" ;;
                atari-reused | atari-noiseless) flags="--sam-noise ${variant/noiseless/none} --sam-scope all" ;;
                atari-backbone | atari-head) flags="--sam-noise independent --sam-scope $variant" ;;
                dmc-critic | dmc-actor) flags="--sam-scope $variant" ;;
                *) continue ;; # of the other benchmark
            esac
            any=yes
            if [[ $benchmark == atari ]]; then
                for game in $GAMES; do
                    atari_line "$game" "$seed" "$method" "--replay-ratio 2${flags:+ $flags}"
                done
            else
                for task in $TASKS; do
                    dmc_line "$task" "$seed" "$method" "$flags"
                done
            fi
        done
    done
done
if [[ -z $any ]]; then
    echo "error: METHODS: none of \"$METHODS\" is of BENCHMARKS=\"$BENCHMARKS\"" >&2
    exit 2
fi
