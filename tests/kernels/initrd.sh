#!/bin/sh
# Makes the initial RAM disk of a kernel: busybox, the modules that reach the machine's root over
# 9p, and `init`.
#
#   initrd.sh DIRECTORY RELEASE
set -eu
here=$(cd "$(dirname "$0")" && pwd)
directory=$1
release=$2

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir "$root/bin" "$root/modules"
busybox=$(command -v busybox)
cp "$busybox" "$root/bin/busybox"
# Not every busybox is a static one.
for library in $(ldd "$busybox" 2>/dev/null | grep -o '/[^ ]*'); do
    mkdir -p "$root$(dirname "$library")"
    cp "$library" "$root$library"
done
cp "$here/init" "$root/init"
# In the order of loading; what is built in is no file.
modprobe -d "$directory" -S "$release" --show-depends -a virtio_pci 9pnet_virtio 9p overlay |
    sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r module; do
    name=$(basename "${module%.xz}")
    case $module in
    *.xz) xz -dc "$module" >"$root/modules/$name" ;;
    *) cp "$module" "$root/modules/$name" ;;
    esac
    echo "$name" >>"$root/modules/order"
done
(cd "$root" && find . | cpio --quiet -o -H newc) | gzip -1 >"$directory/initrd"
