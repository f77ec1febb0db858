#!/usr/bin/env bash
# Makes a folder that holds what a machine without a network needs: wheels, Fashion-MNIST and the sources.
# usage: launch/bundle.sh [--python=3.12] [--platform=x86_64] [--installed=FILE] [--cuda] [--all] [--data=DIR] BUNDLE
#   --python     the target's Python (default: this machine's)
#   --platform   the target's processor, x86_64 (default) or aarch64, or a tag of pip's such as manylinux_2_35_x86_64
#   --installed  the output of `pip freeze` on the target: what is there is left out; names alone will do, too. Without
#                it, JAX and what JAX needs are taken to be there, and nothing else
#   --cuda       also JAX for NVIDIA GPUs, and all that JAX needs: some gigabytes
#   --all        also what only image folders, TFDS, plots, reports and TensorBoard need
#   --data       folder of Fashion-MNIST's four *-ubyte.gz (default: where Debian's dataset-fashion-mnist puts them)
# There:  tar -xzf BUNDLE/ftwt_jax.tar.gz && ftwt_jax/launch/local.sh --offline=BUNDLE
# PYTHON=… is the interpreter that runs this; it needs pip.
set -euo pipefail
folder=$(dirname -- "${BASH_SOURCE[0]}")
for python in ${PYTHON:-} "$folder/../.venv/bin/python" python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" "$folder/bundle.py" "$@"
    fi
done
echo "ftwt_jax: no Python from 3.11 on with pip found; name one: PYTHON=/path/to/python3.11 $0" >&2
exit 2
