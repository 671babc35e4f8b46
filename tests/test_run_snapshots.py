"""A stage and its snapshots in a store, without an orchestrator: kills, stops, other machines, outages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_runs import manifest_of, metrics_of, tiny_profile
from tiny_data import DATASET_ID, write_tiny_dataset

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.manifest import DatasetManifest, parse_manifest
from relora_train.errors import StoreUnavailableError, TrainerCrashedError
from relora_train.events import Event
from relora_train.method.stages import plan_stages
from relora_train.runs.run import DatasetRef, Run, StageOutcome, fetch_parent
from relora_train.runs.train import train_stage
from relora_train.storage.memory import MemoryStore

STEPS = 400
PROFILE = tiny_profile(
    schedule={"warm_start_steps": STEPS},
    snapshots={"every_steps": 20, "every_seconds": None},
    evaluation={"sequences": 8},
    launch={"threads": 1},
)
WARM_START = plan_stages(PROFILE)[0]


@pytest.fixture(scope="module")
def dataset_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(params=["local", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3_store_uri")
    return (tmp_path / "store").as_uri()


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on as another machine: nothing but the store is shared."""

    def go_on_as(name: str) -> None:
        monkeypatch.setenv("RELORA_CACHE", str(tmp_path / name))

    go_on_as("first-machine")
    return go_on_as


def with_dataset(run: Run, directory: Path) -> DatasetRef:
    path = directory / "manifest.json"
    manifest = parse_manifest(DatasetManifest, path.read_bytes(), uri=path.as_uri())
    return DatasetRef(run.store.uri, commit_bundle(run.store, dataset_prefix("tiny", DATASET_ID), directory, manifest))


class Story:
    """What happened in a stage, and what to do about it once."""

    def __init__(self, react: Callable[[Story, Event], None] = lambda story, event: None) -> None:
        self.seen: list[Event] = []
        self.react = react

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        self.react(self, event)

    def steps(self, name: str) -> list[int]:
        return [event["step"] for event in self.seen if event["event"] == name]

    @property
    def pid(self) -> int:
        return next(event["pid"] for event in self.seen if event["event"] == "stage_started")


def train(run: Run, directory: Path, story: Story) -> StageOutcome:
    return train_stage(run, WARM_START, with_dataset(run, directory), None, on_event=story, provenance={})


def kill_after_the_second_snapshot(story: Story, event: Event) -> None:
    if story.steps("snapshot_committed")[1:] and event["event"] == "snapshot_committed":
        os.kill(story.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(dataset_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a stage that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = Run("run", tmp_path_factory.mktemp("store").as_uri(), PROFILE)
        return fetch_parent(train(run, dataset_directory, Story()).checkpoint)


def assert_as_expected(outcome: StageOutcome, expected: Path) -> None:
    made = fetch_parent(outcome.checkpoint)
    assert (made / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    steps, losses = ([record[key] for record in metrics_of(made)] for key in ("step", "loss"))
    assert steps == [record["step"] for record in metrics_of(expected)]
    assert losses == [record["loss"] for record in metrics_of(expected)]
    assert manifest_of(made)["step"] == STEPS


def keys(run: Run, part: str) -> list[str]:
    return [info.key for info in run.store.list("runs/") if part in info.key]


def test_a_killed_trainers_stage_goes_on_from_its_snapshot_on_this_machine(
    store_uri: str, dataset_directory: Path, expected: Path
):
    run, first, second = Run("run", store_uri, PROFILE), Story(kill_after_the_second_snapshot), Story()
    with pytest.raises(TrainerCrashedError, match="SIGKILL"):
        train(run, dataset_directory, first)
    outcome = train(run, dataset_directory, second)
    (resumed,) = second.steps("resumed")
    assert resumed >= first.steps("snapshot_committed")[-1]
    assert min(second.steps("progress")) > resumed  # nothing before the snapshot was done again
    assert_as_expected(outcome, expected)
    assert keys(run, "/snapshots/") == []


def test_another_machine_goes_on_from_the_store(
    store_uri: str, dataset_directory: Path, expected: Path, machine: Callable[[str], None]
):
    first, second = Story(kill_after_the_second_snapshot), Story()
    with pytest.raises(TrainerCrashedError):
        train(Run("run", store_uri, PROFILE), dataset_directory, first)
    assert len([key for key in keys(Run("run", store_uri, PROFILE), "manifest.json") if "/snapshots/" in key]) <= 2
    machine("second-machine")
    outcome = train(Run("run", store_uri, PROFILE), dataset_directory, second)
    assert second.steps("resumed")[0] >= first.steps("snapshot_committed")[-1]
    assert_as_expected(outcome, expected)


def test_the_last_snapshot_of_an_orphan_is_waited_for(dataset_directory: Path, expected: Path, tmp_path: Path):
    """The flow's process was killed; its trainer is still saving its state when the next flow starts."""
    rarely = PROFILE.model_copy(update={"snapshots": PROFILE.snapshots.model_copy(update={"every_steps": None})})
    run, story = Run("run", (tmp_path / "store").as_uri(), rarely), Story()
    script = (
        "import sys, os, signal\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_run_snapshots import Run, Story, PROFILE, train\n"
        "def die(story, event):\n"
        "    if event['event'] == 'progress': os.kill(os.getpid(), signal.SIGKILL)\n"
        "snapshots = PROFILE.snapshots.model_copy(update={'every_steps': None})\n"
        "rarely = PROFILE.model_copy(update={'snapshots': snapshots})\n"
        "train(Run('run', sys.argv[2], rarely), Path(sys.argv[3]), Story(die))\n"
    )
    arguments = [str(Path(__file__).parent), run.store_uri, str(dataset_directory)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    outcome = train(run, dataset_directory, story)
    assert story.steps("resumed") and story.steps("resumed")[0] > 0
    assert_as_expected(outcome, expected)


def test_a_stopped_flow_leaves_a_snapshot_of_its_very_step_in_the_store(
    store_uri: str, dataset_directory: Path, expected: Path, machine: Callable[[str], None]
):
    def stop(story: Story, event: Event) -> None:
        if event["event"] == "progress" and not story.steps("snapshot_committed"):
            raise KeyboardInterrupt  # as SIGTERM, Ctrl-C and Prefect's cancellation do: a BaseException from anywhere

    rarely = PROFILE.model_copy(update={"snapshots": PROFILE.snapshots.model_copy(update={"every_steps": None})})
    first, second = Story(stop), Story()
    with pytest.raises(KeyboardInterrupt):
        train(Run("run", store_uri, rarely), dataset_directory, first)
    (stopped_at,) = first.steps("snapshot_committed")
    machine("second-machine")
    outcome = train(Run("run", store_uri, rarely), dataset_directory, second)
    assert second.steps("resumed") == [stopped_at]
    assert_as_expected(outcome, expected)


def test_a_damaged_newest_snapshot_costs_only_the_steps_since_the_one_before(
    dataset_directory: Path, expected: Path, tmp_path: Path, machine: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    run, second = Run("run", (tmp_path / "store").as_uri(), PROFILE), Story()
    with pytest.raises(TrainerCrashedError):
        train(run, dataset_directory, Story(kill_after_the_second_snapshot))
    before, newest = sorted((tmp_path / "store").glob("runs/run/snapshots/*/step-*"))
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    machine("second-machine")
    outcome = train(run, dataset_directory, second)
    assert second.steps("resumed") == [int(before.name.split("-")[1])]
    assert "Going on from the snapshot before it" in caplog.text
    assert_as_expected(outcome, expected)


class DownFor(MemoryStore):
    """Refuses every write of a snapshot until told otherwise."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.down, self.refused = False, 0

    def put_bytes(self, key: str, *arguments: Any, **options: Any) -> str:
        if self.down:
            self.refused += 1
            raise StoreUnavailableError("The store is down. Wait for it.")
        return super().put_bytes(key, *arguments, **options)


def test_training_goes_on_while_the_store_is_down_and_the_checkpoint_is_kept(
    dataset_directory: Path, expected: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store = DownFor("down")
    monkeypatch.setattr("relora_train.runs.run.open_store", lambda uri: store)
    run = Run("run", store.uri, PROFILE)

    def outage(story: Story, event: Event) -> None:
        store.down = store.down or event["event"] == "stage_started"

    first, second = Story(outage), Story()
    with pytest.raises(StoreUnavailableError):  # of the merge checkpoint: the task tries again
        train(run, dataset_directory, first)
    assert first.steps("stage_committed") == [STEPS] and store.refused > 1
    assert caplog.text.count("Training goes on") == 1
    store.down = False
    outcome = train(run, dataset_directory, second)
    assert second.seen == []  # not a step again: the checkpoint waited on this machine
    assert_as_expected(outcome, expected)
