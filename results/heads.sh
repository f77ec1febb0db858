#!/usr/bin/env bash
# Trains several designs of gate heads for one epoch each, from the baseline of
# `results/run.sh mobilenet_v1 SEED 8 4 dense`.
# usage: results/heads.sh SEED [NAME…]
#   NAME: paper full full_mean own own_mean both hidden rare joint (default: all)
# PYTHON=…, WORKDIRS=…: see run.sh. Finished runs are not trained again.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 SEED [NAME…]" >&2; exit 2; }
seed=$1
chosen=("${@:2}")
. "$(dirname -- "${BASH_SOURCE[0]}")/runs.sh"

heads() { # NAME [FLAG of studies/head_study.py…] -- [FLAG of train…]
    local name=$1 run=mobilenet_v1_head_$1_seed$seed design=()
    shift
    while [ "$1" != -- ]; do design+=("$1"); shift; done
    shift
    if ! wanted "$name" "$run"; then return; fi
    "$python" -m studies.head_study "${design[@]}" train --config=configs/fashion_mnist.py:mobilenet_v1 \
        --config.seed="$seed" --config.model.width=0.25 --config.init_from="$runs/mobilenet_v1_dense_seed$seed" \
        --config.gates.budget=0.6 --config.gates.epochs=1 --config.gates.lr=0.02 --config.gates.cooldown=0.8 \
        --config.checkpoint_every=1000 --workdir="$runs/$run" "$@"
    keep "$run"
}

full=--config.gates.depthwise=full mean=--config.gates.pool=mean
heads paper -- $full --config.gates.norm=softmax
heads full -- $full
heads full_mean -- $full $mean
heads own --
heads own_mean -- $mean
heads both --both -- $full
heads hidden --hidden=32 -- $full
heads rare --rare=0.5 --
heads joint -- --config.gates.mode=joint
