#!/usr/bin/env bash
# Table 4 (and Figure 2, right): the 12 combinations at replay ratio 2, 26 games, 10 seeds: 3,120 runs.
#
#     bash benchmark/table4_ablation.sh | bash benchmark/run_local.sh -j 3
#
# Six of the twelve are Table 1's, under the same names: runs that are there already are left as they are.
source "$(dirname "$0")/grid.sh"
choose METHODS "base ln sam crelu reset plastic ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset"
choose GAMES "$ATARI"

for seed in ${SEEDS:-$(seq 10)}; do # one seed of everything before the second
    for game in $GAMES; do
        for method in $METHODS; do
            atari_line "$game" "$seed" "$method" "--replay-ratio 2"
        done
    done
done
