#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, types, import contracts, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" "[dev]"
ruff format --check .
ruff check .
mypy
lint-imports
# Four processes on two cores: most tests wait for processes of their own. tests/conftest.py says what goes together.
exec python -m pytest --numprocesses 4 --dist loadgroup --no-loadscope-reorder "$@"
