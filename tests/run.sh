#!/usr/bin/env bash
# All tests. A few hundred of them drive the kernel in real time, four at once; where one to three of those
# fail, each is run once more with nothing beside it. Whatever fails then, and any failure of another kind,
# fails the run; what passed only by itself is named at the end, and is to be looked into.
set -uo pipefail
CARGO=${CARGO:-cargo}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

$CARGO test --locked --no-fail-fast 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
[ "$status" = 0 ] && exit 0

targets=$(sed -n 's/^    `\(.*\)`$/\1/p' "$log")
mapfile -t failed < <(sed -n 's/^test \([a-z0-9_:]*\) \.\.\. FAILED$/\1/p' "$log" | sort -u)
if [ "$targets" != "--test live" ] || [ ${#failed[@]} -eq 0 ] || [ ${#failed[@]} -gt 3 ]; then
    exit "$status"
fi
for name in "${failed[@]}"; do
    echo "once more, by itself: $name"
    RUST_TEST_THREADS=1 $CARGO test --locked --test live -- --exact "$name" || exit 1
done
printf 'failed beside other tests, passed by itself: %s\n' "${failed[@]}"
