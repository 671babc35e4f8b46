#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, types, import contracts, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" "[dev]"
ruff format --check .
ruff check .
mypy
lint-imports
# Four processes on two cores, a file of tests at a time: most tests wait for processes of their own.
exec python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
