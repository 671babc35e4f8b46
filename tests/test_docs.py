"""What the README promises exists, and what exists the README names."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from relora_train import errors
from relora_train.cli.app import app
from relora_train.settings.load import list_profiles

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_map_names_every_module():
    for package in ("relora_train", "tasks", "flows"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert f"      {path.name} " in README, f"{path.relative_to(ROOT)} is not on the map"
                assert f"    {path.parent.relative_to(ROOT)}/ " in README


def test_the_map_names_nothing_that_is_gone():
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"^      (\w+\.py) ", README, flags=re.MULTILINE):
        assert name in names
    for path in re.findall(r"`((?:deploy|flows|tasks|tests|relora_train|profiles)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_command_is_shown():
    for command in typer.main.get_command(app).commands:
        assert f"relora {command}" in README, f"`relora {command}` is not in the README"


def test_every_error_stands_in_the_table_under_its_exit_code():
    def below(base: type[errors.ReLoRAError]) -> list[type[errors.ReLoRAError]]:
        return [kind for child in base.__subclasses__() for kind in (child, *below(child))]

    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for kind in below(errors.ReLoRAError):
        if kind.__module__ == errors.__name__:
            row = next((line for line in rows if kind.__name__ in line), None)
            assert row is not None, f"{kind.__name__} is undocumented"
            assert str(kind.exit_code) in row.split("|")[1], kind.__name__


def test_every_variable_of_ours_is_explained():
    source = "".join(path.read_text() for path in (ROOT / "relora_train").rglob("*.py"))
    internal = {"RELORA_PARENT_PIPE"}
    for name in set(re.findall(r'"(RELORA_[A-Z0-9_]+)"', source)) - internal:
        assert f"`{name}`" in README, name


def test_every_profile_is_explained():
    explained = (ROOT / "profiles" / "README.md").read_text()
    for path in list_profiles():
        assert f"`{path.stem}`" in explained
        assert path.read_text().startswith("#")


def test_the_two_commands_exist_and_ci_runs_the_second():
    assert "bash deploy/quickstart.sh" in README and "bash deploy/test.sh" in README
    assert "deploy/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_versions_are_pinned_exactly():
    for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line), line
