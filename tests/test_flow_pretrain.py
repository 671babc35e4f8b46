"""The whole pipeline on real text, on a directory and on a real S3 server."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect_server import PREFECT_WARNS, running_prefect
from tracked import of_tensorboard
from transformers import AutoModelForCausalLM

from relora_train import events
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.status import read_status
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.cli import run
from relora_train.cli.run import closing_lines
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ProfileInvalidError,
    RunInUseError,
    RunSettingsChangedError,
    StoreUnavailableError,
)
from relora_train.events import Event
from relora_train.runs.run import RunSummary, fetch_parent
from relora_train.runs.survey import RunOverview, survey_runs
from relora_train.storage.opening import open_store

pytestmark = PREFECT_WARNS

OVERRIDES = {"launch.threads": 1}


@pytest.fixture(scope="module", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")):
        yield


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@contextmanager
def listening(react: Callable[[Event], None]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            react(record.event)

    handler = Handler()
    events.listen(handler)
    try:
        yield
    finally:
        events.unlisten(handler)


def run_smoke(store: Path | str, **parameters: Any) -> tuple[RunSummary, list[Event]]:
    """Run the smoke profile; its summary and every event."""
    from flows.pretrain import pretrain

    seen: list[Event] = []
    overrides = {**OVERRIDES, **parameters.pop("overrides", {})}
    with listening(seen.append):
        summary = pretrain("smoke", overrides=overrides, store=str(store), **parameters)
    return summary, seen


def trained(seen: list[Event]) -> list[str]:
    """Stages a trainer process was started for."""
    return [event["stage"] for event in seen if event["event"] == "stage_started"]


def model_bytes(summary: RunSummary) -> list[bytes]:
    """The weights of every stage, from the store."""
    contents = []
    for stage in summary.stages:
        checkpoint = resolve_checkpoint(stage.uri, open_store(summary.store_uri))
        contents.append((fetch_parent(checkpoint) / "model.safetensors").read_bytes())
    return contents


@pytest.fixture(scope="module")
def local_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def finished(local_store: Path) -> tuple[RunSummary, list[Event]]:
    return run_smoke(local_store, run_id="first")


def test_the_pipeline_trains_every_stage_once_and_reports(finished: tuple[RunSummary, list[Event]], local_store: Path):
    summary, seen = finished
    assert trained(seen) == ["warm-start", "cycle-1", "cycle-2"]
    assert [stage.stage for stage in summary.stages] == ["warm-start", "cycle-1", "cycle-2"]
    assert all(s.evaluation["val_perplexity"] < s.evaluation["val_perplexity_before"] for s in summary.stages)
    assert [event["cycle"] for event in seen if event["event"] == "merge"] == [1, 2]
    report = Path(summary.report_uri.removeprefix("file://"))
    assert report.is_file() and "cycle-2" in report.read_text()
    assert [evaluation["stage"] for evaluation in summary.evaluations] == ["warm-start", "cycle-2"]
    assert all(evaluation["samples"][0]["text"] for evaluation in summary.evaluations)
    checkpoint = Path(summary.stages[-1].uri.removeprefix("file://"))
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == 512


def test_a_second_run_does_no_step_again(finished: tuple[RunSummary, list[Event]], local_store: Path):
    first, _ = finished
    before = {path: path.stat().st_mtime_ns for path in local_store.rglob("*.safetensors")}
    second, seen = run_smoke(local_store, run_id="first")
    assert trained(seen) == []
    assert second.dataset_reused and all(stage.reused for stage in second.stages)
    assert second.evaluations_reused == 2
    assert [stage.uri for stage in second.stages] == [stage.uri for stage in first.stages]
    assert {path: path.stat().st_mtime_ns for path in local_store.rglob("*.safetensors")} == before


def test_a_stage_whose_manifest_is_gone_is_trained_again_and_nothing_else(
    finished: tuple[RunSummary, list[Event]], local_store: Path
):
    """No cache outlives a deleted checkpoint: what has been done is what the manifests say."""
    summary, _ = finished
    weights = model_bytes(summary)
    Path(summary.stages[2].uri.removeprefix("file://"), "manifest.json").unlink()
    again, seen = run_smoke(local_store, run_id="first")
    assert trained(seen) == ["cycle-2"]
    assert model_bytes(again) == weights


def test_s3_gives_the_same_weights_bit_for_bit(finished: tuple[RunSummary, list[Event]], s3_store_uri: str):
    summary, seen = run_smoke(s3_store_uri, run_id="on-s3")
    assert trained(seen) == ["warm-start", "cycle-1", "cycle-2"]
    assert summary.report_uri.startswith(s3_store_uri)
    status = read_status(open_store(s3_store_uri), "on-s3")
    assert status is not None and (status.state, status.records) == ("done", ())  # all are in the store
    assert model_bytes(summary) == model_bytes(finished[0])
    _, seen = run_smoke(s3_store_uri, run_id="on-s3")
    assert trained(seen) == []


def test_a_killed_cycle_is_retried_alone(
    finished: tuple[RunSummary, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.runs.tracking._END_SECONDS", 300.0)  # a machine may be slow
    killed: list[int] = []
    shown: list[RunOverview] = []

    def kill_once(event: Event) -> None:
        if event["event"] == "merge":
            shown.extend(survey_runs(open_store(tmp_path)))
        if event["event"] == "stage_started" and event["stage"] == "cycle-1" and not killed:
            killed.append(event["pid"])
            os.kill(event["pid"], signal.SIGKILL)

    tracking = {"tracking.to": ["tensorboard"], "tracking.directory": str(tmp_path / "tracked")}
    with listening(kill_once):
        summary, seen = run_smoke(tmp_path, run_id="killed", overrides=tracking)
    assert killed and trained(seen) == ["warm-start", "cycle-1", "cycle-1", "cycle-2"]
    assert model_bytes(summary) == model_bytes(finished[0])
    assert [(run.state, run.planned_steps) for run in shown] == [("running", 60)] * 2
    assert all(run.holder == shown[0].holder and f"process {os.getpid()} " in run.holder for run in shown)
    assert [(run.state, run.step, run.holder) for run in survey_runs(open_store(tmp_path))] == [("done", 60, None)]
    told = of_tensorboard(tmp_path / "tracked", "killed")
    steps = [step for step, _ in told["train/loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 60  # also where a cycle was begun again
    assert [step for step, _ in told["merge/effective_rank"]] == [40, 60]
    assert {f"samples/{stage}" for stage in ("warm-start", "cycle-2")} <= told.keys()


def test_a_cycle_killed_after_a_snapshot_is_retried_from_it_and_repeats_only_the_steps_since(
    finished: tuple[RunSummary, list[Event]], tmp_path: Path
):
    pids: dict[str, int] = {}
    saved: list[int] = []

    def kill_after_a_snapshot(event: Event) -> None:
        if event["event"] == "stage_started":
            pids[event["stage"]] = event["pid"]
        elif event["event"] == "snapshot_committed" and event["stage"] == "cycle-1" and not saved:
            saved.append(event["step"])
            os.kill(pids["cycle-1"], signal.SIGKILL)

    with listening(kill_after_a_snapshot):
        summary, seen = run_smoke(tmp_path, run_id="killed", overrides={"snapshots.every_steps": 4})
    assert trained(seen) == ["warm-start", "cycle-1", "cycle-1", "cycle-2"]
    resumed = [event for event in seen if event["event"] == "resumed"]
    assert [event["stage"] for event in resumed] == ["cycle-1"]
    assert 20 < saved[0] <= resumed[0]["step"] < 40
    assert model_bytes(summary) == model_bytes(finished[0])
    assert not list(tmp_path.glob("runs/killed/snapshots/*/*"))


def test_any_merge_checkpoint_of_another_run_can_be_continued_exactly(
    finished: tuple[RunSummary, list[Event]], local_store: Path, tmp_path: Path
):
    summary, seen = run_smoke(tmp_path / "other-store", run_id="continued", resume_from=finished[0].stages[1].uri)
    assert trained(seen) == ["cycle-2"]
    assert model_bytes(summary) == model_bytes(finished[0])[2:]
    _, seen = run_smoke(local_store, resume_from="first@cycle-1", run_id="beside")
    assert trained(seen) == ["cycle-2"]


def test_other_settings_branch_from_a_checkpoint(finished: tuple[RunSummary, list[Event]], local_store: Path):
    summary, seen = run_smoke(
        local_store, run_id="branch", resume_from="first@cycle-1", overrides={"relora.rank": 4, "relora.alpha": 4}
    )
    assert trained(seen) == ["cycle-2"]
    assert model_bytes(summary)[-1] != model_bytes(finished[0])[-1]


def test_a_run_id_used_again_with_other_settings_is_refused_by_name(
    finished: tuple[RunSummary, list[Event]], local_store: Path
):
    with pytest.raises(RunSettingsChangedError, match=r"optimizer\.betas") as caught:
        run_smoke(local_store, run_id="first", overrides={"optimizer.betas": [0.9, 0.95]})
    assert "--run-id" in str(caught.value) and "--resume-from" in str(caught.value)


def test_other_settings_of_a_run_are_refused_before_prefect_is_started(
    finished: tuple[RunSummary, list[Event]], local_store: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[str] = []
    monkeypatch.setattr(run, "run_shown", lambda flow, parameters, *rest, **options: started.append(flow))

    def relora_run(*sets: str) -> None:
        run.run("smoke", ["launch.threads=1", *sets], run_id="first", store=str(local_store))

    with pytest.raises(RunSettingsChangedError, match=r"optimizer\.betas"):
        relora_run("optimizer.betas=[0.9, 0.95]")
    with pytest.raises(RunSettingsChangedError, match=r"at stage cycle-1:\n  - relora\.rank: 8 -> 4"):
        relora_run("relora.rank=4", "relora.alpha=8")
    assert not started
    relora_run()
    assert started == ["pretrain"]


def test_a_second_flow_of_a_run_stops_while_the_first_lives_and_takes_over_when_it_is_dead(
    finished: tuple[RunSummary, list[Event]], local_store: Path
):
    holding = "import sys; from relora_train.checkpoints.lease import hold_run"
    opening = "from relora_train.storage.opening import open_store"
    held = "with hold_run(open_store(sys.argv[1]), 'first'): print('held', flush=True); sys.stdin.read()"
    program = f"{holding}; {opening}\n{held}"
    command = [sys.executable, "-c", program, str(local_store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunInUseError, match=f"process {first.pid} on"):
            run_smoke(local_store, run_id="first")
        first.kill()
    _, seen = run_smoke(local_store, run_id="first")
    assert trained(seen) == []


def test_a_pruned_run_is_done_and_its_removed_stages_are_not_trained_again(tmp_path: Path):
    from flows.prune import prune

    run_smoke(tmp_path, run_id="pruned")
    (report,) = prune(store=str(tmp_path), keep_last=1)
    assert [ref.manifest.stage for ref in report.removed] == ["warm-start", "cycle-1"]
    summary, seen = run_smoke(tmp_path, run_id="pruned")
    assert trained(seen) == [] and all(stage.reused for stage in summary.stages)
    assert resolve_checkpoint("pruned", open_store(tmp_path)).manifest.stage == "cycle-2"
    with pytest.raises(RunSettingsChangedError):
        run_smoke(tmp_path, run_id="pruned", overrides={"optimizer.betas": [0.9, 0.95]})
    assert prune(store=str(tmp_path), keep_last=1)[0].removed == []
    assert verify_run(open_store(tmp_path), "pruned").findings == []


def test_a_branch_never_takes_over_a_run_that_started_elsewhere(
    finished: tuple[RunSummary, list[Event]], local_store: Path
):
    summary, _ = run_smoke(local_store, run_id="own", overrides={"schedule.cycles": 1, "seed": 1})
    with pytest.raises(RunSettingsChangedError, match="did not start from"):
        run_smoke(local_store, run_id="own", resume_from="first@cycle-1")
    assert resolve_checkpoint("own@latest", open_store(local_store)).uri == summary.stages[-1].uri


def test_a_flipped_byte_in_the_parent_is_refused_before_training(tmp_path: Path):
    summary, _ = run_smoke(tmp_path, run_id="flip", overrides={"schedule.cycles": 1})
    weights = Path(summary.stages[0].uri.removeprefix("file://"), "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        run_smoke(tmp_path, run_id="flip-2", resume_from=summary.stages[0].uri, overrides={"schedule.cycles": 1})


def test_bad_input_is_refused_before_any_work(local_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.exceptions import ParameterTypeError

    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        run_smoke(local_store, resume_from="nowhere@cycle-1")
    with pytest.raises(ParameterTypeError, match="run_id"):
        run_smoke(local_store, run_id="../escape")
    with pytest.raises(ParameterTypeError, match=r"overrides\.relora\.rank: .* greater than or equal to 1"):
        run_smoke(local_store, overrides={"relora.rank": 0})
    with pytest.raises(ProfileInvalidError, match=r"relora\.rank 65 exceeds 64"):
        run_smoke(local_store, overrides={"relora.rank": 65})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("tasks.store.open_run_store.retry_delay_seconds", [0, 0, 0])
    with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:9"):
        run_smoke("s3://bucket/prefix")


def test_a_finished_run_is_extended_in_place_by_one_command(
    finished: tuple[RunSummary, list[Event]], local_store: Path
):
    """The run keeps its name and its line; the same command again finds nothing left to do."""
    extension = {"run_id": "longer", "resume_from": "longer@latest", "overrides": {"schedule.cycles": 3}}
    run_smoke(local_store, run_id="longer")
    summary, seen = run_smoke(local_store, **extension)
    assert trained(seen) == ["cycle-3"]
    assert [stage.stage for stage in summary.stages] == ["cycle-3"]
    again, seen = run_smoke(local_store, **extension)
    assert trained(seen) == [] and again.stages == ()
    first, seen = run_smoke(local_store, run_id="longer")
    assert trained(seen) == [] and first.later_stages == ("cycle-3",) and again.later_stages == ()
    report = json.loads(Path(first.report_uri.removeprefix("file://")).with_name("summary.json").read_text())
    assert [row["stage"] for row in report["stages"]] == ["warm-start", "cycle-1", "cycle-2", "cycle-3"]
    assert [item["stage"] for item in report["evaluations"]][-1] == "cycle-3"
    assert "Not of this command: cycle-3," in "\n".join(closing_lines(first, seconds=1.0))
    assert resolve_checkpoint("longer@latest", open_store(summary.store_uri)).uri == summary.stages[0].uri


def test_a_diverged_cycle_is_lowered_in_the_flow_and_named_in_summary_and_report(tmp_path: Path):
    overrides = {
        "optimizer.learning_rate": 1000.0,
        "optimizer.warm_start_learning_rate": 4e-3,
        "optimizer.max_grad_norm": None,
        "schedule.cycles": 1,
        "divergence.on_divergence": "lower_lr",
        "divergence.factor": 4e-6,
    }
    summary, seen = run_smoke(tmp_path, run_id="explosive", overrides=overrides)
    assert trained(seen) == ["warm-start", "cycle-1", "cycle-1"]
    assert [event["stage"] for event in seen if event["event"] == "diverged"] == ["cycle-1"]
    assert summary.stages[1].divergence["attempts"] == 1
    assert "cycle-1 diverged once" in Path(summary.report_uri.removeprefix("file://")).read_text()
    _, seen = run_smoke(tmp_path, run_id="explosive", overrides=overrides)
    assert trained(seen) == []
