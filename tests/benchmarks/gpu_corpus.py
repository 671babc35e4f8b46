"""The corpus of the experiment table2-60m-short, as one file to carry to a machine with a GPU.

    python tests/benchmarks/gpu_corpus.py           # writes gpu-corpus.jsonl, which git ignores

The Python files of packages that this project installs anyway, at the versions of deploy/constraints.txt. The
experiment pins what comes out by data.content_sha256.
"""

import json
import sys
from pathlib import Path

from relora_train.data.python_sources import package_files

PACKAGES = (
    "Jinja2==3.1.6", "SQLAlchemy==2.0.58", "fonttools==4.68.0", "mpmath==1.3.0", "networkx==3.6.1", "sympy==1.14.0"
)  # fmt: skip
NAME = "gpu-corpus.jsonl"


def main() -> None:
    path = Path(*sys.argv[1:2]) / NAME
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for source in package_files(PACKAGES):
            text = source.path.read_text(encoding="utf-8", errors="replace")
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
