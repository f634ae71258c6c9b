#!/bin/sh
# make package-test: the package in a small Debian of its own. Prepares the packages and the
# Debian, lets lintian look, and leaves the rest to tests/live/package.rs. Keeps what it has fetched in
# target/package-test; needs root.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
cache=$PWD/target/package-test
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

install=
for tool in debootstrap lintian systemd-nspawn; do
    command -v $tool >/dev/null || install="debootstrap lintian systemd-container"
done
if [ -n "$install" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # One package a word.
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $install </dev/null
fi

mkdir -p "$cache"
rm -f "$cache"/*.deb
for revision in 1 2; do
    # The quick build, that the other tests have made: this one is about what is around the program.
    make -s deb PROFILE=dev WITH="--bins --tests" VERSION="$version-$revision"
    # The next one would throw it away.
    mv "target/debian/ctkeep_$version-${revision}_"*.deb "$cache"
done
old=$(echo "$cache/ctkeep_$version-1_"*.deb)
new=$(echo "$cache/ctkeep_$version-2_"*.deb)
lintian --allow-root --fail-on error "$new"

# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
if [ ! -e "$cache/$suite" ]; then
    rm -rf "$cache/unfinished"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,iproute2 \
        "$suite" "$cache/unfinished" >"$cache/debootstrap.log"
    mv "$cache/unfinished" "$cache/$suite"
fi
rm -rf "$cache/root"
cp -a "$cache/$suite" "$cache/root"
cp "$old" "$cache/root/old.deb"
cp "$new" "$cache/root/new.deb"

CTKEEP_PACKAGE_ROOT=$cache/root cargo test --locked --test live the_package -- --ignored
