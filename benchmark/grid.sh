# Sourced by the grids (table*.sh, fig*.sh): what their lines have in common. Each grid prints one command per line.
set -euo pipefail
set -f # no file names for a *

ATARI="Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack Freeway \
Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown"
DMC="acrobot-swingup cartpole-swingup_sparse cheetah-run finger-turn_easy finger-turn_hard hopper-hop quadruped-run \
quadruped-walk reacher-easy reacher-hard walker-run"

extra=${EXTRA:+ ${EXTRA//$'\n'/ }} # flags for every line

rho=0.1 # SAM's, on Atari

choose() { # NAME VALUES: the environment's choice for the variable NAME, among VALUES; without one, all of them
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

choose_one() { # NAME VALUES: the same for a single value, by default the first
    local -n single=$1
    single=${single:-${2%% *}}
    choose "$1" "$2"
    if [[ $single == *" "* ]]; then
        echo "error: $1: one of $2, not $single" >&2
        exit 2
    fi
}

interventions() { # METHOD RHO INTERVAL: $switches of base, of plastic, or of interventions joined by _, as in ln_reset
    local parts=_${1/plastic/ln_sam_crelu_reset}_
    [[ $parts == *_ln_* ]] && switches="--layer-norm" || switches="--no-layer-norm"
    [[ $parts == *_crelu_* ]] && switches+=" --crelu" || switches+=" --no-crelu"
    [[ $parts == *_sam_* ]] && switches+=" --sam-rho $2" || switches+=" --sam-rho 0"
    [[ $parts == *_reset_* ]] && switches+=" --reset-interval $3" || switches+=" --reset-interval 0"
}

atari_line() { # GAME SEED EXP_NAME [FLAGS]: one run of the Atari script, SAM's radius being $rho
    interventions "$3" "$rho" 40000
    echo "python plastic_drq_rainbow_atari.py --env-id $1 --seed $2 --exp-name $3 $switches${4:+ $4} --resume$extra"
}

dmc_line() { # TASK SEED EXP_NAME [FLAGS]: one run of the DeepMind Control script
    interventions "$3" auto 100000
    echo "python plastic_drq_sac_dmc.py --env-id $1 --seed $2 --exp-name $3 $switches${4:+ $4} --resume$extra"
}
