#!/usr/bin/env bash
# Table 2 (and Tables 8 and 9, Figure 1): PLASTIC† and PLASTIC at replay ratio 2, 4 and 8, 26 games, 5 seeds: 780 runs.
#
#     bash benchmark/table2_scaling.sh | bash benchmark/run_local.sh -j 3
#     RATIOS="2 4" METHODS=dagger GAMES=Alien bash benchmark/table2_scaling.sh
#
# PLASTIC† is LayerNorm and resets; above replay ratio 2, Shrink & Perturb joins the resets (--shrink-perturb-alpha auto).
# At replay ratio 2 its runs are those of ln_reset in Table 4, and PLASTIC's those of Table 1.
source "$(dirname "$0")/grid.sh"
choose METHODS "dagger plastic"
choose RATIOS "2 4 8"
choose GAMES "$ATARI"
choose_seeds 5

for seed in $SEEDS; do # one seed of everything before the second
    for game in $GAMES; do
        for ratio in $RATIOS; do
            for method in $METHODS; do
                name=${method/dagger/ln_reset}
                [[ $ratio == 2 ]] && exp_name=$name || exp_name=${name}_rr$ratio
                atari_line "$game" "$seed" "$exp_name" "$name" "--replay-ratio $ratio --shrink-perturb-alpha auto"
            done
        done
    done
done
