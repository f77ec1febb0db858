#!/usr/bin/env bash
# Trains the runs of results/README.md, one network and one seed at a time, and keeps the small files of each run here.
# usage: results/run.sh resnet20|mobilenet_v1 SEED BASELINE GATES [KIND…]
#   BASELINE, GATES: epochs of the two stages
#   KIND: dense dense_long half half_early half_joint half_static seventy any narrow_half narrow_seventy
#     (default: all)
# PYTHON=… sets the interpreter (default .venv/bin/python),
# WORKDIRS=… the folder of the runs (default workdirs/results).
# Finished runs are not trained again.
set -euo pipefail
usage() { echo "usage: $0 resnet20|mobilenet_v1 SEED BASELINE GATES [KIND…]" >&2; exit 2; }
[ $# -ge 4 ] || usage
arch=$1 seed=$2 baseline=$3 gates=$4
chosen=("${@:5}")
. "$(dirname -- "${BASH_SOURCE[0]}")/runs.sh"
budgets=0.3,0.4,0.5,0.6,0.7,0.8

# Widths that reduce the MACs by 50 % and by 70 %.
case $arch in
resnet20) width=1.0 half=0.72 seventy=0.5625 ;;
mobilenet_v1) width=0.25 half=0.175 seventy=0.1325 ;;
*) usage ;;
esac

run() { # KIND FLAG…: trains, and keeps config and figures
    local kind=$1 name=${arch}_$1_seed$seed
    shift
    if ! wanted "$kind" "$name"; then return; fi
    "$python" -m ftwt_jax train --config="configs/fashion_mnist.py:$arch" --config.seed="$seed" \
        --config.baseline.epochs="$baseline" --config.gates.epochs="$gates" --workdir="$runs/$name" "$@"
    [ -f "$runs/$name/evaluation.json" ] || "$python" -m ftwt_jax evaluate --workdir="$runs/$name"
    if [ "$kind" = any ]; then "$python" -m ftwt_jax evaluate --workdir="$runs/$name" --budgets="$budgets"; fi
    keep "$name"
}

dense=$runs/${arch}_dense_seed$seed
gated() { run "$@" --config.model.width="$width" --config.init_from="$dense"; }

run dense --config.model.width="$width" --config.gates.epochs=0
gated half --config.gates.budget=0.5
gated half_joint --config.gates.budget=0.5 --config.gates.mode=joint
gated half_static --config.gates.budget=0.5 --config.gates.static=True
gated seventy --config.gates.budget=0.7
gated any --config.gates.budget=0.6 --config.gates.budgets="(0.3,0.8)"
# The same number of epochs, but gates from the second epoch on.
total=$((baseline + gates))
run half_early --config.model.width="$width" --config.gates.budget=0.5 \
    --config.baseline.epochs=1 --config.gates.epochs=$((total - 1))
# Dense networks of the same width and narrower, trained for as long as baseline and gates together.
run dense_long --config.model.width="$width" --config.gates.epochs=0 --config.baseline.epochs="$total"
run narrow_half --config.model.width="$half" --config.gates.epochs=0 --config.baseline.epochs="$total"
run narrow_seventy --config.model.width="$seventy" --config.gates.epochs=0 --config.baseline.epochs="$total"
