#!/bin/sh
# dist.sh PROFILE TARGET...: the files of a release in target/dist. A source archive with all crates; static
# binaries that are built from it, without network, so that it is tried; the packages of target/; checksums.
set -eu
profile=$1
shift
cargo=${CARGO:-cargo}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
name=ctkeep-$version
when=$(git log -1 --format=%ct)
out=$PWD/target/dist
rm -rf "$out"
mkdir -p "$out"
test -z "$(git status --porcelain)" || echo "dist: the archive has the last commit, not what is uncommitted" >&2

pack() { # ARCHIVE FOLDER: the same bytes for the same commit
    tar -C "$out" --sort=name --mtime="@$when" --owner=0 --group=0 --numeric-owner --mode=go=rX,u=rwX -cJf "$out/$1" "$2"
}

git archive --prefix="$name/" HEAD | tar -x -C "$out"
mkdir -p "$out/$name/.cargo"
(cd "$out/$name" && $cargo vendor --locked --quiet vendor >.cargo/config.toml)
# Crates for other systems alone: cargo wants them named, and nobody their code.
(cd "$out/$name" && ./packaging/vendored.py vendor)
pack "$name-vendored.tar.xz" "$name"

for target; do
    arch=${target%%-*}
    # shellcheck disable=SC2015
    rustup target add "$target" >/dev/null 2>&1 && rustc --print target-libdir --target "$target" >/dev/null || {
        echo "dist: left out: $target has no standard library here" >&2
        continue
    }
    # Musl's start files and rustc's own linker are enough for every processor.
    (cd "$out/$name" && env "CARGO_TARGET_$(echo "$target" | tr 'a-z-' 'A-Z_')_LINKER=rust-lld" \
        CARGO_TARGET_DIR="$out/../static" $cargo build --offline --locked --profile "$profile" --target "$target")
    built=target/static/$target/$(test "$profile" = dev && echo debug || echo "$profile")/ctkeep
    here=$name-$arch-linux
    mkdir "$out/$here"
    install -m 0755 "$built" "$out/$here/ctkeep"
    cp README.md CHANGELOG.md LICENSE LICENSE-MIT LICENSE-APACHE etc/ctkeep.toml.example packaging/ctkeep.service "$out/$here"
    run=
    test "$arch" = "$(uname -m)" || run=$(command -v "qemu-$arch-static" || command -v "qemu-$arch" || echo none)
    if [ "$run" = none ]; then
        echo "dist: $here was built and not run: no qemu-$arch" >&2
    else
        $run "$built" --version
    fi
    pack "$here.tar.xz" "$here"
    rm -r "${out:?}/$here"
done
rm -r "${out:?}/$name"

for package in target/debian/ctkeep_"$version"*.deb target/rpm/ctkeep-"$version"*.rpm; do
    ! test -e "$package" || cp "$package" "$out"
done
(cd "$out" && sha256sum -- * >SHA256SUMS && cat SHA256SUMS)
