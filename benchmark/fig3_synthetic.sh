#!/usr/bin/env bash
# Figure 3 (and Figure 2, left): the synthetic experiment, one command per line.
#
#     bash benchmark/fig3_synthetic.sh                       # print: base, 4 single methods, 6 pairs, all four; both tasks
#     bash benchmark/fig3_synthetic.sh | bash                # run them one after the other
#     METHODS="base ln" TASKS=label EXTRA="--num-seeds 3" bash benchmark/fig3_synthetic.sh | xargs -P 2 -I{} sh -c "{}"
#
# SWEEP=1 trains every pair of the paper's learning rates and weight decays (25 times the work, in the same processes).
# EXTRA is added to every line. A line that was run already does nothing, one that was stopped continues (--resume).
set -euo pipefail
set -f # no file names for a *

all="base ln sam crelu reset plastic ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset"
methods=${METHODS:-$all}
tasks=${TASKS:-input label}
extra=${EXTRA:+ ${EXTRA//$'\n'/ }}
sweep=""
if [[ ${SWEEP:-0} != [01] ]]; then
    echo "error: SWEEP must be 0 or 1, not $SWEEP" >&2
    exit 2
elif [[ ${SWEEP:-0} == 1 ]]; then
    sweep=" --learning-rate 0.1 0.01 0.001 0.0001 0.00001 --weight-decay 0.1 0.01 0.001 0.0001 0.00001"
fi

for method in $methods; do
    if [[ " $all " != *" $method "* ]]; then
        echo "error: METHODS: $method is not one of $all" >&2
        exit 2
    fi
done
for task in $tasks; do
    if [[ $task != input && $task != label ]]; then
        echo "error: TASKS: $task is not input or label" >&2
        exit 2
    fi
done
for method in $methods; do
    parts=_${method/plastic/ln_sam_crelu_reset}_
    flags="--exp-name $method"
    [[ $parts == *_ln_* ]] && flags+=" --layer-norm" || flags+=" --no-layer-norm"
    [[ $parts == *_crelu_* ]] && flags+=" --crelu" || flags+=" --no-crelu"
    [[ $parts == *_sam_* ]] && flags+=" --sam-rho 0.1" || flags+=" --sam-rho 0"
    [[ $parts == *_reset_* ]] && flags+=" --reset-interval 10" || flags+=" --reset-interval 0"
    for task in $tasks; do
        echo "python synth_cifar_plasticity.py --task $task $flags --resume$sweep$extra"
    done
done
