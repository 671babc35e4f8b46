"""Files of the directory that a command runs in are not imported, whatever they are called and by whichever process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Every module of the standard library, the packages that a training needs, and ours.
NAMES = sorted(
    {name for name in sys.stdlib_module_names if not name.startswith("_")}
    | {"numpy", "torch", "transformers", "safetensors", "tokenizers", "prefect", "uvicorn", "pydantic", "rich", "typer"}
    | {"relora_train", "flows", "tasks", "sitecustomize", "usercustomize"}
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory full of files that tell when they are executed, and then fail."""
    made = tmp_path_factory.mktemp("hostile")
    for name in NAMES:
        (made / f"{name}.py").write_text(
            f"open({str(made / 'executed')!r}, 'a').write({name!r} + '\\n')\nraise SystemError('of the directory')\n"
        )
    return made


def relora(directory: Path, *arguments: str) -> str:
    """What the installed command says, run in the directory."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [Path(sys.executable).with_name("relora"), *arguments],
        cwd=directory,
        env={**environment, "RELORA_CACHE": str(directory / "cache"), "RELORA_STORE": str(directory / "store")},
        capture_output=True,
        text=True,
    )
    executed = directory / "executed"
    assert not executed.exists(), executed.read_text()
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_run_by_two_ranks_with_preparation_server_and_trainer(directory: Path):
    sets = ["launch.nproc_per_node=2", "launch.device=cpu", "launch.threads=1", "data.workers=2", "schedule.cycles=1"]
    relora(directory, "run", "smoke", "--run-id", "r", *(word for each in sets for word in ("--set", each)))
    assert "cycle-1" in relora(directory, "show", "r")


def test_an_evaluation_and_a_benchmark_whose_workers_are_processes_of_their_own(directory: Path):
    relora(directory, "evaluate", "r@cycle-1")
    relora(directory, "bench", "smoke", "--rounds", "1", "--steps", "1")
