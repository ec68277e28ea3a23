#!/usr/bin/env bash
# Figure 4: active units and the Hessian's largest eigenvalue over time, six methods, 26 games, 5 seeds: 780 runs.
#
#     GAMES=Alien SEEDS=1 bash benchmark/fig4_metrics.sh | bash benchmark/run_local.sh -j 3
#
# The runs are Table 1's but for the metrics, which change nothing else in them. They have names of their own, in
# _metrics, so that a run of Table 1 that is finished does not stand in for one. The paper names neither games nor seeds.
source "$(dirname "$0")/grid.sh"
choose METHODS "base sam ln crelu reset plastic"
choose GAMES "$ATARI"

for seed in ${SEEDS:-$(seq 5)}; do # one seed of everything before the second
    for game in $GAMES; do
        for method in $METHODS; do
            atari_line "$game" "$seed" "${method}_metrics" "--replay-ratio 2 --metrics-interval 5000"
        done
    done
done
