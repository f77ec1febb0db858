#!/usr/bin/env bash
# Trains a gated network on this machine: set-up if needed, then baseline, estimate, gates, evaluation, table.
# usage: launch/local.sh [--offline=BUNDLE] [--config=FILE[:ARCH]] [--workdir=DIR] [--config.FIELD=VALUE ...]
#   --offline=BUNDLE   sets up without a network, from a folder that launch/bundle.sh made on another machine
set -euo pipefail
extra=
# With an NVIDIA GPU, JAX's build for it.
if nvidia-smi -L >/dev/null 2>&1; then extra=cuda; fi

# Prints the head of this file.
usage() { awk 'NR > 1 { if (!/^# /) exit; print substr($0, 3) }' "${BASH_SOURCE[0]}"; }

# What is not given: the bundled digits, in a folder beside the code.
config='' workdir='' offline='' arguments=()
for argument in "$@"; do
    case $argument in
        --help | -h)
            usage
            exit
            ;;
        --offline=?*)
            # shellcheck disable=SC2034 # read by setup.sh
            offline=${argument#*=}
            continue
            ;;
        --offline | --offline=)
            echo "ftwt_jax: --offline takes the folder that launch/bundle.sh made: --offline=BUNDLE" >&2
            exit 2
            ;;
        --config=* | -config=* | --config | -config) config=given ;;
        --workdir=* | -workdir=* | --workdir | -workdir) workdir=given ;;
    esac
    arguments+=("$argument")
done
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
[ -n "$workdir" ] || arguments=("--workdir=$root/workdirs/digits" "${arguments[@]}")
[ -n "$config" ] || arguments=("--config=$root/configs/digits.py" "${arguments[@]}")

# The next steps first, since the training takes the place of this script: signals and the exit status are its own.
printf 'this environment is entered by  . %q  then, from any folder:  ftwt --help\n' "$venv/bin/activate" >&2
exec "$venv/bin/python" -m ftwt_jax train "${arguments[@]}"
