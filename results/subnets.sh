#!/usr/bin/env bash
# Trains subnets of other numbers, sources, features and routers, from one baseline and one set of gates.
# usage: results/subnets.sh digits|fashion [NAME…]
#   NAME: k1 k2 k4 k8 k16 targets plain narrow multiple (default: all)
# PYTHON=…, WORKDIRS=…: see run.sh. Finished runs are not trained again.
set -euo pipefail
case ${1:-} in
    digits)
        config=configs/digits.py:resnet20
        length=() epochs=30
        ;;
    fashion)
        config=configs/fashion_mnist.py:resnet20
        length=(--config.baseline.epochs=2 --config.gates.epochs=2) epochs=1
        ;;
    *)
        echo "usage: $0 digits|fashion [NAME…]" >&2
        exit 2
        ;;
esac
data=$1
chosen=("${@:2}")
. "$(dirname -- "${BASH_SOURCE[0]}")/runs.sh"
length+=(--config.gates.budget=0.5)

base=$runs/subnets_${data}_gates
"$python" -m ftwt_jax train --config=$config --workdir="$base" "${length[@]}"

arm() { # NAME [FLAG of studies/subnet_study.py…] -- [FLAG of train…]
    local name=$1 run=subnets/${data}_$1 design=() kept=(checkpoints estimate.json)
    shift
    while [ "$1" != -- ]; do design+=("$1"); shift; done
    shift
    if ! wanted "$name" "$run"; then return; fi
    # The baseline and gates of the run above, as if they had been trained there.
    if [ ! -d "$runs/$run" ]; then
        mkdir -p "$runs/$run"
        for one in "${kept[@]}"; do cp -r "$base/$one" "$runs/$run"; done
        if [ "$name" = targets ]; then rm -r "$runs/$run/checkpoints/gated"; fi
    fi
    "$python" -m studies.subnet_study "${design[@]}" train --config=$config --workdir="$runs/$run" "${length[@]}" \
        --config.subnets.epochs=$epochs "$@"
    if [[ $name = k4 ]]; then "$python" -m studies.subnet_study look --workdir="$runs/$run"; fi
    keep "$run"
    if [ -f "$runs/$run/look.json" ]; then cp "$runs/$run/look.json" "results/$run"; fi
}

for count in 1 2 4 8 16; do arm k$count -- --config.subnets.count=$count; done
arm targets -- --config.subnets.count=4 --config.gates.epochs=0
arm plain --features=plain -- --config.subnets.count=4
arm narrow --router_share=0.005 -- --config.subnets.count=4
arm multiple -- --config.subnets.count=4 --config.subnets.multiple=1
