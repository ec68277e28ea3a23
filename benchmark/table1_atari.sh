#!/usr/bin/env bash
# Table 1, Atari-100k (and Table 7): six methods at replay ratio 2, 26 games, 10 seeds: 1,560 runs.
#
#     bash benchmark/table1_atari.sh | bash benchmark/run_local.sh -j 3
#     GAMES="Alien Pong" SEEDS="1 2" METHODS="base plastic" EXTRA="--total-timesteps 10000 --run-dir short" bash benchmark/table1_atari.sh
source "$(dirname "$0")/grid.sh"
choose METHODS "base sam ln crelu reset plastic"
choose GAMES "$ATARI"

for seed in ${SEEDS:-$(seq 10)}; do # one seed of everything before the second
    for game in $GAMES; do
        for method in $METHODS; do
            atari_line "$game" "$seed" "$method" "--replay-ratio 2"
        done
    done
done
