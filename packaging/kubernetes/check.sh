#!/bin/sh
# Holds the DaemonSet, as it is and with the patch for the shield, to the schema of Kubernetes, by a
# package that brings the schemas along, and makes sure that the check finds a fault.
set -eu
cd "$(dirname "$0")/../.."
tools=$PWD/target/kubernetes-validate
if [ ! -x "$tools/bin/jsonpatch" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet kubernetes-validate jsonpatch
fi
# The DaemonSet from standard input, patched.
shielded() {
    "$tools/bin/python" -c '
import jsonpatch, sys, yaml
patch = jsonpatch.JsonPatch(yaml.safe_load(open("packaging/kubernetes/shield.yaml")))
sets = [it for it in yaml.safe_load_all(sys.stdin) if it["kind"] == "DaemonSet"]
yaml.dump_all(map(patch.apply, sets), sys.stdout)'
}
validate() {
    "$tools/bin/kubernetes-validate" --strict "$@"
}
validate packaging/kubernetes/daemonset.yaml
shielded <packaging/kubernetes/daemonset.yaml >"$tools/shielded.yaml"
validate "$tools/shielded.yaml"
if shielded <"$tools/shielded.yaml" >/dev/null 2>&1; then
    echo "the patch fits twice" >&2
    exit 1
fi
if sed 's/readOnlyRootFilesystem/readOnlyRoot/' packaging/kubernetes/daemonset.yaml |
    validate --quiet - >/dev/null 2>&1; then
    echo "a misspelt field went unnoticed" >&2
    exit 1
fi
