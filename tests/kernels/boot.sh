#!/bin/sh
# Boots a kernel that `fetch.sh` has left in DIRECTORY and runs tests in it.
#
#   boot.sh DIRECTORY PART
#
# DIRECTORY/PART.list names them, a module a line: `MODULE PROGRAM TEST...`. Prints a line for each; everything that
# they wrote is in DIRECTORY/PART.log, what the kernel said in DIRECTORY/PART.console. Fails unless
# all of them pass.
#
# The guest's clock counts instructions, two nanoseconds each, and runs with the real one only while
# the guest is idle (icount): a second in which a test expects something holds as much work as on a
# real machine, however slow the emulation is and however busy the machine. For speed's sake there
# is one processor (so two guests fit on two), nothing is moved in memory (code that is where it was
# need not be translated again: half of the time), and nobody is protected from Spectre.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
where=$(cd "$here/../.." && pwd)
directory=$(cd "$1" && pwd)
part=$2
kernel=$(basename "$directory")
log=$directory/$part.log
# A guest that hangs is ended.
limit=${KERNEL_TIMEOUT:-1800}

began=$(date +%s)
timeout --foreground "$limit" qemu-system-x86_64 \
    -machine q35 -cpu Nehalem -smp 1 -m "${KERNEL_MEMORY:-1024}" -nodefaults -display none -no-reboot \
    -accel tcg,thread=single,tb-size=512 -icount shift=1 \
    -kernel "$directory/vmlinuz" -initrd "$directory/initrd" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off norandmaps nokaslr tsc=reliable \
        MODULES=$directory JOB=$here/guest.sh LIST=$directory/$part.list WHERE=$where" \
    -fsdev local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=machine,mount_tag=machine \
    -serial "file:$directory/$part.console" -serial stdio </dev/null 2>&1 | tee "$log" |
    sed -un "/^== /h; /^test result:/{G; s/^test result: \(.*\); 0 measured.*finished in \(.*\)\n== \(.*\)/kernel $kernel: \3: \1 (\2 of the guest's time)/p;}"

verdict=$(sed -n 's/^== verdict //p' "$log")
took=$(($(date +%s) - began))
case $verdict in
"0 "*) echo "kernel $kernel: ${verdict#0 }: all passed in $took s" ;;
*)
    # What failed and why, or how far it came.
    if [ -n "$verdict" ]; then
        sed -n '/^failures:$/,/^test result:/p' "$log" >&2
    else
        tail -n 20 "$directory/$part.console" "$log" >&2
        echo "kernel $kernel: ended without a verdict after $took s (at most $limit s)" >&2
    fi
    echo "kernel $kernel: FAILED: $log" >&2
    exit 1
    ;;
esac
