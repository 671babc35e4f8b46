"""Python source text as a corpus: the standard library's, or that of installed packages.

The standard library differs between interpreters. The text of a package's version is the same wherever it is installed:
each file is checked against the list that its wheel brought (RECORD), and what the list lacks is not read.
"""

import base64
import csv
import sysconfig
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from relora_train.data.source_files import SourceFile
from relora_train.errors import SourceUnreadableError

_GENERATED_TABLES = {"encodings", "pydoc_data"}  # an eighth of the library, and not how people write Python
_NOT_TRAINING_TEXT = _GENERATED_TABLES | {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
    "..", # scripts, into which pip writes this machine's interpreter
}  # fmt: skip


def stdlib_files() -> list[SourceFile]:
    """Return the standard library without tests, and without what differs between builds of one Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def is_training_text(path: Path) -> bool:
        folders = path.relative_to(root).parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
        return not generated and _NOT_TRAINING_TEXT.isdisjoint(folders)

    paths = sorted(filter(is_training_text, root.rglob("*.py")), key=lambda path: path.relative_to(root).as_posix())
    return [SourceFile.of(path, str(path)) for path in paths]


def package_files(packages: Sequence[str]) -> list[SourceFile]:
    """Return the Python files, without tests, of packages given as NAME==VERSION: one of each package in turn.

    Taken in turn, the first max_documents of them are of all packages. Raises SourceUnreadableError for a package that
    is missing, has another version or has a file that is not as it was installed.
    """
    of_each = [_files_of(*package.split("==")) for package in packages]
    return [file for row in zip_longest(*of_each) for file in row if file is not None]


def reinstall(packages: Sequence[str]) -> str:
    """Return the command that makes the text of packages what it was."""
    return f"pip install --force-reinstall --no-deps {' '.join(packages)}"


def _files_of(name: str, version: str) -> list[SourceFile]:
    pin = f"{name}=={version}"
    wanted = f"data.packages names {pin}, and"
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise SourceUnreadableError(f"{wanted} it is not installed here. Run: pip install {pin}") from None
    place = found.locate_file("")
    if found.version != version:
        raise SourceUnreadableError(f"{wanted} {place} has {found.version}, other text. Run: pip install {pin}")
    files = list[SourceFile]()
    # Not found.files, which leaves out what is gone from Python 3.12 on.
    for entry, recorded, _ in sorted(csv.reader((found.read_text("RECORD") or "").splitlines())):
        if not entry.endswith(".py") or not _NOT_TRAINING_TEXT.isdisjoint(PurePosixPath(entry).parts[:-1]):
            continue
        path = Path(str(found.locate_file(entry)))
        file = SourceFile.of(path, str(path)) if path.is_file() else None
        digest = base64.urlsafe_b64encode(bytes.fromhex(file.sha256)).decode().rstrip("=") if file else ""
        if file is None or recorded != f"sha256={digest}":
            raise SourceUnreadableError(f"{wanted} {path} is not as it was installed. Run: {reinstall([pin])}")
        files.append(file)
    if not files:
        raise SourceUnreadableError(f"{wanted} {place} has no list of its files. Run: {reinstall([pin])}")
    return files
