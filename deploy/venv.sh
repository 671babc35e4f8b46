# Sourced by quickstart.sh and test.sh: makes .venv from the pinned constraints and puts it first on PATH.
# $1: extras to install, such as "[dev]". Does nothing when that was done before with the same files.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ReLoRA Train needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 2
fi

stamp="$root/.venv/.installed${1:-}"
wanted=$(cat pyproject.toml deploy/constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv from deploy/constraints.txt (once; some minutes) ..."
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
        --constraint deploy/constraints.txt --editable ".${1:-}"
    echo "$wanted" > "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
unset PYTHONHOME PYTHONPATH
