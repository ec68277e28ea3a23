# Sourced by the grids (table*.sh, fig*.sh): what their lines have in common. Each grid prints one command per line.
set -euo pipefail
set -f # no file names for a *

ATARI="Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack Freeway \
Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown"
DMC="acrobot-swingup cartpole-swingup_sparse cheetah-run finger-turn_easy finger-turn_hard hopper-hop quadruped-run \
quadruped-walk reacher-easy reacher-hard walker-run"

extra=${EXTRA:+ ${EXTRA//$'\n'/ }} # flags for every line

choose() { # NAME VALUES: narrow the variable NAME to what the environment asks for; without that, all of VALUES
    local -n chosen=$1
    local value
    chosen=${chosen:-$2}
    for value in $chosen; do
        if [[ " $2 " != *" $value "* ]]; then
            echo "error: $1: $value is not one of $2" >&2
            exit 2
        fi
    done
}

choose_seeds() { # NUMBER: SEEDS from the environment, or 1 to NUMBER
    local seed
    SEEDS=${SEEDS:-$(seq -s " " "$1")}
    for seed in $SEEDS; do
        if [[ ! $seed =~ ^[0-9]+$ ]]; then
            echo "error: SEEDS: $seed is not a whole number" >&2
            exit 2
        fi
    done
}

interventions() { # METHOD RHO INTERVAL: $switches of base, of plastic, or of interventions joined by _, as in ln_reset
    local parts=_${1/plastic/ln_sam_crelu_reset}_
    [[ $parts == *_ln_* ]] && switches="--layer-norm" || switches="--no-layer-norm"
    [[ $parts == *_crelu_* ]] && switches+=" --crelu" || switches+=" --no-crelu"
    [[ $parts == *_sam_* ]] && switches+=" --sam-rho $2" || switches+=" --sam-rho 0"
    [[ $parts == *_reset_* ]] && switches+=" --reset-interval $3" || switches+=" --reset-interval 0"
}

atari_line() { # GAME SEED EXP_NAME METHOD [FLAGS]: one run of the Atari script, SAM's radius being $rho or 0.1
    interventions "$4" "${rho:-0.1}" 40000
    echo "python plastic_drq_rainbow_atari.py --env-id $1 --seed $2 --exp-name $3 $switches${5:+ $5} --resume$extra"
}

dmc_line() { # TASK SEED EXP_NAME METHOD [FLAGS]: one run of the DeepMind Control script
    interventions "$4" auto 100000
    echo "python plastic_drq_sac_dmc.py --env-id $1 --seed $2 --exp-name $3 $switches${5:+ $5} --resume$extra"
}
