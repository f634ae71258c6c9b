#!/bin/sh
# Runs the live tests of the core on Debian's kernels, in QEMU.
#
#   run.sh KERNEL...        a series, a version, a release or a suite, as `fetch.sh` takes them
#
# What is run stands in `core`: PROGRAMS="stock live_seal" takes these of it alone, FULL=1 all tests
# of its programs. As many guests run at once as there are processors; the work of one kernel is
# shared out to two.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export PATH="$PATH:/usr/sbin:/sbin"
mkdir -p "${CARGO_TARGET_DIR:-target}/kernels"
cache=$(cd "${CARGO_TARGET_DIR:-target}/kernels" && pwd)

# One word a program.
# shellcheck disable=SC2086
sed '/^#/d' "$here/core" |
    if [ -n "${PROGRAMS-}" ]; then grep -E "^($(echo $PROGRAMS | tr ' ' '|'))( |\$)"; else cat; fi |
    if [ -n "${FULL-}" ]; then cut -d ' ' -f 1; else cat; fi >"$cache/core"
# One argument a word. How the file of a program is called is Cargo's to say.
# shellcheck disable=SC2046
${CARGO:-cargo} test --locked --no-run --message-format=json $(sed 's/\([^ ]*\).*/--test \1/' "$cache/core") \
    >"$cache/build.json"
sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)","src_path".*"executable":"\([^"]*\)".*/\1 \2/p' \
    "$cache/build.json" >"$cache/built"

for kernel in "$@"; do
    "$here/fetch.sh" "$kernel" "$cache/$kernel"
    part=1
    rm -f "$cache/$kernel"/[12].*
    while read -r program filters; do
        sed -n "s,^$program .*,& $filters,p" "$cache/built" >>"$cache/$kernel/$part.list"
        part=$((3 - part))
    done <"$cache/core"
done
for kernel in "$@"; do
    echo "$cache/$kernel" 1
    echo "$cache/$kernel" 2
done | xargs -L 1 -P "$(nproc)" "$here/boot.sh"
