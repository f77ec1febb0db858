#!/usr/bin/env bash
# Set-up if needed, then the documentation as a site in build/docs. A broken link or a faulty docstring ends it.
# usage: launch/docs.sh [any argument of mkdocs build]
set -euo pipefail
extra=docs
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$root"

exec "$venv/bin/python" -m mkdocs build --strict "$@"
