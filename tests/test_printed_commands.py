"""Every command that a document prints is one that its program takes; those that only look are run."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from synthetic_run import commit_run, synthetic_profile
from test_docs import DOCUMENTS, ROOT

from relora_train.cli.app import command_line, main
from relora_train.settings.load import list_profiles, load_profile
from relora_train.storage.opening import open_store

PROGRAMS = ("relora", "prefect", "python", "bash", "pip", ".venv/bin/python")
LOOKING = (
    "plan", "profiles", "runs", "show", "watch", "metrics", "verify", "prune", "pin", "analyze", "report",
)  # fmt: skip
OURS = command_line()


def commands_in(text: str) -> list[list[str]]:
    """The commands of a document's blocks of code, as words; what a comment or a prompt adds is left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"((?:^    .*\n)+)", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [re.split(r"; | && ", re.sub(r"\s+#.*", "", line)) for line in lines]
    return [shlex.split(part) for part in itertools.chain(*parts) if part.split(" ")[0] in PROGRAMS]


PRINTED = [
    pytest.param(words, id=" ".join(words))
    for words in {tuple(words) for path in DOCUMENTS for words in commands_in(path.read_text())}
]


def test_the_documents_print_commands():
    assert len(PRINTED) > 60


@pytest.mark.parametrize("words", sorted(PRINTED, key=lambda one: str(one.id)))
def test_a_printed_command_is_understood(words: tuple[str, ...]):
    program, *rest = words
    if program == "relora":
        OURS.commands[rest[0]].make_context(rest[0], rest[1:])
        if rest[0] in ("run", "plan") and (rest[1] in [path.stem for path in list_profiles()]):
            sets = [value for option, value in itertools.pairwise(rest) if option == "--set"]
            load_profile(rest[1], sets)
    elif program == "prefect":
        from prefect.cli._app import _app

        _app.parse_args([word for word in rest if word != "--no-prompt"], print_error=False, exit_on_error=False)
    else:
        for word in rest:
            assert not re.fullmatch(r"[\w/]+\.(py|sh)", word) or (ROOT / word).exists(), word


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the documents assume one: the reader's profiles, runs RUN and OTHER in the default store."""
    root = tmp_path_factory.mktemp("documented")
    (root / "mine.toml").write_text((ROOT / "profiles" / "smoke.toml").read_text())
    (root / "my-profile.toml").write_text((ROOT / "profiles" / "smoke.toml").read_text())
    store = open_store(root / "relora-store")
    commit_run(store, "RUN", synthetic_profile(), root / "scratch")
    commit_run(store, "OTHER", synthetic_profile(seed=1), root / "scratch")
    return root


def test_the_commands_that_look_do_what_the_documents_say(
    documented: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(documented)
    monkeypatch.delenv("RELORA_STORE", raising=False)
    monkeypatch.setenv("RELORA_CACHE", str(documented / "cache"))
    looking = [
        words
        for path in DOCUMENTS
        for words in commands_in(path.read_text())
        if words[0] == "relora" and words[1] in LOOKING
    ]
    assert {words[1] for words in looking} == set(LOOKING)
    for words in looking:
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        expected = 6 if words[1] == "verify" else 0  # these runs were made without a dataset
        assert ended.value.code == expected, f"{shlex.join(words)}: {capsys.readouterr().err}"
        capsys.readouterr()
