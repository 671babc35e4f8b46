"""The `relora` command: its messages and exit codes, what it shows, and the processes it must not leave behind."""

import contextvars
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic_run import commit_run, evaluation_of, synthetic_profile

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.app import _COMMANDS, command_line
from relora_train.cli.local_flow import TerminatedError, _termination_raises
from relora_train.cli.output import describe_fault
from relora_train.errors import AccessDeniedError
from relora_train.runs.worker_process import WorkerProcess
from relora_train.runs.workers import READY_WORKER
from relora_train.storage.local import LocalStore
from relora_train.storage.opening import open_store

Relora = Callable[..., Any]


@pytest.fixture(autouse=True)
def place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))


@pytest.fixture
def line(tmp_path: Path) -> list[CheckpointRef]:
    """The checkpoints of a run 'tale' in the default store: a warm start and three cycles."""
    return commit_run(open_store(tmp_path / "store"), "tale", synthetic_profile(), tmp_path / "scratch")


def add_sibling(line: list[CheckpointRef], tmp_path: Path) -> CheckpointRef:
    """A second cycle-2 beside the first, as a diverged cycle tried again with another setting makes one."""
    from relora_train.method.stages import plan_stages
    from relora_train.settings.method import ReLoRAConfig

    changed = synthetic_profile(relora=ReLoRAConfig(rank=8))
    stage = plan_stages(changed)[2]
    store = open_store(tmp_path / "store")
    return commit_run(store, "tale", changed, tmp_path / "other", parent=line[1], stages=[stage])[0]


BAD_INPUT = [
    pytest.param(["plan", "nope"], 2, "no profile 'nope'", id="unknown profile"),
    pytest.param(["plan", "[bold]nope[/bold]"], 2, "[bold]nope[/bold]", id="brackets are no markup"),
    pytest.param(["plan", "smoke", "--set", "relora.rnk=3"], 2, "did you mean 'rank'", id="unknown key"),
    pytest.param(["plan", "smoke", "--set", "relora.rank=0"], 2, "relora.rank", id="out of range"),
    pytest.param(["plan", "smoke", "--set", "relora.rank"], 2, "has no '='", id="set without a value"),
    pytest.param(["run", "smoke", "--run-id", "a/b"], 2, "not a valid run id", id="invalid run id"),
    pytest.param(["run", "smoke", "--store", "ftp://x"], 5, "unknown scheme 'ftp'", id="unknown store scheme"),
    pytest.param(["run", "smoke", "--resume-from", "gone@cycle-1"], 6, "no run 'gone'", id="resume from nothing"),
    pytest.param(
        ["run", "smoke", "--resume-from", "tale@cycle-1"], 2, "holds another model", id="resume with another model"
    ),
    pytest.param(["runs", "--store", "s3://"], 5, "names no bucket", id="no bucket"),
    pytest.param(["show", "gone"], 6, "Runs there: tale", id="run not found"),
    pytest.param(["show", "tale@cycle-9"], 6, "It has:", id="checkpoint not found"),
    pytest.param(["show", "not a name"], 2, "names no checkpoint", id="no name of a checkpoint"),
    pytest.param(["show", "/nowhere/at/all"], 6, "is no directory", id="directory not found"),
    pytest.param(["evaluate", "tale"], 5, "is not at", id="dataset gone"),
    pytest.param(["export", "tale", "full"], 2, "is not empty", id="export into a directory in use"),
    pytest.param(["export", "tale", "full/file"], 2, "is a file", id="export onto a file"),
    pytest.param(["runs", "--store", "full/file"], 5, "a store is a directory", id="a file as store"),
    pytest.param(
        ["join", "--rdzv-endpoint", "x:1", "--nnodes", "2", "--node-rank", "2"],
        2,
        "--node-rank 2 is",
        id="no such node",
    ),
    pytest.param(
        ["join", "--rdzv-endpoint", "x", "--nnodes", "2", "--node-rank", "1"], 2, "rdzv_endpoint", id="no port"
    ),
    pytest.param(["compare", "table2-tyni"], 2, "Did you mean 'table2-tiny'", id="unknown experiment"),
    pytest.param(["compare", "table2-tiny", "--seeds", "0,x"], 2, "write it as 0,1,2", id="seeds that are no numbers"),
    pytest.param(["compare", "table2-tiny", "--set", "seed=1"], 2, "given by `seeds` or", id="seed as a setting"),
    pytest.param(["compare", "resets", "--deployment", "foo"], 2, "write it as pretrain/NAME", id="no such flow"),
    pytest.param(["analyze", "tale", "--output", "/proc/x"], 2, "--output /proc/x cannot be made", id="not writable"),
    pytest.param(["report", "gone"], 6, "no run 'gone'", id="report of nothing"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD_INPUT)
def test_bad_input_is_one_message_and_a_documented_exit_code(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    outcome = relora(*arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("Error: ") and words in outcome.err
    assert outcome.err.count("Error") == 1 and "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before, "it lost or left something"


def test_a_current_directory_that_was_deleted_is_one_message_of_every_command(
    relora: Relora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (*_COMMANDS, "--help"):
        outcome = relora(command)
        assert (outcome.code, outcome.out) == (2, ""), command
        assert outcome.err.startswith("Error: The directory that you are in was deleted."), command
    assert not (tmp_path / "cache").exists()  # a fault of ours would lie there


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/api"], ids=["without a server", "with one"])
def test_a_run_has_its_worker_started_ahead_unless_a_server_is_to_hear_its_warnings(
    url: str | None, relora: Relora, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[WorkerProcess | None] = []

    def meet(*arguments: Any, **options: Any) -> None:
        ready = READY_WORKER.get()
        met.append(ready and ready._worker)
        assert ready is None or (ready._worker is not None and ready._worker.is_alive)

    monkeypatch.setattr("relora_train.cli.run.run_shown", meet)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    if url is not None:
        monkeypatch.setenv("PREFECT_API_URL", url)
    outcome = contextvars.Context().run(relora, "run", "smoke")
    assert outcome.code == 0, outcome.err
    (worker,) = met
    assert (worker is None) == (url is not None)
    assert worker is None or not worker.is_alive  # it ends with the command


def test_an_ambiguous_checkpoint_is_refused_by_name_and_found_by_uri(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    sibling = add_sibling(line, tmp_path)
    refused = relora("show", "tale@cycle-2")
    assert refused.code == 6 and sibling.uri in refused.err and line[2].uri in refused.err
    assert relora("show", sibling.uri).code == 0
    listed = relora("show", "tale", "--json")
    assert [item["on_line"] for item in json.loads(listed.out)] == [False] * 5


def test_an_incomplete_and_a_corrupt_checkpoint_are_refused(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    directory = tmp_path / "store" / line[-1].prefix
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for arguments in (("show", line[-1].uri, "--verify"), ("export", "tale", "model")):
        outcome = relora(*arguments)
        assert outcome.code == 6 and "model.safetensors is damaged" in outcome.err
    assert not (tmp_path / "model").exists()
    (directory / "manifest.json").unlink()
    outcome = relora("show", line[-1].uri)
    assert outcome.code == 6 and "no manifest.json" in outcome.err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_damaged_checkpoint_does_not_hide_the_others(
    options: list[str], relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    (tmp_path / "store" / line[1].prefix / "manifest.json").write_text("{")
    outcome = relora("show", "tale", *options)
    assert outcome.code == 6 and line[1].uri in outcome.err and "damaged" in outcome.err
    others = [line[0], line[2], line[3]]
    if options:
        assert [record["uri"] for record in json.loads(outcome.out)] == [ref.uri for ref in others]
    else:
        assert all(ref.uri.rpartition("/")[2] in outcome.out for ref in others)


def test_a_store_that_is_not_there_is_told_from_an_empty_one(relora: Relora, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    missing, empty = relora("runs", "--store", "nowhere"), relora("runs", "--store", "empty")
    assert missing.code == empty.code == 0
    assert "there is no such directory" in missing.out and "there is no such directory" not in empty.out


def test_a_command_line_it_does_not_understand_exits_with_2(relora: Relora) -> None:
    for arguments in (["run"], ["run", "smoke", "--bogus"], ["bogus"]):
        outcome = relora(*arguments)
        assert (outcome.code, outcome.out) == (2, "") and "Usage: relora" in outcome.err


def test_an_unexpected_fault_is_one_line_that_says_where_its_traceback_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path))
    try:
        raise KeyError("lost\nand more")
    except KeyError as error:
        shown, verbose = describe_fault(error, verbose=False), describe_fault(error, verbose=True)
    [path] = tmp_path.rglob("*.txt")
    assert "\n" not in shown and str(path) in shown and "KeyError" in shown
    assert "Traceback (most recent call last)" in path.read_text() and path.read_text() in verbose


def test_every_command_has_one_line_of_help_and_the_exit_codes_are_documented(relora: Relora) -> None:
    shown = relora("--help")
    assert shown.code == 0
    codes = ("0 done", "1 an unexpected", "2 a command line", "3 a corpus", "5 a store", "6 a checkpoint", "130", "143")
    assert all(code in shown.out for code in codes)
    commands = command_line().commands
    assert " ".join(commands) == (
        "run retrain compare join plan profiles check runs show watch metrics datasets retry evaluate bench export "
        "report analyze serve deploy prune verify pin delete series promote"
    )
    for name, command in commands.items():
        assert command.help and "\n" not in command.help.strip() and command.help.endswith("."), name
        assert relora(name, "--help").code == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "smoke"], ["profiles"], ["compare"], ["runs"], ["--version"]]
)
def test_light_commands_import_no_torch_prefect_or_boto3(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom relora_train.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'prefect', 'boto3', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "RELORA_STORE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=environment, capture_output=True)


def test_json_is_all_of_standard_output(relora: Relora, line: list[CheckpointRef], tmp_path: Path) -> None:
    read = {
        name: json.loads(relora(*arguments, "--json").out)
        for name, arguments in {
            "plan": ["plan", "smoke"],
            "profiles": ["profiles"],
            "runs": ["runs"],
            "show a run": ["show", "tale"],
            "show": ["show", "tale@cycle-1", "--verify"],
            "export": ["export", "tale", "model"],
            "report": ["report", "tale"],
        }.items()
    }
    assert read["plan"]["total_steps"] == 60
    assert "quickstart" in {item["name"] for item in read["profiles"]}
    assert [(run["run_id"], run["latest_step"]) for run in read["runs"]] == [("tale", 160)]
    assert [item["stage"] for item in read["show a run"]] == ["warm-start", "cycle-1", "cycle-2", "cycle-3"]
    assert [item["uri"] for item in read["show"]["lineage"]] == [line[0].uri, line[1].uri] and read["show"]["verified"]
    assert read["export"]["checkpoint_uri"] == line[-1].uri
    assert read["report"]["report_uri"] == f"{line[0].store_uri}/runs/tale/report/report.html"


def test_tables_show_what_was_asked_for(relora: Relora, line: list[CheckpointRef]) -> None:
    shown = relora("show", "tale@cycle-2").out
    assert line[1].uri.rpartition("/")[2] in shown and "model.safetensors" in shown and "effective rank" in shown
    listed = relora("show", "tale").out
    assert listed.count("●") == len(line) + 1 and all(ref.uri.rpartition("/")[2] in listed for ref in line)
    assert "tale" in relora("runs").out
    assert "No run" in relora("runs", "--store", "elsewhere").out


def test_a_report_takes_the_newest_recorded_evaluation_of_each_checkpoint(
    relora: Relora, line: list[CheckpointRef]
) -> None:
    store = open_store(line[0].store_uri)
    for name, ref, perplexity in (("a", line[0], 50.0), ("b", line[0], 40.0), ("c", line[-1], 30.0)):
        record = {**evaluation_of(ref, {"Once": " upon"}), "val_perplexity": perplexity}
        store.put_bytes(f"runs/tale/evaluations/{name}.json", json.dumps(record).encode())
        time.sleep(0.02)  # the store's clock orders them
    summary = json.loads(relora("report", "tale", "--json").out)["summary"]
    assert [item["scores"]["val_perplexity"] for item in summary["evaluations"]] == [40.0, 30.0]


def test_the_report_of_a_store_that_can_only_be_read_is_kept_on_this_machine(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put_file

    def put_elsewhere(store: LocalStore, *arguments: Any, **options: Any) -> Any:
        if store.uri == line[0].store_uri:
            raise AccessDeniedError("Access is denied.")
        return put(store, *arguments, **options)

    monkeypatch.setattr(LocalStore, "put_file", put_elsewhere)
    made = relora("report", "tale", "--json")
    assert made.code == 0 and "kept on this machine: Access is denied." in made.err
    kept = tmp_path / "cache" / "reports" / "runs" / "tale" / "report" / "report.html"
    assert json.loads(made.out)["report_uri"] == kept.as_uri() and kept.is_file()


def test_an_export_is_the_checkpoints_own_model_and_force_replaces_an_older_one(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    assert relora("export", "tale@cycle-1", "model").code == 0
    source = load_file(tmp_path / "store" / line[1].prefix / "model.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == source.keys() and all(np.array_equal(exported[name], source[name]) for name in source)
    assert not (tmp_path / "model" / "optimizer.safetensors").exists()
    (tmp_path / "model" / "model-00002-of-00002.safetensors").touch()
    (tmp_path / "model" / "notes.md").write_text("mine")
    assert relora("export", "tale@cycle-2", "model", "--force").code == 0
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"README.md", "model.safetensors", "notes.md"}
    replaced = load_file(tmp_path / "model" / "model.safetensors")
    assert not all(np.array_equal(replaced[name], source[name]) for name in source)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".model")]


def test_a_termination_that_a_library_makes_an_error_of_its_own_is_still_one() -> None:
    with pytest.raises(TerminatedError, match="SIGTERM"), _termination_raises():
        try:
            signal.raise_signal(signal.SIGTERM)
        except TerminatedError:
            raise ValueError("Invalid bounding box") from None  # as matplotlib does
    with pytest.raises(ValueError, match="mine"), _termination_raises():
        raise ValueError("mine")


# --- prune, verify, pin ---


def test_prune_shows_what_would_go_and_then_removes_it(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    assert relora("pin", "tale@warm-start", "--name", "best").code == 0
    planned = relora("prune", "tale", "--keep-last", "1", "--dry-run")
    assert planned.code == 0 and "would go" in planned.out and "pinned as best" in planned.out
    sizes = sum(ref.manifest.size_bytes for ref in line[1:3])
    assert f"({sizes:,} bytes)" in planned.out
    assert len(json.loads(relora("show", "tale", "--json").out)) == 4
    done = json.loads(relora("prune", "tale", "--keep-last", "1", "--json").out)
    kept = [each["keep"] for each in done["checkpoints"]]
    assert done["removed_bytes"] == sizes and kept == [True, False, False, True]
    left = json.loads(relora("show", "tale", "--json").out)
    assert [each["stage"] for each in left] == ["warm-start", "cycle-3"]
    other = relora("pin", "tale@cycle-3", "--name", "best", "--remove")
    assert other.code == 2 and f"{line[0].uri} is pinned as 'best'" in other.err
    assert relora("pin", "tale", "--name", "best", "--remove").code == 0
    assert json.loads(relora("prune", "tale", "--keep-last", "1", "--json").out)["removed_bytes"] > 0
    gone = relora("show", line[0].uri)
    assert gone.code == 6 and "was removed by `relora prune`" in gone.err


def test_prune_takes_the_policy_of_the_run_s_profile(relora: Relora, tmp_path: Path) -> None:
    from relora_train.settings.running import RetentionConfig

    profile = synthetic_profile(retention=RetentionConfig(keep_last=1, keep_every=2))
    commit_run(open_store(tmp_path / "store"), "tale", profile, tmp_path / "scratch")
    done = json.loads(relora("prune", "tale", "--json").out)
    assert [each["keep"] for each in done["checkpoints"]] == [True, False, True, True]
    none = relora("prune", "tale", "--keep-last", "0")
    assert none.code == 2


def test_without_a_policy_prune_removes_leftovers_only(relora: Relora, line: list[CheckpointRef]) -> None:
    done = json.loads(relora("prune", "tale", "--json").out)
    assert [each["keep"] for each in done["checkpoints"]] == [True] * 4


def test_verify_ends_with_zero_only_when_there_is_nothing(
    relora: Relora, line: list[CheckpointRef], tmp_path: Path
) -> None:
    first = relora("verify", "tale", "--json")  # the synthetic dataset is nowhere
    assert first.code == 6
    assert [each["kind"] for each in json.loads(first.out)["findings"]] == ["missing"]
    (tmp_path / "store" / line[1].prefix / "metrics.jsonl").write_text("{}")
    named = relora("verify", "tale@cycle-1")
    assert named.code == 6 and "damaged" in named.out and "metrics.jsonl" in named.out
    assert relora("verify", "nothing").code == 6


def test_an_export_keeps_its_checkpoint(relora: Relora, line: list[CheckpointRef], tmp_path: Path) -> None:
    assert relora("export", "tale@cycle-1", "model").code == 0
    done = json.loads(relora("prune", "tale", "--keep-last", "1", "--json").out)
    assert [each["reasons"] for each in done["checkpoints"]] == [[], ["exported"], [], ["the end of a line"]]


# --- what was meant, and what a shell may complete ---


@pytest.mark.parametrize("command", ["show", "watch", "metrics", "prune", "verify", "delete"])
def test_a_run_that_is_not_there_is_answered_with_the_one_that_was_meant(
    relora: Relora, line: list[CheckpointRef], command: str
) -> None:
    said = relora(command, "tail", *(["--yes"] if command == "delete" else []))
    assert said.code == 6 and "has no run 'tail'. Did you mean 'tale'? Runs there: tale." in said.err


def test_a_stage_that_is_not_there_is_answered_with_the_one_that_was_meant(
    relora: Relora, line: list[CheckpointRef]
) -> None:
    for wrong, meant in (("cycle2", "cycle-2"), ("warmstart", "warm-start"), ("lastest", "latest")):
        assert f"Did you mean {meant!r}?" in relora("show", f"tale@{wrong}").err
    assert "Did you mean" not in relora("show", "tale@xyz").err


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("relora sho", ["show"]),
        ("relora show ta", ["tale"]),
        ("relora watch --store STORE ", ["tale"]),
        ("relora watch --store s3://nowhere/x ", []),
        ("relora runs --fai", ["--failed"]),
    ],
)
def test_a_shell_completes_commands_options_and_runs(
    line: list[CheckpointRef], tmp_path: Path, typed: str, answer: list[str]
) -> None:
    words = typed.replace("STORE", str(tmp_path / "store"))
    asked = {"_RELORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    command = [sys.executable, "-m", "relora_train.cli.app"]
    told = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert told.stdout.split() == answer and told.stderr == ""
