#!/bin/sh
# Holds the DaemonSet to the schema of Kubernetes, by a package that brings the schemas along, and
# makes sure that the check finds a fault.
set -eu
cd "$(dirname "$0")/../.."
tools=$PWD/target/kubernetes-validate
if [ ! -x "$tools/bin/kubernetes-validate" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet kubernetes-validate
fi
"$tools/bin/kubernetes-validate" --strict packaging/kubernetes/daemonset.yaml
if sed 's/readOnlyRootFilesystem/readOnlyRoot/' packaging/kubernetes/daemonset.yaml |
    "$tools/bin/kubernetes-validate" --strict --quiet - >/dev/null 2>&1; then
    echo "a misspelt field went unnoticed" >&2
    exit 1
fi
