#!/usr/bin/env bash
# Trains a gated network on this machine: set-up if needed, then baseline, estimate, gates, evaluation, table.
# usage: launch/local.sh [--config=FILE[:ARCH]] [--workdir=DIR] [--config.FIELD=VALUE ...]
set -euo pipefail
extra=
# With an NVIDIA GPU, JAX's build for it.
if nvidia-smi -L >/dev/null 2>&1; then extra=cuda; fi
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# What is not given: the bundled digits, in a folder beside the code.
config=--config=$root/configs/digits.py
workdir=--workdir=$root/workdirs/digits
for argument in "$@"; do
    case $argument in
        --config=* | -config=* | --config | -config) config= ;;
        --workdir=* | -workdir=* | --workdir | -workdir) workdir= ;;
    esac
done

# The next steps first, since the training takes the place of this script: signals and the exit status are its own.
printf 'this environment is entered by  . %q  then, from any folder:  ftwt --help\n' "$venv/bin/activate" >&2
exec "$venv/bin/python" -m ftwt_jax train ${config:+"$config"} ${workdir:+"$workdir"} "$@"
