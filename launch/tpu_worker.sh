#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a slice, from the copy of the code that it has put there.
# usage: tpu_worker.sh prepare {BUCKET | HOST:/SHARE} FOLDER     the shared folder, and the environment
#        tpu_worker.sh train LAUNCH [ARGUMENT ...]                one launch of the training; LAUNCH: its name
set -euo pipefail

LOST=76
GCSFUSE=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.8.0/gcsfuse_3.8.0_amd64.deb
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

install_packages() { sudo apt-get -o DPkg::Lock::Timeout=300 install -y -q "$@"; }

mount_share() { # SOURCE FOLDER
    if mountpoint -q "$2"; then return; fi
    sudo mkdir -p "$2"
    if [[ $1 == *:/* ]]; then
        command -v mount.nfs >/dev/null || install_packages nfs-common
        sudo mount -t nfs "$1" "$2"
        return
    fi
    if ! command -v gcsfuse >/dev/null; then
        curl -fsSL -o /tmp/gcsfuse.deb "$GCSFUSE"
        install_packages /tmp/gcsfuse.deb
    fi
    sudo chown "$(id -u)" "$2"
    # What one worker writes, the others have to see at once: nothing is remembered. Checkpoints are renamed into place.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 \
        --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$2"
}

prepare() { # SOURCE FOLDER
    mount_share "$@"
    # The software of TPU VMs still comes with Python 3.10.
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python3 -m pip install --quiet --user uv
        python3 -m uv python install --quiet 3.12
        PYTHON=$(python3 -m uv python find 3.12)
        export PYTHON
    fi
    extra=tpu
    # shellcheck source=setup.sh
    . launch/setup.sh
}

train() { # LAUNCH ARGUMENT...
    # gcloud gives the command again to a worker that it has lost the connection to; the others would not start anew
    # with it, so that launch is over.
    if ! mkdir "$HOME/.ftwt-$1" 2>/dev/null; then exit "$LOST"; fi
    shift
    # The lock goes with the process. One that an earlier launch has left behind saves and ends first.
    exec 9>>"$HOME/.ftwt.lock"
    if ! flock -n 9; then
        kill -TERM "$(cat "$HOME/.ftwt.pid")" || true
        flock -w 300 9 || exit "$LOST"
    fi
    echo $$ >"$HOME/.ftwt.pid"
    exec .venv/bin/python -m ftwt_jax train --distributed "$@"
}

case ${1:-} in
    prepare | train) "$@" ;;
    *) exit 2 ;;
esac
