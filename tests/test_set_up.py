"""deploy/venv.sh: which build of PyTorch it asks for. A script stands in for pip: the real one fetches gigabytes."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"
A_DEVICE_IS_HERE = bool(list(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi"))

PYTHON = """#!/bin/sh
case "$*" in
    -c*) exit 0 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"show torch") cat "$LOG.torch" 2> /dev/null ;;
    *) echo "$*" >> "$LOG"; case "$*" in *--index-url*) exit "$INDEX" ;; esac ;;
esac
"""


@dataclass
class Checkout:
    root: Path

    def program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def set_up(self, *, index: int = 0, expect: int = 0, **environment: str) -> tuple[str, list[str]]:
        """What the script said, and what pip and uv were asked for by it."""
        log = self.root / "log"
        log.unlink(missing_ok=True)
        path = f"{self.root / 'bin'}:/usr/bin:/bin"
        given = {"PATH": path, "PYTHON": str(self.root / "bin" / "python"), "LOG": str(log), "INDEX": str(index)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", 'source deploy/venv.sh "[dev]"'], cwd=self.root,
            env={**given, **environment}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "deploy").mkdir()
    for name in ("pyproject.toml", "deploy/venv.sh", "deploy/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    made = Checkout(tmp_path)
    made.program("python", PYTHON)
    return made


def test_cpu_wheels_are_taken_from_pytorch_in_the_pinned_version_and_the_rest_as_ever(checkout: Checkout):
    said, asked = checkout.set_up(RELORA_TORCH="cpu")
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "deploy" / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned and len(asked) == 2
    assert CPU_INDEX in asked[0] and asked[0].endswith(f"--no-deps {CPU_INDEX} torch=={pinned[1]}")
    assert asked[1].endswith("install --constraint deploy/constraints.txt --editable .[dev]")
    assert "PyTorch's cpu build: RELORA_TORCH=cpu" in said and "0.4 GB to download" in said
    assert checkout.set_up(RELORA_TORCH="cpu") == ("", []), "done once"


@pytest.mark.skipif(A_DEVICE_IS_HERE, reason="this machine has an NVIDIA device")
def test_without_a_device_cpu_wheels_are_the_default(checkout: Checkout):
    said, asked = checkout.set_up()
    assert CPU_INDEX in asked[0] and "no NVIDIA device is here; RELORA_TORCH=cuda takes CUDA's" in said


def test_with_a_device_cuda_is_the_default_and_replaces_cpu_wheels(checkout: Checkout):
    checkout.program("nvidia-smi", "#!/bin/sh\n")
    (checkout.root / "log.torch").write_text("Name: torch\nVersion: 2.13.0+cpu\n")
    said, asked = checkout.set_up()
    assert "cuda build: an NVIDIA device is here" in said and "3 GB to download" in said
    assert asked[0].endswith("uninstall --quiet --yes torch") and CPU_INDEX not in asked[1] and len(asked) == 2


def test_cpu_wheels_replace_another_build_only_when_they_are_asked_for(checkout: Checkout):
    (checkout.root / "log.torch").write_text("Version: 2.13.0\n")
    asked = checkout.set_up(RELORA_TORCH="cpu")[1]
    assert asked[0].endswith("uninstall --quiet --yes torch") and CPU_INDEX in asked[1] and len(asked) == 3
    if not A_DEVICE_IS_HERE:
        shutil.rmtree(checkout.root / ".venv")
        assert len(checkout.set_up()[1]) == 1, "what was downloaded serves as well"


def test_an_index_that_cannot_be_reached_is_done_without(checkout: Checkout):
    said, asked = checkout.set_up(RELORA_TORCH="cpu", index=1)
    assert "PyTorch's CPU index cannot be reached" in said and asked[1].endswith("--editable .[dev]")


@pytest.mark.parametrize(
    ("torch", "option"), [("", "--torch-backend=auto "), ("cpu", "--torch-backend=cpu "), ("cuda", "")]
)
def test_uv_chooses_by_itself_where_it_is_installed(checkout: Checkout, torch: str, option: str):
    checkout.program("uv", '#!/bin/sh\necho "uv $*" >> "$LOG"; exit "$INDEX"\n')
    environment = {"RELORA_TORCH": torch} if torch else {}
    want = f"uv pip install --python .venv/bin/python {option}--constraint deploy/constraints.txt --editable .[dev]"
    assert checkout.set_up(**environment)[1] == [want]
    shutil.rmtree(checkout.root / ".venv")
    asked = checkout.set_up(**environment, index=1)[1]
    assert asked[0] == want and asked[-1].endswith("--editable .[dev]"), "pip is there when uv fails"


def test_a_build_that_does_not_exist_is_refused(checkout: Checkout):
    said, asked = checkout.set_up(RELORA_TORCH="rocm", expect=2)
    assert "RELORA_TORCH is 'rocm'. Set it to cpu or cuda" in said and asked == []
