# shellcheck shell=bash
# Sourced by the other launchers: makes .venv beside the code if it is missing and installs the project into it.
# usage: extra=GROUP; . setup.sh     GROUP: an optional group of pyproject.toml, such as "test"; empty: none
# environment=FOLDER is another name than .venv.
# offline=BUNDLE installs from a folder that launch/bundle.sh made, without a network. What the machine's Python has, such
# as JAX for its GPU, is used from there.
# PYTHON=python3.12 picks the interpreter; anything from 3.11 on will do.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/${environment:-.venv}
extra=${extra:-}
offline=${offline:-}

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

# The Python that the bundle's wheels are for, and where the bundle has no JAX, one that has.
find_offline_python() {
    local candidate version having=
    version=$(sed -n 's/^python=//p' "$offline/bundle.txt")
    if ! compgen -G "$offline/wheels/jaxlib-*.whl" >/dev/null; then having=jax; fi
    for candidate in ${PYTHON:-} python3 "python$version"; do
        if "$candidate" -c '
import importlib.util, sys
version, having = sys.argv[1:]
sys.exit("{}.{}".format(*sys.version_info) != version or bool(having and not importlib.util.find_spec(having)))
' "$version" "$having" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "ftwt_jax: no Python $version${having:+ with JAX} found, which $offline is for;" \
        "name one: PYTHON=/path/to/python $0, or make another bundle (launch/bundle.sh --python=…${having:+ --cuda})" >&2
    exit 2
}

# An environment that sees the packages of PYTHON; of those, pip comes too, which a bare image may lack in venv.
make_borrowing_venv() { # PYTHON
    "$1" -m venv --clear --without-pip --system-site-packages "$venv" || return
    # Where PYTHON is in an environment itself, "system" would be the Python below it.
    "$1" -c '
import pathlib, site, sys
(packages,) = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
folders = site.getsitepackages() if sys.prefix != sys.base_prefix else []
(packages / "borrowed.pth").write_text("".join(f"{folder}\n" for folder in folders))
' "$venv" || return
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
}

if [ -n "$offline" ] && [ ! -f "$offline/bundle.txt" ]; then
    echo "ftwt_jax: $offline is not a bundle, which would hold a bundle.txt; make one with launch/bundle.sh" >&2
    exit 2
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "$offline" ]; then find=find_offline_python; else find=find_python; fi
    python=$($find) || exit 2
    echo "making $venv with $python" >&2
    if [ -n "$offline" ]; then make_borrowing_venv "$python"; else "$python" -m venv --clear "$venv"; fi || {
        echo "ftwt_jax: could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    }
fi

# One stamp per group, and "test" holds all that is needed without it: nothing is asked of the network again until the
# requirements change. What came from a bundle will do for training, with or without a GPU.
stamp=$venv/.installed${extra:+-$extra}
want=$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum; echo "$root")
installed() { [ "$(cat "$1" 2>/dev/null)" = "$want" ]; }
ready() {
    installed "$stamp" && return
    case $extra in
        '') installed "$venv/.installed-test" || installed "$venv/.installed-offline" ;;
        cuda) installed "$venv/.installed-offline" ;;
        *) false ;;
    esac
}
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
install_all() {
    if [ -n "$offline" ]; then
        install --no-index --find-links "$offline/wheels" -r "$offline/requirements.txt" &&
            install --no-index --no-deps --no-build-isolation -e "$root"
    else
        install -r "$root/requirements.txt" -e "$root${extra:+[$extra]}"
    fi
}
if ! ready; then
    [ -z "$offline" ] || stamp=$venv/.installed-offline
    echo "installing requirements into $venv" >&2
    install_all || {
        echo "ftwt_jax: installing the requirements failed; the lines above say why" >&2
        exit 2
    }
    printf '%s\n' "$want" >"$stamp"
fi
