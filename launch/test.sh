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

# A worker per core; the run without a network must not notice.
exec "$venv/bin/python" -m pytest -n "${PYTEST_WORKERS:-auto}" --dist loadfile --no-loadscope-reorder "$@"
