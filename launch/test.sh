#!/usr/bin/env bash
# Set-up if needed, then linter, formatter, type checker and the whole test suite.
# usage: launch/test.sh [--slow] [any pytest argument]
set -euo pipefail
extra="test"
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$root"

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"

# A worker more than cores, since many tests wait for a process of their own.
workers=${PYTEST_WORKERS:-$(($(getconf _NPROCESSORS_ONLN) + 1))}
exec "$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
