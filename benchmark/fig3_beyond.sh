#!/usr/bin/env bash
# Figure 3's experiment with interventions of other papers, each alone and with LayerNorm and SAM: 22 runs of 30 seeds.
#
#     bash benchmark/fig3_beyond.sh | bash benchmark/run_local.sh
#     METHODS="redo ln_sam_redo" TASKS=label EXTRA="--num-seeds 3" bash benchmark/fig3_beyond.sh
#
# To compare with ln_sam_reset, here, and with fig3_synthetic.sh's base, reset and ln_sam. ReDo has its paper's tau and
# interval, L2 Init half the weight decay as its lambda, Shrink & Perturb the weight of PLASTIC's Atari runs; the other two are
# not tuned.
source "$(dirname "$0")/grid.sh"
choose METHODS "redo l2init clip tortoise reset_shrink \
ln_sam_redo ln_sam_l2init ln_sam_clip ln_sam_tortoise ln_sam_reset_shrink ln_sam_reset"
choose TASKS "input label"

for method in $METHODS; do
    interventions "$method" 0.1 10
    other=""
    case $method in
        *redo) other=" --redo-interval 1000 --redo-tau 0.1" ;;
        *l2init) other=" --l2-init" ;;
        *clip) other=" --weight-clip 2" ;;
        *tortoise) other=" --tortoise-interval 2 --tortoise-ema 0.999" ;;
        *shrink) other=" --shrink-perturb-alpha 0.6" ;;
    esac
    for task in $TASKS; do
        echo "python synth_cifar_plasticity.py --task $task --exp-name $method $switches$other --resume$extra"
    done
done
