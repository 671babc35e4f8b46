"""The flow `evaluate`: any checkpoint, on demand; and what every flow does about stores and devices."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect_server import PREFECT_WARNS, running_prefect
from task_files import write_tasks

from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.errors import AccessDeniedError, CheckpointNotFoundError, ConfigError
from relora_train.runs.evaluations import dataset_of, evaluate_or_reuse, profile_of, score_checkpoint
from relora_train.runs.run import Run, RunSummary
from relora_train.settings.running import LaunchConfig
from relora_train.storage.opening import open_store

pytestmark = PREFECT_WARNS

OVERRIDES = {
    "launch": {"threads": 1},
    "method": "full",
    "schedule": {"cycles": 1, "warm_start_steps": 0},
    "evaluation": {"final_sequences": 8},
}
"""One stage: what is evaluated here needs no method."""


@pytest.fixture(scope="module", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    from flows.pretrain import pretrain

    return pretrain("smoke", overrides=OVERRIDES, run_id="scored", store=str(tmp_path_factory.mktemp("store")))


def forget_scores(summary: RunSummary) -> None:
    store = open_store(summary.store_uri)
    for info in list(store.list("runs/scored/evaluations/")):
        store.delete(info.key)


def test_a_checkpoint_is_scored_once_and_then_its_scores_are_reused(finished: RunSummary):
    from flows.evaluate import evaluate

    recorded = evaluate("scored", store=finished.store_uri)
    assert recorded.reused and recorded.record == finished.evaluations[0]
    forget_scores(finished)
    made = evaluate(finished.stages[-1].uri, store=finished.store_uri)
    assert not made.reused and made.record == recorded.record
    assert evaluate("scored@latest", store=finished.store_uri).reused


def test_a_checkpoint_is_scored_by_tasks_once(finished: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from flows.evaluate import evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    asked = {
        "store": finished.store_uri,
        "tasks": ["choice"],
        "include": str(write_tasks(tmp_path / "tasks")),
        "limit": 3,
    }
    made = evaluate("scored", **asked)
    assert not made.reused and made.record["checkpoint_uri"] == finished.stages[-1].uri
    (scores,) = made.record["task_scores"]
    assert [score["documents"] for score in scores["scores"]] == [3, 3]
    again = evaluate("scored", **asked)
    assert again.reused and again.record == made.record
    with pytest.raises(ConfigError, match="nowhere, where tasks are to be included from"):
        evaluate("scored", **{**asked, "include": str(tmp_path / "nowhere")})


def test_a_checkpoint_that_is_no_name_or_is_not_there_is_refused(finished: RunSummary):
    from prefect.exceptions import ParameterTypeError

    from flows.evaluate import evaluate

    with pytest.raises(ParameterTypeError, match="checkpoint"):
        evaluate("no name at all", store=finished.store_uri)
    with pytest.raises(CheckpointNotFoundError, match="nothing"):
        evaluate("nothing@latest", store=finished.store_uri)


def test_a_deployed_run_needs_a_store_that_outlives_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from flows.evaluate import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELORA_STORE", raising=False)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "deployed")
    with pytest.raises(ConfigError, match="set RELORA_STORE where the worker is started"):
        evaluate("some-run")
    with pytest.raises(ConfigError, match="'here' is a relative path"):
        evaluate("some-run", store="here")
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    with pytest.raises(CheckpointNotFoundError):
        evaluate("some-run")


def test_a_device_is_held_while_it_is_used_and_a_limit_that_does_not_exist_is_refused(finished: RunSummary):
    from prefect.client.orchestration import get_client

    from flows.evaluate import evaluate
    from tasks.limits import device_slot

    with pytest.raises(ConfigError, match="prefect gcl create gpu --limit 1"):
        evaluate("scored", store=finished.store_uri, gpu_limit="gpu")
    with pytest.raises(ConfigError, match="it was deleted"), device_slot("gpu"):
        pass
    with get_client(sync_client=True) as client:
        client._client.post("/v2/concurrency_limits/", json={"name": "gpu", "limit": 1}).raise_for_status()

        def held() -> int:
            return int(client._client.get("/v2/concurrency_limits/gpu").json()["active_slots"])

        with device_slot("gpu"):
            assert held() == 1
        assert held() == 0
        assert evaluate("scored", store=finished.store_uri, gpu_limit="gpu").reused
        assert held() == 0
        with pytest.raises(KeyError), device_slot("gpu"):
            raise KeyError
        assert held() == 0
    with device_slot(None):
        pass


def test_a_store_that_can_only_be_read_still_has_its_checkpoints_scored(
    finished: RunSummary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def denied(*arguments: object) -> None:
        raise AccessDeniedError("Access is denied.")

    forget_scores(finished)
    monkeypatch.setattr("relora_train.runs.evaluations.put_json", denied)
    made = score_checkpoint(resolve_checkpoint("scored", open_store(finished.store_uri)), on_event=print)
    assert made.record["val_loss"] == finished.evaluations[0]["val_loss"]
    assert "not recorded, so the next evaluation makes them again: Access is denied." in caplog.text


def test_a_run_whose_ranks_share_its_model_has_it_scored_by_ranks_that_do(
    finished: RunSummary,
):
    forget_scores(finished)
    checkpoint = resolve_checkpoint("scored", open_store(finished.store_uri))
    launch = LaunchConfig(nproc_per_node=2, threads=1, sharding="full")
    profile = profile_of(checkpoint).model_copy(update={"launch": launch})
    run, ranks = Run("scored", finished.store_uri, profile), []
    start = run.worker.run
    run.worker.run = lambda *a, launch, **o: (ranks.append(launch.world_size), start(*a, launch=launch, **o))[1]
    made = evaluate_or_reuse(run, checkpoint, dataset_of(checkpoint), on_event=print)
    assert ranks == [2]
    assert made.record["val_loss"] == pytest.approx(finished.evaluations[0]["val_loss"], rel=1e-6)
