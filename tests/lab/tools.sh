#!/bin/sh
# Installs the programs that the demonstration drives; with the word `shield` also the compiler of
# the shield's packet program, with the word `tests` all that the tests want, and with the word
# `kernels` what boots other kernels. Does nothing, and needs no privilege, when all of them are
# present.
set -eu

# Where Debian keeps them; not in everybody's PATH.
PATH=$PATH:/usr/sbin:/sbin

packages=
need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null 2>&1 && return
    case " $packages " in
    *" $2 "*) ;;
    *) packages="${packages:+$packages }$2" ;;
    esac
}

need iptables iptables
need ip6tables iptables
need nft nftables
need conntrack conntrack
need ip iproute2
need ss iproute2
need sysctl procps
need setpriv util-linux
need unshare util-linux
if [ "${1-}" = shield ] || [ "${1-}" = tests ]; then
    need clang clang
    # Headers, and no program in anybody's PATH.
    if [ -e /etc/debian_version ] && [ ! -e /usr/include/bpf/bpf_helpers.h ]; then
        packages="${packages:+$packages }libbpf-dev"
    fi
fi
if [ "${1-}" = tests ]; then
    need ethtool ethtool
    need prometheus prometheus
    need strace strace
    need tmux tmux
    # Not every distribution has it as a package; without it one test is skipped.
    ! grep -qx 'ID=debian' /etc/os-release || need chromium chromium
    # A library, and no program in anybody's PATH.
    if [ -e /etc/debian_version ] && ! ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1; then
        packages="${packages:+$packages }libfaketime"
    fi
elif [ "${1-}" = kernels ]; then
    need qemu-system-x86_64 qemu-system-x86
    need busybox busybox-static
    need cpio cpio
    need depmod kmod
    need xz xz-utils
    need gzip gzip
fi

if [ -z "$packages" ]; then
    exit 0
fi

install="apt-get install --no-install-recommends $packages"
if [ ! -e /etc/debian_version ]; then
    echo "missing programs; Debian's packages of them are called: $packages" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing programs; install them with: sudo $install" >&2
    exit 1
fi

echo "installing: $packages" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
remove=$log
# Debian starts a service when it is installed, and at each boot. Of Prometheus the tests want
# nothing but its programs.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 0755 $policy
    remove="$log $policy"
fi
# One file a word.
# shellcheck disable=SC2086
trap 'rm -f $remove' EXIT
# One package a word.
# shellcheck disable=SC2086
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } \
    >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    echo "failed: $install" >&2
    exit 1
fi
case " $packages " in
*" prometheus "*)
    ! command -v systemctl >/dev/null 2>&1 || systemctl --quiet disable prometheus ||
        echo "prometheus starts with the machine; systemctl disable prometheus ends that" >&2
    ;;
esac
