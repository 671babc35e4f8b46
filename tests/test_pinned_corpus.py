"""Installed packages as a corpus, and content that is pinned: what differs is refused in one line, before any work."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.dataset_changes import dataset_changes, source_record
from relora_train.data.images import resolve_images
from relora_train.data.prepare import describe_dataset, prepare_dataset
from relora_train.data.sources import read_documents, resolve_source
from relora_train.errors import SourceUnreadableError
from relora_train.reports.sources import content_shown, dataset_facts
from relora_train.runs.plan import source_shown
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile, default_run_id

ALPHA = {"alpha/b.py": b"b = 1\n", "alpha/a.py": b"# \xe9\n", "alpha/c/d.py": b"d = 1\n", "isalpha.py": b"i = 1\n"}
"""In the order of the names: a, b, c/d, isalpha. One is in another encoding."""

BETA = {"beta/x.py": b"x = 1\n", "beta/y.py": b"y = 1\n"}
NOT_READ = {
    "alpha/tests/test_a.py": b"t", "alpha/c/test/t.py": b"t", "alpha/data.txt": b"t", "../bin/alpha.py": b"#!/here",
}  # fmt: skip
IN_TURN = [b"# \xe9\n", b"x = 1\n", b"b = 1\n", b"y = 1\n", b"d = 1\n", b"i = 1\n"]
COUNTS = [f"{split}_{what}" for split in ("train", "val") for what in ("tokens", "documents", "bytes")]
PACKAGES = ("Alpha==1.0.post1", "beta==2.1")


def listed(files: dict[str, bytes]) -> str:
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    return "".join(lines)


def install(site: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """Lay a package out as pip does; return its list of files."""
    for place, content in files.items():
        (site / place).parent.mkdir(parents=True, exist_ok=True)
        (site / place).write_bytes(content)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(listed(files) + f"{name}/__pycache__/a.cpython-311.pyc,,\n")
    return info / "RECORD"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed packages, alpha and beta."""
    site = tmp_path / "lib" / "site-packages"
    install(site, "alpha", "1.0.post1", ALPHA | NOT_READ)
    install(site, "beta", "2.1", BETA)
    monkeypatch.syspath_prepend(site)
    return site


def digest_of(contents: list[bytes]) -> str:
    return hashlib.sha256("".join(hashlib.sha256(content).hexdigest() for content in contents).encode()).hexdigest()


PIN = digest_of(IN_TURN)


def data(**settings: Any) -> DataConfig:
    given = {"name": "mine", "source": "packages", "packages": PACKAGES, "content_sha256": PIN, **settings}
    return DataConfig.model_validate(given)


def test_packages_are_read_in_turn_as_installed_without_tests_and_what_came_later(site: Path):
    (site / "alpha" / "mine.py").write_text("added by hand")
    (site / "alpha" / "tests" / "test_a.py").write_text("changed, and not read")
    found = resolve_source(data())
    assert [file.path.read_bytes() for file in found.files] == IN_TURN
    assert found.identity == {"format": "packages", "files": 6, "size_bytes": 34, "content_sha256": PIN}
    assert list(read_documents(found)) == ["# \ufffd\n", *(content.decode() for content in IN_TURN[1:])]
    first = resolve_source(data(max_documents=2))
    assert list(read_documents(first)) == ["# \ufffd\n", "x = 1\n"] and first.identity == found.identity
    assert resolve_source(data(packages=PACKAGES[::-1], content_sha256="")).identity != found.identity


def change_a_byte(site: Path) -> None:
    (site / "alpha" / "c" / "d.py").write_bytes(b"d = 2\n")


def add_a_file(site: Path) -> None:
    install(site, "more", "1", {"beta/z.py": b"z = 1\n"})
    record = site / "beta-2.1.dist-info" / "RECORD"
    record.write_text(record.read_text() + listed({"beta/z.py": b"z = 1\n"}))


def swap_two_files(site: Path) -> None:
    swapped = {"beta/x.py": BETA["beta/y.py"], "beta/y.py": BETA["beta/x.py"]}
    for name, content in swapped.items():
        (site / name).write_bytes(content)
    (site / "beta-2.1.dist-info" / "RECORD").write_text(listed(swapped))


def install_another_version(site: Path) -> None:
    (site / "beta-2.1.dist-info").rename(site / "beta-2.10.dist-info")
    metadata = site / "beta-2.10.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("\nVersion: 2.1\n", "\nVersion: 2.10\n"))


def remove_a_package(site: Path) -> None:
    (site / "alpha-1.0.post1.dist-info").rename(site / "gone")


def remove_a_file(site: Path) -> None:
    (site / "beta" / "y.py").unlink()


def remove_the_list(site: Path) -> None:
    (site / "beta-2.1.dist-info" / "RECORD").unlink()


def remove_a_digest(site: Path) -> None:
    (site / "beta-2.1.dist-info" / "RECORD").write_text("beta/x.py,,\nbeta/y.py,,\n")


REINSTALL = "pip install --force-reinstall --no-deps"
FAULTS = {
    change_a_byte: ("alpha/c/d.py is not as it was installed", f"{REINSTALL} Alpha==1.0.post1"),
    add_a_file: (
        "7 files, 40 bytes, SHA-256 {}, and data.content_sha256 is " + PIN,
        f"{REINSTALL} {' '.join(PACKAGES)}",
    ),
    swap_two_files: ("6 files, 34 bytes, SHA-256 {}", f"{REINSTALL} {' '.join(PACKAGES)}"),
    install_another_version: ("names beta==2.1, and {site} has 2.10", "pip install beta==2.1"),
    remove_a_package: ("names Alpha==1.0.post1, and it is not installed here", "pip install Alpha==1.0.post1"),
    remove_a_file: ("beta/y.py is not as it was installed", f"{REINSTALL} beta==2.1"),
    remove_the_list: ("{site} has no list of its files", f"{REINSTALL} beta==2.1"),
    remove_a_digest: ("beta/x.py is not as it was installed", f"{REINSTALL} beta==2.1"),
}
WITH_Z = digest_of([*IN_TURN[:5], b"z = 1\n", IN_TURN[5]])
SWAPPED = digest_of([IN_TURN[0], IN_TURN[3], IN_TURN[2], IN_TURN[1], *IN_TURN[4:]])


@pytest.mark.parametrize("fault", FAULTS)
def test_other_text_is_refused_in_one_line_with_nothing_made_and_no_second_attempt(fault, site: Path, tmp_path: Path):
    fault(site)
    with pytest.raises(SourceUnreadableError) as refused:
        prepare_dataset(data(), TokenizerConfig(vocab_size=260), tmp_path / "work")
    digest = SWAPPED if fault is swap_two_files else WITH_Z
    said, remedy = (part.format(digest, site=site) if "{" in part else part for part in FAULTS[fault])
    assert said in str(refused.value) and remedy in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "work").exists() and not refused.value.retryable and refused.value.exit_code == 3


def test_a_run_is_refused_before_it_begins_and_its_store_stays_empty(site: Path, tmp_path: Path, relora, monkeypatch):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    change_a_byte(site)
    sets = [f"data.{key}={value}" for key, value in data().model_dump(include={"source", "content_sha256"}).items()]
    sets.append(f"data.packages={list(PACKAGES)}")
    arguments = [part for setting in sets for part in ("--set", setting)]
    ended = relora("run", "smoke", *arguments, "--store", str(tmp_path / "store"))
    assert ended.code == 3 and "alpha/c/d.py is not as it was installed" in " ".join(ended.err.split())
    assert {path.name for path in (tmp_path / "store").rglob("*")} <= {".lock"} and not (tmp_path / "cache").exists()


def test_any_files_can_be_pinned_held_out_ones_with_them(tmp_path: Path):
    for name, text in {"a": "one\n", "b": "two\n", "held": "three\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    settings: dict[str, Any] = {"source": "text", "packages": [], "paths": paths}
    plain = data(**settings, content_sha256=digest_of([b"one\n", b"two\n"]))
    assert resolve_source(plain).identity == resolve_source(data(**settings, content_sha256="")).identity
    held = {**settings, "validation_paths": [str(tmp_path / "held.txt")]}
    assert resolve_source(data(**held, content_sha256=digest_of([b"one\n", b"two\n", b"three\n"]))).held_out
    for wrong in ({**settings, "paths": paths[::-1]}, held):
        with pytest.raises(
            SourceUnreadableError, match=r"Put the pinned files back\. To train on it all the same, set"
        ):
            resolve_source(data(**wrong, content_sha256=plain.content_sha256))
    digits = DataConfig(source="digits", content_sha256="0" * 64)
    with pytest.raises(SourceUnreadableError, match=rf"source 'digits' has 1 files.* is {'0' * 64}\."):
        resolve_images(digits)


def test_images_that_are_pinned_are_read():
    assert resolve_images(load_profile("digits").data).files[0].size_bytes == 57_523


@pytest.mark.parametrize("fault", [
    {"packages": ("alpha",)}, {"packages": ("alpha>=1",)}, {"packages": ("alpha==1==2",)}, {"packages": ("al pha==1",)},
    {"packages": ()}, {"source": "python-stdlib"}, {"paths": ("x",)}, {"content_sha256": "abc"},
    {"source": "hub", "packages": (), "hub_id": "some/corpus"},
])  # fmt: skip
def test_packages_without_a_version_or_their_source_and_pins_that_pin_nothing_are_refused(fault):
    with pytest.raises(ValidationError):
        data(**fault)


def test_neither_key_is_in_the_name_of_what_was_there_before_and_a_pin_in_none():
    """The name of the mixture as commit 0444442 has it."""
    sources = [{"name": "a"}, {"name": "b", "source": "text", "paths": ["x"], "weight": 3}]
    assert default_run_id(Profile.model_validate({"data": {"sources": sources}})) == "profile-7e41df5e"
    pinned, other = (Profile(data=data(content_sha256=pin)) for pin in (PIN, "0" * 64))
    assert default_run_id(pinned) == default_run_id(other)
    assert Profile.model_validate_json(pinned.model_dump_json()) == pinned
    assert default_run_id(Profile(data=data(packages=("alpha==2",)))) != default_run_id(pinned)


def test_the_experiments_on_tiny_read_the_packages_of_the_constraints_and_their_content_is_as_pinned():
    pinned = load_profile("tiny").data
    constraints = (Path(__file__).parents[1] / "deploy" / "constraints.txt").read_text().splitlines()
    assert set(pinned.packages) <= set(constraints)
    found = resolve_source(pinned)
    assert found.identity["content_sha256"] == pinned.content_sha256 and found.identity["files"] == 1219
    first = {file.path.relative_to(file.path.parents[-1]).as_posix() for file in found.files[:4]}
    assert {part for path in first for part in path.split("/")} >= {"jinja2", "mpmath", "networkx"}


def test_a_dataset_names_its_corpus_and_no_file_of_a_package_and_tells_how_packages_changed(site: Path):
    found = resolve_source(data())
    _, inputs = describe_dataset(data(), TokenizerConfig(vocab_size=260))
    assert source_shown(data()) == "packages Alpha==1.0.post1 beta==2.1"
    assert source_record("packages", found.files) == {} and source_record("text", found.files)
    less = {**inputs, "source": resolve_source(data(packages=("beta==2.1",), content_sha256="")).identity}
    ours, theirs, of_hub, of_none = (
        DatasetManifest(
            files=(), attempt="a", name="n", dataset_id="d" * 64, inputs=inputs, token_dtype="uint16", vocab_size=300,
            eos_id=0, statistics={}, **dict.fromkeys(COUNTS, 10),
        ) for inputs in (inputs, less, {"source": {"format": "hub", "revision": "v2"}}, {"mine": {}})
    )  # fmt: skip
    shown = f"SHA-256 {PIN}", "revision v2", ""
    assert tuple(map(content_shown, (ours, of_hub, of_none))) == shown
    assert [dict(dataset_facts(each)).get("Content", "") for each in (ours, of_hub, of_none)] == [*shown]
    assert dataset_changes(theirs, ours) == ["data.packages: 2 files -> 6 (12 bytes -> 34)"]
