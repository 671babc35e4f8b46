"""The command that a stage was trained by, and the commit of the code, for its manifest: informative only."""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from relora_train.storage.redaction import masked

_ROOT = Path(__file__).resolve().parents[2]


@cache
def made_by() -> dict[str, str]:
    """Return `command`, credentials masked, and `commit`; the latter only for code that runs from a git checkout."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if not (_ROOT / ".git").exists():
        return {"command": masked(command)}
    asked = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {"command": masked(command)}  # no git here, or not the owner of the checkout
    return {"command": masked(command), "commit": told}
