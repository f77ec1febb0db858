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

# In the background, so that a signal sent to this script alone reaches the training, which then saves and stops. A
# background process would ignore Ctrl-C; the terminal sends that to both.
(
    trap - INT
    exec "$venv/bin/python" -m ftwt_jax train ${config:+"$config"} ${workdir:+"$workdir"} "$@"
) &
training=$!
interrupted=1
trap 'interrupted=1; kill -TERM "$training" 2>/dev/null || true' TERM
trap 'interrupted=1' INT
# A signal ends the waiting, not the training.
while [ -n "$interrupted" ]; do
    interrupted='' status=0
    wait "$training" || status=$?
done

if [ "$status" = 0 ]; then
    printf 'to use it yourself:  . %q\nthen, from any folder:  ftwt --help  (or python -m ftwt_jax)\n' \
        "$venv/bin/activate" >&2
fi
exit "$status"
