#!/usr/bin/env bash
# Set up .venv and train the quickstart: `relora run quickstart`. Arguments go to that command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" ""
exec relora run quickstart "$@"
