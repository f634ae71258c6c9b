#!/bin/sh
# Runs the live tests of the core on Debian's kernels, in QEMU.
#
#   run.sh KERNEL...        a series, a version, a release or a suite, as `fetch.sh` takes them
#
# What is run stands in `core`: TESTS="stock seal" takes these modules of it alone, FULL=1 all tests
# of its modules. As many guests run at once as there are processors; the work of one kernel is
# shared out to two.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export PATH="$PATH:/usr/sbin:/sbin"
mkdir -p "${CARGO_TARGET_DIR:-target}/kernels"
cache=$(cd "${CARGO_TARGET_DIR:-target}/kernels" && pwd)

# One word a module.
# shellcheck disable=SC2086
sed '/^#/d' "$here/core" |
    if [ -n "${TESTS-}" ]; then grep -E "^($(echo $TESTS | tr ' ' '|'))( |\$)"; else cat; fi |
    if [ -n "${FULL-}" ]; then cut -d ' ' -f 1; else cat; fi >"$cache/core"
# How the file of the program is called is Cargo's to say.
${CARGO:-cargo} test --locked --no-run --message-format=json --test live >"$cache/build.json"
live=$(sed -n 's/.*"kind":\["test"\].*"name":"live".*"executable":"\([^"]*\)".*/\1/p' "$cache/build.json")
"$live" --list --format terse >"$cache/tests"

for kernel in "$@"; do
    "$here/fetch.sh" "$kernel" "$cache/$kernel"
    part=1
    rm -f "$cache/$kernel"/[12].*
    while read -r module filters; do
        # The whole names, on one line. One filter a word.
        # shellcheck disable=SC2086
        names=$(sed -n "s/^\($module::.*\): test\$/\1/p" "$cache/tests" |
            grep -E "$(echo $filters | tr ' ' '|')" | tr '\n' ' ')
        echo "$module $live $names" >>"$cache/$kernel/$part.list"
        part=$((3 - part))
    done <"$cache/core"
done
for kernel in "$@"; do
    echo "$cache/$kernel" 1
    echo "$cache/$kernel" 2
done | xargs -L 1 -P "$(nproc)" "$here/boot.sh"
