#!/usr/bin/env bash
# Table 3: SAM and Reset† on a frozen, pretrained encoder, at replay ratio 2 and 4, 26 games, 5 seeds: 780 runs.
#
#     STAGE=pretrain bash benchmark/table3_pretrained.sh | bash benchmark/run_local.sh   # first: 26 encoders, on videos
#     bash benchmark/table3_pretrained.sh | bash benchmark/run_local.sh -j 3
#
# MODELS says where the encoders are, {} standing for the game; the default is where the first stage puts them.
# VIDEOS, in the first stage, says where the DQN Replay dataset's files of each game are; else random play is recorded.
# ANCHOR=pretrained pulls the encoder to its pretrained weights, not to fresh ones: frozen, it stays as it is, and a reset is of
# the head alone (exp-names in _anchored).
source "$(dirname "$0")/grid.sh"
choose_one STAGE "finetune pretrain"
choose GAMES "$ATARI"
script="python plastic_pretrained_finetune.py"

if [[ $STAGE == pretrain ]]; then
    for game in $GAMES; do
        echo "$script --mode pretrain --env-id $game${VIDEOS:+ --video-dir $(printf %q "${VIDEOS//"{}"/$game}")} --resume$extra"
    done
    exit
fi
choose METHODS "base reset sam_reset"
choose RATIOS "2 4"
choose_one ANCHOR "init pretrained"
models=${MODELS:-"runs/{}__pretrain__1/model.pth"}
for seed in ${SEEDS:-$(seq 5)}; do # one seed of everything before the second
    for game in $GAMES; do
        for ratio in $RATIOS; do
            model=$(printf %q "${models//"{}"/$game}")
            for method in $METHODS; do
                flags="--pretrained-path $model --freeze-backbone --replay-ratio $ratio"
                [[ $method == sam* ]] && flags+=" --sam-rho 0.1" || flags+=" --sam-rho 0"
                [[ $method == *reset ]] && flags+=" --reset-interval 40000" || flags+=" --reset-interval 0"
                [[ $method == *reset ]] && anchor=$ANCHOR || anchor=init # without resets, nothing is shrunk
                flags+=" --shrink-perturb-alpha 0.6 --shrink-perturb-anchor $anchor"
                name=pretrained_${method}_rr$ratio
                [[ $anchor == pretrained ]] && name+=_anchored
                echo "$script --env-id $game --seed $seed --exp-name $name $flags --resume$extra"
            done
        done
    done
done
