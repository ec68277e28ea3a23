#!/usr/bin/env bash
# Table 1, DeepMind Control (and Table 10): six methods, 11 tasks, 10 seeds: 660 runs.
#
#     bash benchmark/table1_dmc.sh | bash benchmark/run_local.sh -j 2
#     TASKS="walker-run" SEEDS="1 2" METHODS="base plastic" bash benchmark/table1_dmc.sh
#
# The paper's Base and Reset are runs of Nikishin et al. (2022), whose replay buffer holds 100,000; Table 6 says 1,000,000:
#
#     METHODS="base reset" EXTRA="--buffer-size 100000 --run-dir buffer100k" bash benchmark/table1_dmc.sh
source "$(dirname "$0")/grid.sh"
choose METHODS "base sam ln crelu reset plastic"
choose TASKS "$DMC"

for seed in ${SEEDS:-$(seq 10)}; do # one seed of everything before the second
    for task in $TASKS; do
        for method in $METHODS; do
            dmc_line "$task" "$seed" "$method"
        done
    done
done
