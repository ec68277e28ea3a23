#!/usr/bin/env bash
# Table 2 (and Tables 8 and 9, Figure 1): PLASTIC† and PLASTIC at replay ratio 2, 4 and 8, 26 games, 5 seeds: 780 runs.
#
#     bash benchmark/table2_scaling.sh | bash benchmark/run_local.sh -j 3
#     RATIOS="2 4" METHODS=ln_reset GAMES=Alien bash benchmark/table2_scaling.sh
#
# PLASTIC† is LayerNorm and resets; above replay ratio 2, Shrink & Perturb joins the resets (--shrink-perturb-alpha auto).
# At replay ratio 2 its runs are those of ln_reset in Table 4, and PLASTIC's those of Table 1.
source "$(dirname "$0")/grid.sh"
choose METHODS "ln_reset plastic"
choose RATIOS "2 4 8"
choose GAMES "$ATARI"

for seed in ${SEEDS:-$(seq 5)}; do # one seed of everything before the second
    for game in $GAMES; do
        for ratio in $RATIOS; do
            for method in $METHODS; do
                [[ $ratio == 2 ]] && exp_name=$method || exp_name=${method}_rr$ratio
                atari_line "$game" "$seed" "$exp_name" "--replay-ratio $ratio --shrink-perturb-alpha auto"
            done
        done
    done
done
