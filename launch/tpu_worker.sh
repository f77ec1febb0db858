#!/usr/bin/env bash
# launch/tpu_pod.sh runs this on every worker of a slice, from the copy of the code that it has put there.
# usage: tpu_worker.sh prepare {BUCKET | HOST:/SHARE | ''} FOLDER   mounts the shared folder, sets up the environment
#        tpu_worker.sh train LAUNCH [ARGUMENT ...]                one launch of the training, named LAUNCH
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
    # No caching: what one worker writes, the others must see at once. Orbax renames whole folders of checkpoints.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 \
        --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$2"
}

prepare() { # SOURCE FOLDER
    if [ -n "$1" ]; then mount_share "$@"; fi
    # The software of TPU VMs still ships Python 3.10.
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python3 -m pip install --quiet --user uv
        python3 -m uv python install --quiet 3.12
        PYTHON=$(python3 -m uv python find 3.12)
        export PYTHON
    fi
    extra=tpu,gcs
    # shellcheck source=setup.sh
    . launch/setup.sh
}

train() { # LAUNCH ARGUMENT...
    # When gcloud loses the connection to a worker, it sends the command again. The other workers would not restart, so
    # this launch is over.
    if ! mkdir "$HOME/.ftwt-$1" 2>/dev/null; then exit "$LOST"; fi
    shift
    # The process holds the lock until it exits. One that is left of an earlier launch saves and exits first.
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
