"""Scores of a checkpoint by tasks of lm-evaluation-harness: real ones, on local files, in a process of its own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from stage_runs import tiny_profile
from stored_runs import Workshop
from synthetic_run import commit_run
from task_files import write_tasks
from tiny_images import tiny_digits

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.cli.export import export_model
from relora_train.errors import ConfigError, SourceUnreadableError
from relora_train.reports.collect import collect_run_data
from relora_train.reports.report import render_page, summarize
from relora_train.runs.evaluations import recorded_evaluations
from relora_train.runs.run import fetch_parent
from relora_train.runs.task_scores import (
    check_tasks,
    measured,
    recorded_measure,
    recorded_task_scores,
    score_by_tasks,
)
from relora_train.settings.tasks import TaskMeasure, TaskSelection
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import checkpoint_cache
from relora_train.training.requests import TasksRequest

NAMES = ("choice", "pages", "echo")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield Workshop(tmp_path_factory.mktemp("shop") / "store", patch)


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> CheckpointRef:
    return workshop.train(tiny_profile(schedule={"warm_start_steps": 2, "cycles": 1, "cycle_length": 3}))[-1]


@pytest.fixture(scope="module")
def scored(checkpoint: CheckpointRef, tasks: Path) -> dict[str, Any]:
    """The record of the one call of the module that scores all tasks."""
    outcome = score_by_tasks(checkpoint, TaskSelection(tasks=NAMES, include=str(tasks)), on_event=lambda event: None)
    assert not outcome.reused
    return outcome.record


def scores_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["score"]: score for task in record["task_scores"] for score in task["scores"]}


DIRECT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = simple_evaluate("hf", {"pretrained": sys.argv[1]}, tasks=sys.argv[3:], device="cpu", batch_size=16,
                        task_manager=TaskManager(include_path=".", include_defaults=False))
print(json.dumps(found["results"], default=str))
"""


def test_scores_are_those_that_the_harness_gives_the_export(checkpoint, scored, tasks, tmp_path):
    exported = export_model(checkpoint, tmp_path / "model").directory
    (exported / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')  # as every real dataset says
    command = [sys.executable, "-c", DIRECT, str(exported), "--", *NAMES]
    done = subprocess.run(command, cwd=tasks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), scores_of(scored)
    assert ours.keys() == {
        "choice/acc", "choice/acc_norm", "pages/word_perplexity", "pages/bits_per_byte", "echo/exact_match",
    }  # fmt: skip
    for name, score in ours.items():
        task, metric = name.split("/")
        assert score["value"] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)  # batches may differ in size
    assert ours["choice/acc"]["stderr"] == pytest.approx(theirs["choice"]["acc_stderr,none"])


def test_a_run_in_bfloat16_is_scored_under_autocast(checkpoint, scored, tasks, tmp_path):
    from relora_train.training.evaluate_tasks import evaluate_tasks

    profile = tiny_profile(precision={"dtype": "bfloat16"})
    directory, result = fetch_parent(checkpoint), tmp_path / "scores.json"
    selection = TaskSelection(tasks=("pages",), include=str(tasks))
    request = TasksRequest(profile=profile, selection=selection, checkpoint_directory=directory, result_path=result)
    evaluate_tasks(request, lambda event, **fields: None)
    score, exact = json.loads(result.read_text())["pages"][0], scores_of(scored)["pages/word_perplexity"]
    assert score["value"] == pytest.approx(exact["value"], rel=0.05) and score["value"] != exact["value"]


def test_a_score_says_what_it_is_and_how_it_was_made(scored):
    accuracy, perplexity = scores_of(scored)["choice/acc"], scores_of(scored)["pages/word_perplexity"]
    assert accuracy["higher_is_better"] is True and perplexity["higher_is_better"] is False
    assert (accuracy["shots"], accuracy["documents"], accuracy["version"]) == (0, 12, 1.5)
    assert len(accuracy["config_digest"]) == 64 and accuracy["config_digest"] != perplexity["config_digest"]
    first = scored["task_scores"][0]
    assert (first["task"], first["limit"], first["stage"], first["step"]) == ("choice", None, "cycle-1", 5)


def test_scores_are_reused_until_the_files_or_the_limit_change(checkpoint, scored, tasks, tmp_path, monkeypatch):
    def asked(selection: TaskSelection) -> bool:
        def ask(*arguments: object, **options: object) -> None:
            raise InterruptedError

        monkeypatch.setattr("relora_train.runs.task_scores.run_worker", ask)
        try:
            assert score_by_tasks(checkpoint, selection, on_event=print).reused
        except InterruptedError:
            return True
        return False

    copy = shutil.copytree(tasks, tmp_path / "copy")
    (copy / ".hidden").write_text("no part of a task")
    assert not asked(TaskSelection(tasks=NAMES, include=str(copy)))
    assert not asked(TaskSelection(tasks=("echo",), include=str(tasks)))
    assert asked(TaskSelection(tasks=NAMES, include=str(tasks), limit=3))
    (copy / "pages.jsonl").write_text('{"page": "other"}\n')
    assert asked(TaskSelection(tasks=NAMES, include=str(copy)))


def test_records_lie_beside_the_evaluations_and_no_reader_takes_one_for_an_evaluation(
    workshop, checkpoint, scored, relora, tasks
):
    keys = [info.key for info in workshop.store.list("runs/tiny/evaluations/")]
    assert len(keys) == len(NAMES) and recorded_evaluations(workshop.store, [checkpoint]) == []
    rows = recorded_task_scores(workshop.store, [checkpoint])
    assert {row["score"]: row["value"] for row in rows} == {k: v["value"] for k, v in scores_of(scored).items()}
    shown = relora("show", "tiny@latest", "--store", workshop.store_uri).out
    assert "choice/acc ↑" in shown and "pages/word_perplexity ↓" in shown
    told = json.loads(relora("show", "tiny@latest", "--store", workshop.store_uri, "--json").out)
    assert [row["score"] for row in told["task_scores"]] == [row["score"] for row in rows]
    given = ("--tasks", "choice", "--include", str(tasks), "--store", workshop.store_uri)
    answer = json.loads(relora("evaluate", "tiny", *given, "--json").out)
    assert answer["reused"] and answer["task_scores"] == scored["task_scores"][:1]
    assert "choice/acc_norm ↑" in relora("evaluate", "tiny", *given).out


def test_a_damaged_record_is_none(workshop, checkpoint, scored, tasks, relora):
    (key, *_) = [info.key for info in workshop.store.list("runs/tiny/evaluations/")]
    before, _ = workshop.store.get_bytes(key)
    record = json.loads(before)
    for change in (
        {"scores": [{"score": "x"}]},
        {"scores": [{**record["scores"][0], "value": "a"}]},
        {"step": []},
        {"scores": [{**record["scores"][0], "higher_is_better": [1]}]},
    ):
        workshop.store.put_bytes(key, json.dumps(record | change).encode())
        names = {row["score"] for row in recorded_task_scores(workshop.store, [checkpoint])}
        assert len(names) < 5 and relora("show", "tiny@latest", "--store", workshop.store_uri).code == 0
    workshop.store.put_bytes(key, before)
    assert len(recorded_task_scores(workshop.store, [checkpoint])) == 5


def test_a_report_shows_the_scores(workshop, checkpoint, scored):
    data = collect_run_data([checkpoint], files_in_stores(checkpoint_cache("tiny")), spectra=False,
                            task_scores=recorded_task_scores(workshop.store, [checkpoint]))  # fmt: skip
    page = render_page(data, {})
    assert "choice/acc" in page and f"{scores_of(scored)['choice/acc']['value']:.4f}" in page
    assert "lm-evaluation-harness 0." in page
    assert len(summarize(data)["task_scores"]) == 5


def test_a_score_can_be_a_measure(checkpoint, scored, tasks):
    accuracy = TaskMeasure(score="choice/acc", include=str(tasks))
    value = scores_of(scored)["choice/acc"]["value"]
    assert recorded_measure(checkpoint, accuracy) == measured(checkpoint, accuracy, on_event=print) == value
    assert recorded_measure(checkpoint, accuracy.model_copy(update={"limit": 3})) is None
    with pytest.raises(ConfigError, match=r"no score 'choice/f1'. Its task gives choice/acc, choice/acc_norm"):
        measured(checkpoint, TaskMeasure(score="choice/f1", include=str(tasks)), on_event=print)
    assert accuracy.measure.higher_is_better and not TaskMeasure(score="a/b", better="lower").measure.higher_is_better


def test_what_cannot_be_scored_is_refused_before_a_process_starts(
    workshop, checkpoint, tasks, relora, tmp_path, monkeypatch
):
    store = open_store(tmp_path / "images")
    (image, *_) = commit_run(store, "digits", tiny_digits(), tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"objective 'image_classification'.*are for language models"):
        score_by_tasks(image, TaskSelection(tasks=("choice",), include=str(tasks)), on_event=print)
    with pytest.raises(ConfigError, match="nowhere, where tasks are to be included from, is no directory"):
        check_tasks(TaskSelection(tasks=("choice",), include=str(tmp_path / "nowhere")))
    refused = relora("evaluate", "tiny", "--limit", "3", "--store", workshop.store_uri)
    assert refused.code == ConfigError.exit_code and "are for the tasks of --tasks" in refused.err

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("relora_train.runs.task_scores.version", missing)
    refused = relora("evaluate", "tiny", "--tasks", "choice", "--store", workshop.store_uri)
    assert refused.code == ConfigError.exit_code and "pip install 'relora-train[lm-eval]'" in refused.err


REFUSED = """
import sys
from relora_train.errors import ReLoRAError
from relora_train.settings.profile import Profile
from relora_train.settings.tasks import TaskSelection
from relora_train.training.evaluate_tasks import evaluate_tasks
from relora_train.training.requests import TasksRequest
for name in sys.argv[2:]:
    selection = TaskSelection(tasks=(name,), include=sys.argv[1])
    try:
        evaluate_tasks(TasksRequest(profile=Profile(name="x"), checkpoint_directory="/no/model", selection=selection,
                                    result_path="/no/result"), print)
    except ReLoRAError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_task_without_its_data_and_one_that_there_is_not_are_one_error_each_before_the_model_is_loaded(
    workshop, tasks, tmp_path
):
    directory = shutil.copytree(tasks, tmp_path / "more")
    far = (
        (directory / "pages.yaml")
        .read_text()
        .replace("task: pages", "task: far")
        .replace("path: json", "path: lab/far")
    )
    (directory / "far.yaml").write_text(far)
    command = [sys.executable, "-c", REFUSED, str(directory), "far", "choise"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    assert re.match(
        rf"{SourceUnreadableError.__name__}: Task 'far' could not be loaded: .*lab/far.*--include", told[-2]
    )
    assert re.match(rf"{ConfigError.__name__}: .*no task 'choise', nor in .*more\. Did you mean choice", told[-1])


def test_the_library_and_the_command_import_no_harness():
    code = "import sys, relora_train.cli.evaluate, relora_train.runs.task_scores; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
