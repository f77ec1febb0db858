# shellcheck shell=bash
# Sourced by run.sh and heads.sh: the folder of the runs, which of them to train, and which files to keep.
# usage: chosen=(NAME…); . runs.sh     an empty list chooses all

# shellcheck disable=SC2034,SC2154 # shared with the file that sources this one
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
runs=${WORKDIRS:-$root/workdirs/results}
cd -- "$root" || exit

wanted() { # NAME RUN: whether to train it: it was chosen, and its results are not here yet
    [[ ${#chosen[@]} = 0 || " ${chosen[*]} " == *" $1 "* ]] && [ ! -f "results/$2/evaluation.json" ]
}

keep() { # RUN: copies its small files here, without the path of this machine
    mkdir -p "results/$1"
    for file in config.json environment.json estimate.json evaluation.json budgets.json; do
        if [ -f "$runs/$1/$file" ]; then sed "s#$runs/##g" "$runs/$1/$file" >"results/$1/$file"; fi
    done
}
