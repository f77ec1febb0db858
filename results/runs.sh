# shellcheck shell=bash
# Sourced by run.sh and heads.sh: where runs go, which of them are wanted, and what is kept of each.
# usage: chosen=(NAME…); . runs.sh     none chosen: all of them

# shellcheck disable=SC2034,SC2154 # shared with the file that sources this one
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
runs=${WORKDIRS:-$root/workdirs/results}
cd -- "$root" || exit

wanted() { # NAME RUN: whether it was asked for, and is not kept yet
    [[ ${#chosen[@]} = 0 || " ${chosen[*]} " == *" $1 "* ]] && [ ! -f "results/$2/evaluation.json" ]
}

keep() { # RUN: what is small of it, without the folder of this machine
    mkdir -p "results/$1"
    for file in config.json environment.json estimate.json evaluation.json budgets.json; do
        if [ -f "$runs/$1/$file" ]; then sed "s#$runs/##g" "$runs/$1/$file" >"results/$1/$file"; fi
    done
}
