#!/usr/bin/env bash
# Install deploy/automations.yaml on the Prefect server that PREFECT_API_URL names. Safe to repeat: what it installed
# before is replaced.
set -euo pipefail
file="$(dirname "${BASH_SOURCE[0]}")/automations.yaml"
for name in $(sed -n 's/^  - name: //p' "$file"); do
    while prefect automation inspect "$name" >/dev/null 2>&1; do
        id=$(prefect automation inspect "$name" --json | sed -n 's/^[][ {]*"id": "\([0-9a-f-]*\)".*/\1/p' | head -1)
        prefect --no-prompt automation delete --id "$id"
    done
done
prefect automation create --from-file "$file"
