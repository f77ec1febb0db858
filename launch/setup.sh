# shellcheck shell=bash
# Sourced by the other launchers: makes .venv beside the code if it is missing and installs the project into it.
# usage: extra=GROUP; . setup.sh     GROUP: an optional group of pyproject.toml, such as "test"; empty: none
# environment=FOLDER is another name than .venv.
# PYTHON=python3.12 picks the interpreter; anything from 3.11 on will do.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/${environment:-.venv}
extra=${extra:-}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "ftwt_jax: no Python from 3.11 on found; install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || exit 2
    echo "making $venv with $python" >&2
    "$python" -m venv --clear "$venv" || {
        echo "ftwt_jax: could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    }
fi

# One stamp per group, and "test" holds all that is needed without it: nothing is asked of the network again until the
# requirements change.
stamp=$venv/.installed${extra:+-$extra}
want=$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum; echo "$root")
installed() { [ "$(cat "$1" 2>/dev/null)" = "$want" ]; }
if ! installed "$stamp" && ! { [ -z "$extra" ] && installed "$venv/.installed-test"; }; then
    echo "installing requirements into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$root/requirements.txt" -e "$root${extra:+[$extra]}" >&2 || {
        echo "ftwt_jax: installing the requirements failed; the lines above say why" >&2
        exit 2
    }
    printf '%s\n' "$want" >"$stamp"
fi
