"""An experiment with real text, a real store and a real Prefect server, killed midway and gone on with.

The killed half runs as it does for a user. The rest has its stages trained by the same trainer in this process: six
processes less to start. Runs made by a deployment need minutes: `python -m pytest -m slow tests/test_flow_compare.py`.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prefect_server import PREFECT_WARNS, running_prefect, serving_prefect
from task_files import write_tasks

from relora_train import events
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import ConfigError, RunSettingsChangedError
from relora_train.events import Event
from relora_train.experiments.comparison import compare_results
from relora_train.experiments.experiment import load_experiment
from relora_train.experiments.records import ComparisonSummary, RunResult
from relora_train.settings.overrides import ExperimentOverrides
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from relora_train.training.evaluate import evaluate_checkpoint
from relora_train.training.requests import EvaluationRequest, StageRequest
from relora_train.training.trainer import run_stage

pytestmark = PREFECT_WARNS

EXPERIMENT = """
title = "ReLoRA, LoRA, and one that explodes"
profile = "smoke"
budget_tokens = 9_216
seeds = [0, 1]
reference = "relora"
paper_source = "a table"
paper_measure = "perplexity"

[base]
launch.threads = 1
schedule = {warm_start_steps = 6, cycles = 2, cycle_length = 6, warmup_steps = 2, restart_warmup_steps = 1}
evaluation = {sequences = 8, final_sequences = 16, sample_prompts = []}
logging.every_steps = 2
optimizer.warm_start_learning_rate = 2e-3

[arms.relora]
label = "ReLoRA"
paper = 34.46
[arms.lora]
label = "LoRA"
paper = 47.44
set.method = "lora"
[arms.explodes]
label = "Explodes"
paper = "diverged"
set.optimizer.learning_rate = 1e6
"""


IMAGES = """
title = "ReLoRA and LoRA on images"
profile = "digits"
budget_tokens = 46_080
seeds = [0]
reference = "lora"

[base]
launch.threads = 1
model = {hidden_size = 32, intermediate_size = 64, num_hidden_layers = 1}
schedule = {warm_start_steps = 15, cycles = 2, cycle_length = 15, warmup_steps = 5, restart_warmup_steps = 2}
optimizer = {learning_rate = 6e-3, warm_start_learning_rate = 6e-3}

[arms.relora]
label = "ReLoRA"
[arms.lora]
label = "LoRA"
set.method = "lora"
"""


@dataclass
class Seen:
    """The events of a call, and what can be read from them."""

    events: list[Event] = field(default_factory=list)

    @property
    def trained(self) -> list[str]:
        """'arm-seed: stage' of every stage that was begun."""
        arm, found = "", []
        for event in self.events:
            if event["event"] == "arm_started":
                arm = f"{event['arm']}-{event['seed']}"
            elif event["event"] == "stage_started":
                found.append(f"{arm}: {event['stage']}")
        return found

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]


@contextmanager
def listening() -> Iterator[Seen]:
    seen = Seen()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.events.append(record.event)

    handler = Handler()
    events.listen(handler)
    try:
        yield seen
    finally:
        events.unlisten(handler)


def work_here(module: str, request: Any, path: Path, *, on_event: Any, **options: Any) -> None:
    """What run_worker has a process do, done by the same code in this one."""

    def emit(event: str, **fields: Any) -> None:
        on_event({"event": event, **fields})

    if module == "relora_train.training.trainer":
        run_stage(StageRequest.model_validate_json(request.model_dump_json()), emit)
    else:
        evaluate_checkpoint(EvaluationRequest.model_validate_json(request.model_dump_json()), emit)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module", autouse=True)
def prefect(root: Path) -> Iterator[None]:
    with running_prefect(root / "prefect"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(root / "cache"))
        patch.setattr("relora_train.runs.workers.Worker.start", lambda worker, profile: None)
        kept = "relora_train.runs.workers.Worker"
        patch.setattr(f"{kept}.run", lambda worker, *work, **how: work_here(*work, **how))
        yield


@pytest.fixture(scope="module")
def experiment(root: Path) -> str:
    path = root / "three-arms.toml"
    path.write_text(EXPERIMENT)
    return str(path)


def compare_here(experiment: str, root: Path, **parameters: Any) -> tuple[ComparisonSummary, Seen]:
    from flows.compare import compare

    with listening() as seen:
        summary = compare(experiment, store=str(root / "store"), **parameters)
    return summary, seen


def manifests(root: Path) -> list[dict[str, Any]]:
    """Of every committed checkpoint."""
    return [json.loads(path.read_text()) for path in root.glob("store/runs/*/checkpoints/*/manifest.json")]


@pytest.fixture(scope="module")
def killed(experiment: str, root: Path) -> list[str]:
    """Stages that were committed when the flow's process was killed, in the second arm of the first seed."""
    from prefect.settings import PREFECT_API_URL

    program = f"from flows.compare import compare\ncompare({experiment!r}, store={str(root / 'store')!r})"
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": os.pathsep.join(sys.path)}
    with (root / "killed.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=log, stderr=log)
    try:
        first_arm, deadline = "store/runs/smoke-relora-s0-*/checkpoints/*/manifest.json", time.monotonic() + 240
        while not list(root.glob(first_arm)):
            assert process.poll() is None and time.monotonic() < deadline, (root / "killed.log").read_text()[-3000:]
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return sorted(manifest["stage"] for manifest in manifests(root))


@pytest.fixture(scope="module")
def finished(killed: list[str], experiment: str, root: Path) -> tuple[ComparisonSummary, Seen]:
    return compare_here(experiment, root)


def test_a_killed_experiment_goes_on_where_it_stood(killed: list[str], finished: tuple[ComparisonSummary, Seen]):
    _, seen = finished
    assert killed[:1] == ["cycle-1"] and killed[-1:] == ["warm-start"]
    first_seed = [stage for stage in seen.trained if stage.startswith(("relora-0", "warm-start-0"))]
    assert first_seed == ["relora-0: cycle-2"][len(killed) - 2 :]
    rest = [stage for stage in seen.trained if not stage.startswith(("relora-0", "warm-start-0"))]
    assert rest == [
        "lora-0: lora", "explodes-0: cycle-1",
        "warm-start-1: warm-start", "relora-1: cycle-1", "relora-1: cycle-2", "lora-1: lora", "explodes-1: cycle-1",
    ]  # fmt: skip


def test_a_shared_warm_start_is_one_checkpoint_that_every_arm_branches_from(
    finished: tuple[ComparisonSummary, Seen], root: Path
):
    made = manifests(root)
    assert Counter(m["stage"] for m in made) == {"warm-start": 2, "cycle-1": 2, "cycle-2": 2, "lora": 2}
    starts = {m["fingerprint"]: m["run_id"] for m in made if m["stage"] == "warm-start"}
    branched = {m["run_id"]: starts[m["parent"]["fingerprint"]] for m in made if m["stage"] in ("cycle-1", "lora")}
    assert len(branched) == 4 and all(arm.split("-")[2] == start.split("-")[3] for arm, start in branched.items())


def test_the_table_holds_what_the_runs_recorded(finished: tuple[ComparisonSummary, Seen], root: Path):
    data = finished[0].comparison
    losses: dict[str, list[float]] = {}
    for path in root.glob("store/runs/smoke-*lora-s*/evaluations/*.json"):
        record = json.loads(path.read_text())
        if record["step"] == 18:
            losses.setdefault(record["run_id"].split("-")[1], []).append(record["val_loss"])
    rows = {row.arm: row for row in data.arms}
    for arm in ("relora", "lora"):
        first, second = losses[arm]
        assert rows[arm].val_loss.mean == pytest.approx((first + second) / 2)
        assert rows[arm].val_loss.standard_error == pytest.approx(abs(first - second) / 2)  # √((d²/2)/2) = d/2
        assert (rows[arm].trained, rows[arm].diverged) == (2, 0)
        assert rows[arm].peak_memory_bytes.mean > 10e6 and rows[arm].tokens_per_second.mean > 0
        assert rows[arm].seconds.mean > 0
        assert rows[arm].trainable_parameters < rows[arm].parameters
    by_seed = {(run.arm, run.seed): run.val_loss for run in data.runs}
    paired = [by_seed["lora", seed] - by_seed["relora", seed] for seed in (0, 1)]
    difference = next(each for each in data.differences if each.arm == "lora").val_loss
    assert difference.mean == pytest.approx(sum(paired) / 2) and difference.count == 2


def test_a_diverging_arm_is_a_row_and_no_failure(finished: tuple[ComparisonSummary, Seen]):
    summary, seen = finished
    row = next(row for row in summary.comparison.arms if row.arm == "explodes")
    assert (row.trained, row.diverged, row.val_loss, row.paper) == (0, 2, None, "diverged")
    assert all("at step" in run.message for run in summary.comparison.runs if run.arm == "explodes")
    assert [event["seed"] for event in seen.of("arm_diverged")] == [0, 1]


def test_the_report_stands_alone_and_says_what_diverged(finished: tuple[ComparisonSummary, Seen], root: Path):
    summary, _ = finished
    html = Path(summary.html_uri.removeprefix("file://")).read_text()
    assert 'src="http' not in html and "<script" not in html and html.count("data:image/png;base64,") == 2
    for words in ("ReLoRA", "Explodes", "34.46", "47.44", "diverged", "Differences from ReLoRA", "a table: perplexity"):
        assert words in html
    stored = json.loads(Path(summary.json_uri.removeprefix("file://")).read_text())
    assert stored == json.loads(summary.comparison.model_dump_json())
    trained = [run for run in stored["runs"] if run["outcome"] == "trained"]
    assert all(run["training"] and run["validation"] for run in trained)
    (dataset,) = root.glob("store/datasets/*/*/manifest.json")
    digest = json.loads(dataset.read_text())["inputs"]["source"]["content_sha256"]
    assert {run["content"] for run in trained} == {f"SHA-256 {digest}"}
    assert all(Path(uri.removeprefix("file://")).is_file() for uri in summary.picture_uris)


def test_a_second_call_trains_nothing_and_tells_the_same(
    finished: tuple[ComparisonSummary, Seen], experiment: str, root: Path
):
    again, seen = compare_here(experiment, root)
    assert seen.trained == [] and seen.of("arm_started") == []
    assert again.reused == len(again.comparison.runs) == 6
    assert again.comparison == finished[0].comparison
    assert [event["outcome"] for event in seen.of("arm_reused")].count("diverged") == 2


def test_one_seed_has_no_errors(finished: tuple[ComparisonSummary, Seen], experiment: str, root: Path):
    """A part of the seeds: nothing is trained, and no error bar is made up."""
    one, seen = compare_here(experiment, root, seeds=[1])
    assert seen.trained == []
    row = next(row for row in one.comparison.arms if row.arm == "lora")
    assert row.val_loss.standard_error is None
    assert "One seed: no errors" in Path(one.html_uri.removeprefix("file://")).read_text()
    assert one.html_uri != finished[0].html_uri  # the whole report is left as it is


def test_a_task_can_be_the_measure_of_runs_that_were_trained_before(
    finished: tuple[ComparisonSummary, Seen], root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    write_tasks(root / "tasks")
    measure = 'measure = { score = "pages/bits_per_byte", include = "tasks", limit = 2, better = "lower" }'
    path = root / "by-task.toml"
    path.write_text(f"{measure}\n{EXPERIMENT.partition('[arms.lora]')[0]}")
    summary, seen = compare_here(str(path), root, seeds=[0])
    assert seen.trained == [] and summary.comparison.measures.judged.name == "pages/bits_per_byte"
    for arm, run in zip(summary.comparison.arms, summary.comparison.runs, strict=True):
        (record,) = root.glob(f"store/runs/{run.run_id}/evaluations/*-task-*.json")
        scores = {score["score"]: score["value"] for score in json.loads(record.read_text())["scores"]}
        assert run.task_score == arm.task_score.mean == scores["pages/bits_per_byte"] > 0
    html = Path(summary.html_uri.removeprefix("file://")).read_text()
    assert "pages/bits_per_byte" in html and "by lm-evaluation-harness" in html
    again, _ = compare_here(str(path), root, seeds=[0])
    assert again.reused == 1 and again.comparison == summary.comparison


def test_every_run_is_an_ordinary_one(finished: tuple[ComparisonSummary, Seen], root: Path):
    store = open_store(root / "store")
    for run in finished[0].comparison.runs:
        if run.outcome == "trained":
            assert verify_run(store, run.run_id).findings == []


def test_the_tutorial_is_measured_and_reported_by_the_same_flow(root: Path):
    summary, _ = compare_here("tutorial", root, seeds=[0, 1, 2])
    html = Path(summary.html_uri.removeprefix("file://")).read_text()
    assert "ReLoRA ends below LoRA" in summary.measured.headline and summary.measured.headline in html
    assert "best with rank 4" in html and html.count("data:image/png;base64,") == 1 and 'src="http' not in html
    stored = json.loads(Path(summary.json_uri.removeprefix("file://")).read_text())
    assert stored["settings"]["seeds"] == [0, 1, 2] and len(stored["numbers"]["final_loss"]["lora"]) == 3
    assert Path(summary.picture_uris[0].removeprefix("file://")).read_bytes().startswith(b"\x89PNG")


def test_table_4_is_measured_by_the_same_flow(root: Path):
    over = {"launch": {"threads": 1}, "precision": {"matmul_precision": "high"}}
    settings = {"throughput": {"profiles": ["smoke"], "set": over, "rounds": 2, "steps": 1}}
    summary, seen = compare_here("table4", root, overrides=ExperimentOverrides.model_validate(settings))
    assert [event["done"] for event in seen.of("measuring")] == [1, 2]
    record = json.loads(Path(summary.json_uri.removeprefix("file://")).read_text())["numbers"]["profiles"]["smoke"]
    assert min(record["peak_bytes"].values()) > 0 and min(record["step_seconds"]["full"]) > 0
    full, relora, run = (record["step_seconds"][name][0] for name in ("full", "relora", "adjusted"))
    assert run == pytest.approx(full / 3 + 2 * relora / 3)
    html = Path(summary.html_uri.removeprefix("file://")).read_text()
    assert "2x 3090 (paper, examples/s)" in html and "smoke (here, tokens/s)" in html


def test_a_deployment_that_is_not_there_is_refused_before_any_work(experiment: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="pretrain/nowhere"):
        compare_here(experiment, tmp_path, deployment="pretrain/nowhere")
    assert not (tmp_path / "store").exists()


def result(arm: str, seed: int, dataset_id: str, loss: float = 1.0) -> RunResult:
    return RunResult(
        arm=arm, seed=seed, run_id=f"{arm}-{seed}", outcome="trained", dataset_id=dataset_id, val_loss=loss,
        val_perplexity=2.0,
    )  # fmt: skip


def test_arms_on_different_text_are_not_compared(experiment: str):
    planned = load_experiment(experiment)
    with pytest.raises(RunSettingsChangedError, match="different data"):
        compare_results(planned, [result("relora", 0, "a" * 64), result("lora", 0, "b" * 64)])


def test_only_seeds_that_both_finished_are_paired(experiment: str):
    planned = load_experiment(experiment)
    found = [result("relora", 0, "a", 1.0), result("relora", 1, "a", 2.0), result("lora", 1, "a", 2.5)]
    compared = compare_results(planned, found)
    assert {each.arm: each.val_loss and (each.val_loss.mean, each.val_loss.count) for each in compared.differences} == {
        "relora": (0.0, 2),
        "lora": (0.5, 1),
        "explodes": None,
    }


def test_images_are_compared_by_accuracy_from_the_same_runs_and_checkpoints(root: Path):
    path = root / "on-images.toml"
    path.write_text(IMAGES)
    summary, seen = compare_here(str(path), root)
    assert seen.trained == ["warm-start-0: warm-start", "relora-0: cycle-1", "relora-0: cycle-2", "lora-0: lora"]
    data = summary.comparison
    assert data.objective == "image_classification"
    for run in data.runs:
        record = json.loads(next(root.glob(f"store/runs/{run.run_id}/evaluations/*.json")).read_text())
        assert run.val_accuracy == record["val_accuracy"] and record["val_images"] == 420
        assert run.val_perplexity is None
        assert [point.tokens for point in run.scored][-1] == data.budget_tokens
        assert verify_run(open_store(root / "store"), run.run_id).findings == []
    stored = json.loads(Path(summary.json_uri.removeprefix("file://")).read_text())
    assert stored == json.loads(data.model_dump_json())
    assert {uri.rpartition("/")[2] for uri in summary.picture_uris} == {
        "training_loss.png", "validation_loss.png", "validation_score.png",
    }  # fmt: skip
    html = Path(summary.html_uri.removeprefix("file://")).read_text()
    assert "Validation accuracy" in html and "Higher accuracy is better" in html and "erplexity" not in html


def test_what_a_run_is_started_with_gives_the_planned_settings(experiment: str):
    """The flow pretrain resolves its parameters itself; they must come to what the experiment counted."""
    from relora_train.settings.load import load_profile
    from relora_train.settings.overrides import ProfileOverrides

    planned = load_experiment(experiment)
    for run in (*planned.warm_starts, *planned.runs):
        parameters = json.loads(json.dumps(planned.parameters(run, store_uri="s", gpu_limit=None)))
        given = ProfileOverrides.model_validate(parameters["overrides"]).model_dump()
        assert isinstance(run.profile, Profile) and load_profile(parameters["profile"], given) == run.profile


@pytest.mark.slow
def test_a_deployment_makes_the_runs_side_by_side(experiment: str, tmp_path: Path):
    """`relora compare --deployment` against a server with `relora serve`: the same table, and a diverged row."""
    with serving_prefect(tmp_path / "served") as server:
        environment = {
            **os.environ, "PREFECT_API_URL": server.api_url, "RELORA_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "relora_train.cli.app"]
        with (tmp_path / "serve.log").open("wb") as log:
            options = ["pretrain/quickstart", "--limit", "2", "--poll", "1"]
            serving = subprocess.Popen([*command, "serve", *options], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not server.post("/deployments/filter", limit=10):
                assert serving.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
            store = ["--seeds", "0", "--store", str(tmp_path / "store"), "--json"]
            compare = [*command, "compare", experiment, "--deployment", "pretrain/quickstart", *store]
            done = subprocess.run(compare, env=environment, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stderr[-3000:]
            summary = ComparisonSummary.model_validate_json(done.stdout)
            rows = {row.arm: (row.trained, row.diverged) for row in summary.comparison.arms}
            assert rows == {"relora": (1, 0), "lora": (1, 0), "explodes": (0, 1)}
            names = [run["name"] for run in server.all_of("/flow_runs/filter", sort="START_TIME_ASC")]
            assert len([name for name in names if name.startswith("smoke-")]) == 4
        finally:
            serving.terminate()
            serving.wait(timeout=60)
