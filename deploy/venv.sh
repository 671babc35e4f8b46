# Sourced by quickstart.sh and test.sh: makes .venv from the pinned constraints and puts it first on PATH.
# $1: extras to install, such as "[dev]". Does nothing when that was done before with the same files.
# RELORA_TORCH=cpu or cuda says which build of PyTorch to take; without it, an NVIDIA device decides.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ReLoRA Train needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 2
fi

torch=${RELORA_TORCH:-auto}
case $torch in
    cpu | cuda) because="RELORA_TORCH=$torch" ;;
    auto)
        if compgen -G '/dev/nvidia[0-9]*' > /dev/null || nvidia-smi -L > /dev/null 2>&1; then
            torch=cuda because="an NVIDIA device is here"
        else
            torch=cpu because="no NVIDIA device is here; RELORA_TORCH=cuda takes CUDA's"
        fi ;;
    *)
        echo "RELORA_TORCH is '$torch'. Set it to cpu or cuda, or leave it out." >&2
        exit 2 ;;
esac
[ "$(uname -s)" = Linux ] || torch=only because="this system has one"

stamp="$root/.venv/.installed${1:-}"
wanted="$(cat pyproject.toml deploy/constraints.txt | cksum) $torch"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    case $torch in
        cuda) size="some 3 GB to download, 6 GB on disk" ;;
        *) size="some 0.4 GB to download, 2 GB on disk" ;;
    esac
    echo "Setting up .venv from deploy/constraints.txt, once: $size. PyTorch's $torch build: $because."
    "$python" -m venv .venv
    pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
    version=$(sed -n 's/^torch==//p' deploy/constraints.txt)
    installed=$( (pip show torch || true) 2>/dev/null | sed -n 's/^Version: //p')
    case "$torch ${RELORA_TORCH:-} $installed" in
        "cuda "*+cpu | "cpu cpu "*[0-9]) pip uninstall --quiet --yes torch && installed= ;; # the other build
    esac
    what=(--constraint deploy/constraints.txt --editable ".${1:-}")
    backend=--torch-backend=${RELORA_TORCH:-auto}
    [ "$backend" != --torch-backend=cuda ] || backend= # the package index's own build
    if ! command -v uv > /dev/null || ! uv pip install --python .venv/bin/python $backend "${what[@]}"; then
        if [ "$torch" = cpu ] && [ -z "$installed" ]; then
            pip install --retries 1 --timeout 15 --no-deps --index-url https://download.pytorch.org/whl/cpu \
                "torch==$version" || echo "PyTorch's CPU index cannot be reached. The package index's build may be CUDA's: 3 GB."
        fi
        pip install "${what[@]}"
    fi
    echo "$wanted" > "$stamp"
    unset -f pip
fi
export PATH="$root/.venv/bin:$PATH"
unset PYTHONHOME PYTHONPATH
