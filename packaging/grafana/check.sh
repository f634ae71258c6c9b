#!/bin/sh
# Holds the dashboard to Grafana's own types of one, by the package that brings them along, and makes
# sure that the check finds a fault.
set -eu
cd "$(dirname "$0")/../.."
tools=$PWD/target/grafana-schema
if [ ! -x "$tools/node_modules/.bin/tsc" ]; then
    mkdir -p "$tools"
    npm install --prefix "$tools" --silent --no-audit --no-fund --ignore-scripts @grafana/schema typescript
fi
# The dashboard as a literal of that type, in which words of an enumeration are its members.
check() {
    {
        echo 'import { type Dashboard, MappingType, ThresholdsMode } from "@grafana/schema";'
        printf 'export const dashboard: Dashboard = '
        sed 's/"mode": "absolute"/"mode": ThresholdsMode.Absolute/; s/"type": "value"/"type": MappingType.ValueToText/' \
            packaging/grafana/ctkeep.json | sed "$1"
    } >"$tools/dashboard.ts"
    (cd "$tools" && node_modules/.bin/tsc --noEmit --strict --skipLibCheck --module nodenext \
        --target es2022 dashboard.ts)
}
check ''
if check 's/"fieldConfig"/"fieldConfg"/' >/dev/null; then
    echo "a misspelt field went unnoticed" >&2
    exit 1
fi
