"""The documents promise what exists, and what exists is documented."""

import ast
import re
from pathlib import Path

import pytest
from conftest import LONGEST

from relora_train import errors
from relora_train.cli.app import command_line
from relora_train.settings.load import list_profiles

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LIBRARY = (ROOT / "relora_train" / "README.md").read_text()
COMMANDS = (ROOT / "relora_train" / "cli" / "README.md").read_text()
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"), *(ROOT / ".github").rglob("*.md")]
    if not {".venv", "build", "node_modules", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
MODULES = [path for package in ("relora_train", "tasks", "flows") for path in (ROOT / package).rglob("*.py")]


def test_every_room_has_a_place_in_the_library_and_a_document():
    for room in (ROOT / "relora_train").iterdir():
        if (room / "__init__.py").exists():
            assert f"[{room.name}]({room.name}/README.md)" in LIBRARY
            assert (room / "README.md").exists(), room.name
        elif room.suffix == ".py" and room.name != "__init__.py":
            assert f"`{room.name}`" in LIBRARY, room.name


def test_every_module_says_in_a_line_what_it_holds():
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring or path.name == "__init__.py", path
        assert path.name != "__init__.py" or path.read_text().count("\n") <= 1, f"{path}: a docstring at most"


def test_what_a_docstring_points_to_is_there():
    for path in MODULES:
        for mentioned in re.findall(r"\b(?:relora_train|tasks|flows|tests)/[\w/]+\.py\b", path.read_text()):
            assert (ROOT / mentioned).exists(), f"{path}: {mentioned}"


def test_no_file_is_too_long_to_be_read_in_one_go():
    limits = [(path, 300) for path in MODULES] + [(path, 450) for path in (ROOT / "tests").rglob("*.py")]
    assert [path for path, limit in limits if path.read_text().count("\n") > limit] == []


def test_the_files_that_begin_first_are_there():
    for name in LONGEST:
        assert (ROOT / "tests" / f"{name}.py").exists(), name


def test_the_readme_and_those_of_the_rooms_are_short():
    for path in [ROOT / "README.md", ROOT / "flows" / "README.md", *(ROOT / "relora_train").rglob("README.md")]:
        assert path.read_text().count("\n") <= 150, path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_points_to_is_there(document: Path):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:deploy|flows|tasks|tests|relora_train|profiles)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path == "deploy/.env", path  # the user's own


def test_every_command_is_shown():
    for command in command_line().commands:
        assert f"`relora {command}`" in COMMANDS, f"`relora {command}` is not in cli/README.md"


def test_every_error_stands_in_the_table_under_its_exit_code():
    def below(base: type[errors.ReLoRAError]) -> list[type[errors.ReLoRAError]]:
        return [kind for child in base.__subclasses__() for kind in (child, *below(child))]

    rows = [line for line in COMMANDS.splitlines() if line.startswith("| ")]
    for kind in below(errors.ReLoRAError):
        if kind.__module__ == errors.__name__:
            row = next((line for line in rows if kind.__name__ in line), None)
            assert row is not None, f"{kind.__name__} is undocumented"
            assert str(kind.exit_code) in row.split("|")[1], kind.__name__


def test_every_variable_of_ours_is_explained():
    source = "".join(path.read_text() for path in (ROOT / "relora_train").rglob("*.py"))
    internal = {"RELORA_PARENT_PIPE"}
    for name in set(re.findall(r'"(RELORA_[A-Z0-9_]+)"', source)) - internal:
        assert f"`{name}`" in COMMANDS, name


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
