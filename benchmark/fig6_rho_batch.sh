#!/usr/bin/env bash
# Figure 6: SAM's rho (0.03, 0.1, 0.3), and batches of 16, 32 and 64 without and with SAM and resets; 26 games, 5 seeds:
# 1,820 runs.
#
#     bash benchmark/fig6_rho_batch.sh | bash benchmark/run_local.sh -j 3
#     METHODS="base base_batch16 base_batch64" GAMES=Alien bash benchmark/fig6_rho_batch.sh
#
# rho 0.1 and batches of 32 are the runs of Tables 1 and 4. The paper does not say how many seeds these are.
source "$(dirname "$0")/grid.sh"
all="sam_rho0.03 sam_rho0.3"
for method in base sam reset sam_reset; do
    all+=" $method ${method}_batch16 ${method}_batch64"
done
choose METHODS "$all"
choose GAMES "$ATARI"

for seed in ${SEEDS:-$(seq 5)}; do # one seed of everything before the second
    for game in $GAMES; do
        for method in $METHODS; do
            flags="--replay-ratio 2" rho=0.1
            case $method in
                sam_rho*) rho=${method#sam_rho} ;;
                *_batch*) flags+=" --batch-size ${method##*_batch}" ;;
            esac
            atari_line "$game" "$seed" "$method" "$flags"
        done
    done
done
