#!/bin/sh
# Fetches the newest kernel of a series from Debian and unpacks what the guest needs of it.
#
#   fetch.sh SERIES DIRECTORY       SERIES is 5.10, 6.1, 6.12 or sid
#
# Leaves DIRECTORY/vmlinuz, DIRECTORY/lib/modules/RELEASE, DIRECTORY/release and DIRECTORY/initrd.
# Asks for a newer one at most once a day. Its apt has lists and archives of its own: the machine
# that runs this learns of no other suite. The mirror is the one that the machine's own lists name.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
series=$1
mkdir -p "$2"
cache=$(cd "$2" && pwd)

case $series in
5.10) suite=bullseye ;;
6.1) suite=bookworm ;;
6.12) suite=trixie ;;
sid) suite=sid ;;
*)
    echo "no kernel $series: there are 5.10, 6.1, 6.12 and sid" >&2
    exit 2
    ;;
esac

say() { echo "kernel $series: $*" >&2; }

# What is there is good enough where nothing newer is to be had.
fail() {
    say "$*"
    [ -e "$cache/initrd" ] || exit 1
    say "going on with $(cat "$cache/release") of the cache"
    exit 0
}

if [ -n "$(find "$cache/checked" -mtime -1 2>/dev/null)" ]; then
    exit 0
fi

# The first list that the machine has of Debian, and of its security updates.
mirror() {
    # The words in the dollars are apt's.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' "Label: $1" 2>/dev/null | sed -n 1p
}
main=$(mirror Debian)
security=$(mirror Debian-Security)
[ -n "$main" ] || fail "apt knows no list of Debian: run apt-get update (needs Debian)"
signed='[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
mkdir -p "$cache/apt/state/lists/partial" "$cache/apt/cache/archives/partial"
{
    echo "deb $signed $main $suite main"
    # Without it there is a kernel too, an older one.
    [ $suite = sid ] || [ -z "$security" ] || echo "deb $signed $security $suite-security main"
} >"$cache/apt/sources.list"
cat >"$cache/apt/apt.conf" <<END
Dir::Etc::sourcelist "$cache/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "$cache/apt/state";
Dir::State::status "/dev/null";
Dir::Cache "$cache/apt/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Architecture "amd64";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
apt() { "$@" 2>"$cache/apt/log" || fail "$*: $(cat "$cache/apt/log")"; }

depends() { # PACKAGE PATTERN
    apt-cache -c "$cache/apt/apt.conf" depends --important "$1" |
        sed -n "s/^ *Depends: \($2\)\$/\1/p" | sort -u
}

say "asking $suite for its newest"
apt apt-get -c "$cache/apt/apt.conf" update -qq
image=$(depends linux-image-amd64 'linux-image-.*-amd64' | sed -n 1p)
[ -n "$image" ] || fail "$suite has no linux-image-amd64"
release=${image#linux-image-}
version=$(apt-cache -c "$cache/apt/apt.conf" show --no-all-versions "$image" |
    sed -n 's/^Version: //p')
if [ "$(cat "$cache/release" 2>/dev/null)" = "$release $version" ]; then
    touch "$cache/checked"
    exit 0
fi

say "fetching $image $version"
new=$cache/new
rm -rf "$new"
mkdir -p "$new/deb"
# Newer ones come in parts.
packages="$image $(depends "$image" 'linux-\(base\|binary\|modules\)-.*')"
cd "$new/deb"
# One package a word.
# shellcheck disable=SC2086
apt apt-get -c "$cache/apt/apt.conf" download -qq $packages
for package in "$new"/deb/*.deb; do
    # Of the drivers the virtual ones, and no hardware.
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$new" \
        --exclude='*/kernel/sound' --exclude='*/kernel/drivers/net/*/*' \
        --exclude='*/kernel/drivers/[!nv]*' --exclude='*/kernel/drivers/n[!e]*' \
        --exclude='*/kernel/drivers/v[!i]*' --exclude='*/kernel/drivers/video' \
        --exclude='*/usr/share' --exclude='*/System.map*'
done
cd "$cache"
rm -r "$new/deb"
# In /lib or /usr/lib; and as it is called there or in /boot.
for tree in "$new"/lib/modules/* "$new"/usr/lib/modules/*; do
    [ ! -d "$tree" ] || break
done
mkdir -p "$new/kept/usr/lib/modules"
mv "$tree" "$new/kept/usr/lib/modules/$release"
tree=$new/kept/usr/lib/modules/$release
ln -s usr/lib "$new/kept/lib"
if [ -e "$tree/vmlinuz" ]; then
    mv "$tree/vmlinuz" "$new/kept/vmlinuz"
else
    mv "$new/boot/vmlinuz-$release" "$new/kept/vmlinuz"
fi
depmod -b "$new/kept" "$release"
echo "$release $version" >"$new/kept/release"
"$here/initrd.sh" "$new/kept" "$release"

(cd "$cache" && rm -rf initrd release vmlinuz lib usr)
mv "$new/kept"/* "$cache"
rm -rf "$new"
touch "$cache/checked"
