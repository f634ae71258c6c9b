#!/bin/sh
# Debian's changelog, which names the package's version and leaves the news to CHANGELOG.md.
set -eu
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
maintainer=$(sed -n 's/^maintainer = "\(.*\)"/\1/p' Cargo.toml)
cat <<END
ctkeep (${VERSION:-$version-1}) unstable; urgency=medium

  * See changelog.gz.

 -- $maintainer  $(date -R -d "@$(git log -1 --format=%ct 2>/dev/null || echo 0)")
END
