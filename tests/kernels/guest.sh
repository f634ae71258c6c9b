#!/bin/sh
# What runs in the guest: the lines of $LIST, one after the other, and then the end of the
# machine. All that they write goes to the second serial line; its last line is the verdict.
exec >/dev/ttyS1 2>&1 </dev/null
stty -F /dev/ttyS1 -onlcr
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export CTKEEP_REQUIRE_KERNEL=all
ip link set lo up
status=0
cd "$WHERE" || status=1
# As where the package is installed.
sed '/^#/d' packaging/modules-load.conf | xargs modprobe -a
modprobe br_netfilter
while read -r module program tests; do
    echo "== $module"
    # One test a word.
    # shellcheck disable=SC2086
    "$program" --color never --test-threads 2 --exact $tests || status=1
done <"$LIST"
echo "== verdict $status $(uname -r)"
sync
echo o >/proc/sysrq-trigger
sleep 60
