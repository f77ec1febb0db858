#!/usr/bin/env bash
# Set-up if needed, then linter, formatters, type checker and the whole test suite; then, unless pytest is given files or
# tests of your choice, a short part of it with the newest JAX (launch/newest.sh).
# usage: launch/test.sh [--slow] [any pytest argument]
set -euo pipefail
extra="test"
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$root"

stage() { echo "== $1" >&2; }

stage "ruff: lint and format"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .

stage "clang-format: the kernels in C++"
"$venv/bin/clang-format" --dry-run --Werror ftwt_jax/*/native/*.cc ftwt_jax/*/native/*.h

stage "mypy: types"
"$venv/bin/mypy"

stage "pytest: the suite"
# A worker more than cores, since many tests wait for a process of their own.
workers=${PYTEST_WORKERS:-$(($(getconf _NPROCESSORS_ONLN) + 1))}
"$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"

case "$*" in
    '' | --slow)
        stage "pytest: a part of the suite with the newest JAX"
        "$root/launch/newest.sh"
        ;;
esac
