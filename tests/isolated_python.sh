#!/bin/sh
# Run Python with network ports, processes and temporary files of its own, so that two runs of tests
# on one machine do not meet. It ends with the process that started it.
# `--check` says by its exit status whether this machine allows that.
SET_UP='
    ip link set lo up
    for each in /tmp/ray "/tmp/halyard-$(id -u)" /run/netns; do
        mkdir -p "$each"
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
    if [ "$(id -u)" -eq 0 ]; then as_root=''; else as_root='--user --map-root-user'; fi
    # shellcheck disable=SC2086
    exec setpriv --pdeathsig KILL \
        unshare $as_root --net --pid --mount --fork --mount-proc --kill-child sh -ec "$@"
}

if [ "$1" = --check ]; then
    in_namespaces "$SET_UP" > /dev/null 2>&1
fi
in_namespaces "$SET_UP$RUN" "$PYTHON" "$@"
