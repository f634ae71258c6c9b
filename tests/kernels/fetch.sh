#!/bin/sh
# Fetches a kernel of Debian and unpacks what the guest needs of it.
#
#   fetch.sh KERNEL DIRECTORY
#
# KERNEL is a series (6.1: the newest of it), the version of a kernel or of its package (6.12.73,
# 6.18.5, 6.1.176), the release as `uname -r` has it (6.1.0-47), or a suite (sid: its newest). Whatever
# the suites below still list is to be had; backports keep the older ones.
#
# Leaves DIRECTORY/vmlinuz, DIRECTORY/lib/modules/RELEASE, DIRECTORY/release and DIRECTORY/initrd.
# Asks for a newer one at most once a day. Its apt has lists and archives of its own, beside
# DIRECTORY: the machine that runs this learns of no other suite. The mirror is the one that the
# machine's own lists name.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kernel=$1
mkdir -p "$2"
cache=$(cd "$2" && pwd)
apt=$cache/../apt

suites="bullseye bookworm bookworm-backports trixie trixie-backports sid"

say() { echo "kernel $kernel: $*" >&2; }

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

# Lists of all suites, at most once a day.
update() {
    main=$(mirror Debian)
    security=$(mirror Debian-Security)
    [ -n "$main" ] || fail "apt knows no list of Debian: run apt-get update (needs Debian)"
    signed='[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
    for suite in $suites; do
        echo "deb $signed $main $suite main"
        case $suite in
        sid | *-backports) ;;
        # Without it there are kernels too, older ones.
        *) [ -z "$security" ] || echo "deb $signed $security $suite-security main" ;;
        esac
    done >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "$apt/state";
Dir::State::status "/dev/null";
Dir::Cache "$apt/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Architecture "amd64";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Retries "3";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
    say "asking Debian for its lists"
    apt apt-get -c "$apt/apt.conf" update -qq
    touch "$apt/updated"
}

apt() { "$@" 2>"$apt/log" || fail "$*: $(cat "$apt/log")"; }

ask() { apt-cache -c "$apt/apt.conf" "$@" 2>/dev/null; }

# Newer kernels come in parts; in linux-base of 7.2 is the list of what is built in.
parts() { # IMAGE
    ask depends --important "$1" |
        sed -n 's/^ *Depends: <*\(linux-\(base\|binary\|modules\)-[^>]*\)>*$/\1/p' | sort -u
}

# All kernels, oldest first, one a line: version, package, suite. Meta-packages, whose names have
# but two numbers, are none; neither are those for clouds and for real time.
kernels() {
    # One package a word.
    # shellcheck disable=SC2046
    ask madison $(ask pkgnames linux-image- | grep -E '^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-amd64$' |
        grep -Ev -- '-(cloud|rt)-amd64$') |
        sed -n 's,^ *\([^ |]*\) *| *\([^ |]*\) *| .* \([^ /]*\)/main amd64 Packages$,\2 \1 \3,p' |
        sort -V
}

# Those that are meant.
meant() {
    case " $suites " in
    *" $kernel "*) grep " $kernel\$" ;;
    *)
        name=$(echo "$kernel" | sed 's/[.+]/\\&/g')
        grep -E "^$name([-.+~]| )| linux-image-$name([-.+]|-amd64 )" ;;
    esac
}

[ -n "$(find "$apt/updated" -mtime -1 2>/dev/null)" ] || update
kernels >"$apt/kernels"
meant <"$apt/kernels" >"$cache/meant" || fail "no suite has it; they have: $(
    cut -d ' ' -f 1 "$apt/kernels" | sed 's/[-~].*//' | sort -uV | tr '\n' ' ')"
# The newest that is whole: of some there is no modules package any more.
image=
while [ -z "$image" ] && [ -s "$cache/meant" ]; do
    version=$(sed -n '$s/ .*//p' "$cache/meant")
    image=$(sed -n '$s/^[^ ]* \([^ ]*\) .*/\1/p' "$cache/meant")
    sed -i '$d' "$cache/meant"
    for part in $(parts "$image"); do
        [ -n "$(ask madison "$part")" ] || {
            say "$image is not whole: there is no $part"
            image=
            break
        }
    done
done
rm "$cache/meant"
[ -n "$image" ] || fail "no suite has a whole one"
release=${image#linux-image-}
if [ "$(cat "$cache/release" 2>/dev/null)" = "$release $version" ]; then
    touch "$cache/checked"
    exit 0
fi

say "fetching $image $version"
new=$cache/new
rm -rf "$new"
mkdir -p "$new/deb"
cd "$new/deb"
# One package a word.
# shellcheck disable=SC2046
apt apt-get -c "$apt/apt.conf" download -qq "$image=$version" $(parts "$image")
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
