#!/usr/bin/env bash
# Figures of one machine, a GPU as a rule, in parts of known length, what says most first. It needs no network, given a
# bundle. Each figure is added to $OUT/figures.jsonl the moment it is there; one that is there is not measured again.
# usage: results/gpu.sh [--offline=BUNDLE] [--tiny] [PART…]
#   PART       at most   what it does (default: all, in this order)
#   digits       120 s   ./launch/local.sh's run, logged in local.log
#   tests        180 s   the tests marked `device`, logged in tests.log
#   fashion      180 s   two epochs of ResNet-20 on Fashion-MNIST, then two of its gates
#   training     270 s   images per second of training steps, dense and gated, against a plain Flax loop
#   inference    150 s   milliseconds of inference at batch 1, 64 and 256: dense, masked, compact
#   --offline  a folder that launch/bundle.sh made; without it, what is missing is installed from the network
#   --tiny     small networks and little of everything, to see that all parts run
# OUT=FOLDER       where figures and logs go (default results/gpu)
# WORKDIRS=FOLDER  where the trainings go (default workdirs/gpu); they resume there
set -uo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
parts=() offline='' tiny=()
for argument in "$@"; do
    case $argument in
        --offline=?*) offline=${argument#*=} ;;
        --tiny) tiny=(--tiny) ;;
        digits | tests | fashion | training | inference) parts+=("$argument") ;;
        *)
            echo "usage: $0 [--offline=BUNDLE] [--tiny] [digits|tests|fashion|training|inference ...]; got $argument" >&2
            exit 2
            ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(digits tests fashion training inference)
out=${OUT:-$root/results/gpu}
runs=${WORKDIRS:-$root/workdirs/gpu}
mkdir -p "$out" "$runs" || exit 2
out=$(cd -- "$out" && pwd) runs=$(cd -- "$runs" && pwd)
[ -z "$offline" ] || offline=$(cd -- "$offline" && pwd) || exit 2
figures=$out/figures.jsonl
tiny_run=("--config.model.plan=(8,'M',16)" --config.batch_size=128 --config.baseline.epochs=2 --config.gates.epochs=2)

extra=
if nvidia-smi -L >/dev/null 2>&1; then
    # shellcheck disable=SC2034 # read by setup.sh
    extra=cuda
fi
# shellcheck source=../launch/setup.sh
. "$root/launch/setup.sh"
python=$venv/bin/python
cd -- "$root" || exit 2

is_there() { # PART NAME: whether the figure is there, which is then said
    grep -qsF "{\"part\": \"$1\", \"name\": \"$2\"," "$figures" && echo "$1: $2: is there already"
}
# Ends a program after this many seconds; that of small networks on a busy machine only much later.
within() { timeout $(($1 * (${#tiny[@]} > 0 ? 6 : 1))) "${@:2}"; }
record() { "$python" results/figures.py "$figures" "$@"; } # run|tests NAME FILE SECONDS

train() { # SECONDS NAME ARGUMENT…: a training by launch/local.sh, once, and its figures
    local limit=$1 name=$2 start=$SECONDS
    shift 2
    is_there run "$name" && return
    within "$limit" launch/local.sh ${offline:+"--offline=$offline"} --workdir="$runs/$name" "$@" >>"$out/local.log" 2>&1 || {
        tail -n 3 "$out/local.log"
        return 1
    }
    record run "$name" "$runs/$name" $((SECONDS - start))
}

part_digits() {
    local flags=()
    [ ${#tiny[@]} = 0 ] || flags=("${tiny_run[@]}")
    train 120 digits "${flags[@]}"
}

part_tests() {
    local start=$SECONDS files status=0
    is_there tests device && return
    # By their names, since other test files import what a bare machine lacks.
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.device' tests)
    [ ${#tiny[@]} = 0 ] || files=(tests/gating/test_ranking.py)
    within 180 "$python" -m pytest -q -p no:cacheprovider -m device "--junit-xml=$runs/tests.xml" "${files[@]}" \
        >"$out/tests.log" 2>&1 || status=$?
    tail -n 3 "$out/tests.log"
    # 0: all passed; 1: some failed, which is a figure, too.
    [ "$status" -le 1 ] && record tests device "$runs/tests.xml" $((SECONDS - start)) && return "$status"
}

# Two trainings, so that the first figure is there soon.
part_fashion() {
    local name=fashion_resnet20 flags=(--config="$root/configs/fashion_mnist.py:resnet20" --config.baseline.epochs=2)
    if [ ${#tiny[@]} -gt 0 ]; then
        name=fashion_vgg_bn flags=(--config="$root/configs/fashion_mnist.py:vgg_bn" "${tiny_run[@]}")
    fi
    [ -z "$offline" ] || flags+=("--config.data.data_dir=$offline/data/fashion-mnist")
    train 90 "${name}_dense" "${flags[@]}" --config.gates.epochs=0 &&
        train 90 "${name}_gated" "${flags[@]}" --config.gates.epochs=2 \
            --config.baseline.epochs=0 --config.init_from="$runs/${name}_dense"
}

part_training() { within 270 "$python" results/time_training.py "$figures" 210 "${tiny[@]}"; }

part_inference() {
    local trained=()
    [ ! -f "$runs/digits/evaluation.json" ] || trained=("--trained=$runs/digits")
    within 150 "$python" results/time_inference.py "$figures" 90 "${trained[@]}" "${tiny[@]}"
}

# ---- the arms of the study: a part `study` of their own comes here, after those that take minutes ----

failed=()
for part in "${parts[@]}"; do
    start=$SECONDS
    "part_$part" || failed+=("$part")
    echo "== $part: $((SECONDS - start)) s"
done
echo "figures: $figures"
[ ${#failed[@]} = 0 ] || { echo "not whole: ${failed[*]}" >&2; exit 1; }
