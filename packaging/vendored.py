#!/usr/bin/env python3
"""Empties the vendored crates that no Linux build needs: cargo asks for each name of the lock file, whatever it builds."""
import json
import pathlib
import subprocess
import sys

TARGETS = ["x86_64-unknown-linux-gnu", "x86_64-unknown-linux-musl", "aarch64-unknown-linux-gnu", "aarch64-unknown-linux-musl"]
vendor = pathlib.Path(sys.argv[1])
needed = set()
for target in TARGETS:
    command = ["cargo", "metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform", target]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    names = {package["id"]: (package["name"], package["version"]) for package in metadata["packages"]}
    needed |= {names[node["id"]] for node in metadata["resolve"]["nodes"]}

for crate in vendor.iterdir():
    checksum = crate / ".cargo-checksum.json"
    manifest = (crate / "Cargo.toml").read_text()
    package = manifest.split("[package]", 1)[1]
    field = lambda key: package.split(f'\n{key} = "', 1)[1].split('"', 1)[0]
    if (field("name"), field("version")) in needed:
        continue
    for file in sorted(crate.rglob("*"), reverse=True):
        if file.is_dir():
            file.rmdir()
        elif file not in (checksum, crate / "Cargo.toml"):
            file.unlink()
    (crate / "src").mkdir()
    (crate / "src/lib.rs").write_text("")
    sums = json.loads(checksum.read_text())
    checksum.write_text(json.dumps({"files": {}, "package": sums["package"]}))
