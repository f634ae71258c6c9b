#!/bin/sh
# What `ctkeep top` costs on a table of 2 000 000 entries with 100 000 sockets: by the bench of that name, in a guest, since
# the size of the table is the whole machine's.
#
#   top.sh KERNEL BENCH
#
# In the guest the same file is the program that `guest.sh` runs: its last argument is the bench.
set -eu
if [ -n "${JOB-}" ]; then
    for bench; do :; done
    # For a terminal.
    mkdir -p /dev/pts
    mount -t devpts -o ptmxmode=666 devpts /dev/pts
    sysctl -qw net.netfilter.nf_conntrack_buckets=1048576 net.netfilter.nf_conntrack_max=2200000
    CTKEEP_ENTRIES=${ENTRIES:-2000000} exec "$bench" --bench
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${CARGO_TARGET_DIR:-target}/kernels"
cache=$(cd "${CARGO_TARGET_DIR:-target}/kernels" && pwd)
"$here/fetch.sh" "$1" "$cache/$1"
echo "top $here/top.sh $2" >"$cache/$1/top.list"
KERNEL_MEMORY=5120 KERNEL_TIMEOUT=10800 "$here/boot.sh" "$cache/$1" top
sed -n '/^[0-9]* sockets of/,/^== verdict/p' "$cache/$1/top.log"
