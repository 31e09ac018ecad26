#!/bin/sh
# Run Python with network ports, processes and temporary files of its own, so that two runs of tests
# on one machine do not meet. It needs Linux and root, and ends with the process that started it.
# `--check` says by its exit status whether this machine allows that.
SET_UP='
    ip link set lo up
    mkdir -p -m 1777 /tmp/ray
    mkdir -p -m 700 /tmp/halyard-0 /run/netns
    for each in /tmp/ray /tmp/halyard-0 /run/netns; do
        mount -t tmpfs -o mode=700 tmpfs "$each"
    done
    TMPDIR=$(mktemp -d /tmp/halyard-tests-XXXX)
    export TMPDIR
    trap '\''rm -rf "$TMPDIR"'\'' EXIT
'
# The shell stays, to reap the processes that tests leave behind.
RUN='"$0" "$@" || exit $?'
PYTHON="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python"

in_namespaces() {
    exec setpriv --pdeathsig KILL \
        unshare --net --pid --mount --fork --mount-proc --kill-child sh -ec "$@"
}

if [ "$1" = --check ]; then
    [ "$(id -u)" -eq 0 ] || exit 1
    in_namespaces "$SET_UP" > /dev/null 2>&1
fi
in_namespaces "$SET_UP$RUN" "$PYTHON" "$@"
