#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice: creates the slice, again after each preemption, and deletes it at the end.
# usage: launch/tpu_pod.sh --zone=ZONE --type=v5litepod-16 [--bucket=NAME | --nfs=HOST:/SHARE] [--spot] [--keep]
#            [--name=SLICE] [--runtime=VERSION] [--dry-run]
#            --config=FILE[:ARCH] --workdir={gs://NAME/DIR | /mnt/NAME/DIR} [--config.FIELD=VALUE ...]
#   --bucket   a Cloud Storage bucket, mounted at /mnt/NAME on every worker; best with a hierarchical namespace
#   --nfs      an NFS share, such as one of Filestore, mounted at /mnt/SHARE
#   --keep     keeps the slice at the end, at your cost; the same command, or --name=SLICE, uses it again
#   --dry-run  prints the commands without running them
# The same command continues an interrupted run, on the same slice if it still exists. gcloud must be configured for
# your project; with more than one worker, its key must be in the SSH agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

DONE=0 MISTAKE=2 PREEMPTED=75
MAX_FAILURES=3
POLL_SECONDS=${POLL_SECONDS:-30}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "ftwt: $1" >&2; }

stop() {
    say "error: $1"
    exit "$MISTAKE"
}

# Prints the head of this file.
usage() { awk 'NR > 1 { if (!/^# /) exit; print substr($0, 3) }' "${BASH_SOURCE[0]}"; }

zone='' type='' name='' runtime='' source='' folder='' workdir='' spot='' keep='' dry_run=''
arguments=()
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
        --help | -h)
            usage
            exit
            ;;
        --zone=*) zone=$value ;;
        --type=*) type=$value ;;
        --name=*) name=$value ;;
        --runtime=*) runtime=$value ;;
        --bucket=*) source=${value#gs://} folder=/mnt/${value#gs://} ;;
        --nfs=*) source=$value folder=/mnt/${value##*/} ;;
        --spot) spot=--spot ;;
        --keep) keep=1 ;;
        --dry-run) dry_run=1 ;;
        --workdir=*) workdir=$value arguments+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
[ -n "$zone" ] || stop "--zone=ZONE is missing, for example --zone=us-west4-a"
[ -n "$type" ] || stop "--type=TYPE is missing, for example --type=v5litepod-16"
if [[ $workdir != gs://*/* ]]; then
    [ -n "$source" ] ||
        stop "the workers need a shared folder: --workdir=gs://NAME/DIR, or one below --bucket=NAME or --nfs=HOST:/SHARE"
    [[ $workdir == "$folder"/?* ]] ||
        stop "--workdir=$workdir is not in the folder that all workers share; use --workdir=$folder/DIR"
fi
if [ -z "$runtime" ]; then
    case $type in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime=tpu-ubuntu2204-base ;;
        *) stop "unknown type --type=$type; name the software of its workers with --runtime=VERSION" ;;
    esac
fi
# The name depends on the run, so that two runs never share a slice.
name=${name:-ftwt-$(echo "$zone $type $workdir $source" | cksum | cut -d ' ' -f 1)}

tpus() {
    if [ -n "$dry_run" ]; then
        printf '%q ' gcloud compute tpus "$@" "--zone=$zone" --quiet
        printf '\n'
    else
        gcloud compute tpus "$@" "--zone=$zone" --quiet
    fi
}

create() {
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" \
        ${spot:+"$spot"}
}

delete() { tpus queued-resources delete "$name" --force; }

state() {
    local found
    if found=$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$temporary/error"); then
        echo "$found"
    elif grep -q NOT_FOUND "$temporary/error"; then
        echo NONE
    else
        cat "$temporary/error" >&2
        return 1
    fi
}

# With these flags a lost worker is noticed within minutes; without them, gcloud retries for 15 minutes or more.
on_workers() {
    tpus tpu-vm ssh "$name" --worker=all "--command=$1" \
        --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
}

# Returns the exit status of the training, or 1 if a worker could not be reached.
launch() {
    local quoted worker=ftwt_jax/launch/tpu_worker.sh
    launches=$((launches + 1))
    tpus tpu-vm scp "$temporary/ftwt_jax.tgz" "$name:" --worker=all || return 1
    printf -v quoted '%q ' "$source" "$folder"
    on_workers "mkdir -p ftwt_jax && tar -xzf ftwt_jax.tgz -C ftwt_jax && bash $worker prepare $quoted" || return 1
    printf -v quoted '%q ' "$(date +%s)-$$-$launches" "${arguments[@]}"
    on_workers "bash $worker train $quoted"
}

launches=0
if [ -n "$dry_run" ]; then
    temporary=/tmp
    create
    tpus queued-resources describe "$name" '--format=value(state.state)'
    printf 'tar -C %q -czf /tmp/ftwt_jax.tgz .\n' "$root"
    launch
    [ -n "$keep" ] || delete
    exit "$DONE"
fi

command -v gcloud >/dev/null || stop "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
# gcloud needs its key to copy to several workers; checked now, because that may be hours later.
key=$HOME/.ssh/google_compute_engine
if keys=$(ssh-add -l 2>/dev/null) && print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d ' ' -f 2) &&
    [ -n "$print" ] && [[ $keys != *"$print"* ]]; then
    stop "the SSH agent does not have the key of gcloud; add it with: ssh-add $key"
fi

temporary=$(mktemp -d)
there='' # Whether a slice may exist that must be deleted.
finish() {
    if [ -n "$there" ] && [ "$(state || echo UNKNOWN)" != NONE ]; then
        if [ -n "$keep" ]; then
            say "slice $name is kept and costs money until you delete it:"
            dry_run=1 delete >&2
        else
            say "deleting slice $name"
            delete || say "slice $name could not be deleted and still costs money; delete it by hand"
        fi
    fi
    rm -rf "$temporary"
}
trap finish EXIT
trap 'exit 130' INT TERM

tar -C "$root" --exclude='./.[!.]*' --exclude=./workdirs --exclude=./results --exclude=__pycache__ \
    -czf "$temporary/ftwt_jax.tgz" .

failures=0 # Since the last preemption, or the last hour of training.
failed() { # STATUS WHAT
    failures=$((failures + 1))
    say "$2 (status $1)"
    if [ "$failures" -gt "$MAX_FAILURES" ]; then
        say "giving up after $failures failures in a row; run the same command again to continue"
        exit "$1"
    fi
}

now='' before='' unanswered=0
status='' # The exit status of the last training on this slice.
while :; do
    if now=$(state); then
        unanswered=0
    else
        unanswered=$((unanswered + 1)) now=UNKNOWN
        if [ -z "$before" ] || [ "$unanswered" -gt 20 ]; then
            stop "gcloud cannot read the state of slice $name; see its error above"
        fi
    fi
    [ "$now" = "$before" ] || say "slice $name: $now"
    before=$now
    case $now in
        NONE)
            status='' there=1
            if ! create; then
                [ "$launches" -gt 0 ] || stop "gcloud cannot create slice $name; see its error above"
                failed 1 "gcloud cannot create slice $name"
            fi
            ;;
        SUSPENDED | FAILED)
            there=1
            [ "$now" = SUSPENDED ] || failed 1 "slice $name failed"
            delete || true
            ;;
        ACTIVE)
            there=1
            if [ -n "$status" ] && [ "$status" != "$PREEMPTED" ]; then
                # The slice still exists, so it was not preempted. After two failures, a new slice may have better machines.
                failed "$status" "training ended"
                if [ "$failures" -gt 1 ]; then
                    delete || true
                    status=''
                    continue
                fi
            fi
            say "training on slice $name"
            SECONDS=0 status=0
            launch || status=$?
            case $status in
                "$DONE" | "$MISTAKE") exit "$status" ;;
                "$PREEMPTED") failures=0 ;;
            esac
            [ "$SECONDS" -lt 3600 ] || failures=0
            ;;
    esac
    sleep "$POLL_SECONDS"
done
