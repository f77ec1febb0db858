#!/usr/bin/env bash
# A short part of the suite (marker: newest) under Python 3.13 with the newest JAX, in an environment of its own. It is
# skipped, with a line that says so, where there is no such Python or its packages cannot be installed.
# usage: launch/newest.sh [any pytest argument]
set -euo pipefail

newest_python() {
    local candidate
    # pyenv's python3.13 is a script that fails unless that version is switched on.
    for candidate in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3.13; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if ! PYTHON=$(newest_python); then
    echo "ftwt_jax: no python3.13 here; the tests with the newest JAX are skipped" >&2
    exit 0
fi
folder=$(dirname -- "${BASH_SOURCE[0]}")
# By itself, since it ends the shell when it cannot install.
if ! (extra=newest environment=.venv-newest && . "$folder/setup.sh"); then
    echo "ftwt_jax: the newest JAX cannot be installed here; its tests are skipped" >&2
    exit 0
fi
cd -- "$folder/.."
.venv-newest/bin/python -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}")' >&2
# By their names, for other test files import what this environment lacks.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.newest' tests)
exec .venv-newest/bin/python -m pytest -n "${PYTEST_WORKERS:-$(getconf _NPROCESSORS_ONLN)}" --dist loadfile \
    -m newest "$@" "${files[@]}"
