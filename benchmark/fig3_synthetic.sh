#!/usr/bin/env bash
# Figure 3 (and Figure 2, left): the synthetic experiment, 12 combinations on both tasks: 24 runs of 30 seeds each.
#
#     bash benchmark/fig3_synthetic.sh | bash benchmark/run_local.sh
#     METHODS="base ln" TASKS=label EXTRA="--num-seeds 3" bash benchmark/fig3_synthetic.sh
#
# SWEEP=1 trains every pair of the paper's learning rates and weight decays (25 times the work, in the same processes).
source "$(dirname "$0")/grid.sh"
choose METHODS "base ln sam crelu reset plastic ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset"
choose TASKS "input label"
choose_one SWEEP "0 1"
sweep=""
if [[ $SWEEP == 1 ]]; then
    sweep=" --learning-rate 0.1 0.01 0.001 0.0001 0.00001 --weight-decay 0.1 0.01 0.001 0.0001 0.00001"
fi

for method in $METHODS; do
    interventions "$method" 0.1 10
    for task in $TASKS; do
        echo "python synth_cifar_plasticity.py --task $task --exp-name $method $switches --resume$sweep$extra"
    done
done
