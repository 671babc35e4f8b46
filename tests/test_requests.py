"""A run asks its store for what it cannot know, and for nothing twice: the number of requests does not grow as n²."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import checkpoint_manifest, dataset_manifest, write_files
from stage_runs import tiny_profile

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.run import CheckpointStore, RunView
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.errors import CheckpointNotFoundError, PreconditionFailedError
from relora_train.method.stages import plan_stages
from relora_train.runs.divergence import train_by_policy
from relora_train.runs.find import find_stage, stage_identity
from relora_train.runs.run import DatasetRef, Run, line_of, line_to_head, session
from relora_train.runs.train import store_trained, train_stage, work_name
from relora_train.storage.base import ObjectStore
from relora_train.storage.workspace import WorkDirectory
from relora_train.training.requests import StageRequest


class Counted:
    """A store that counts what it is asked; `remote`: as one worth publishing to beside the training."""

    def __init__(self, store: ObjectStore, *, remote: bool) -> None:
        self._store, self.is_remote, self.count = store, remote, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.count[name] += 1
        return getattr(self._store, name)


class Trainer:
    """Takes no time: leaves made-up files and their manifest."""

    def run(self, module: str, request: StageRequest, path: Path, **options: Any) -> None:
        files = write_files(request.output_directory, request.stage.name)
        stage, run_id = request.stage, request.run_id
        manifest = checkpoint_manifest(files, run_id=run_id, step=stage.end_step, stage=stage.name)
        update = {"fingerprint": request.fingerprint, "parent": request.parent, "dataset_id": request.dataset_id}
        (files / "manifest.json").write_bytes(manifest.model_copy(update=update).to_bytes())


def run_stages(store: Any, dataset: DatasetRef, run_id: str, cycles: int) -> list[CheckpointRef]:
    """Do what the flow `pretrain` does of a run, without the torch and the tasks."""
    profile = tiny_profile(schedule={"cycles": cycles, "cycle_length": 8})
    with session(Run(run_id, store.uri, profile)) as held:
        run, parent, waiting = replace(held, worker=Trainer()), None, None
        for stage in plan_stages(profile):
            outcome = train_by_policy(run, stage, dataset, parent, on_event=lambda event: None, provenance={})
            if waiting is not None:
                store_trained(run, waiting)
            waiting, parent = (None if outcome.stored else outcome), outcome.checkpoint
        if waiting is not None:
            parent = store_trained(run, waiting).checkpoint
        line = line_of(parent, run=run)
        assert line_to_head(run, line) == line and len(line) == cycles + 1
    return line


@pytest.mark.parametrize("remote", [False, True])
def test_requests_grow_with_the_stages_and_not_with_their_square(
    store: ObjectStore, remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    files = write_files(tmp_path / "data", "data")
    manifest = dataset_manifest(files)
    dataset = DatasetRef(
        store.uri, commit_bundle(store, dataset_prefix("corpus", manifest.dataset_id), files, manifest)
    )
    counted = Counted(store, remote=remote)
    monkeypatch.setattr("relora_train.runs.run.open_store", lambda uri: counted)
    line = run_stages(counted, dataset, "nine", cycles=8)
    assert counted.count["list"] < 30 and counted.count["get_bytes"] < 35, counted.count
    counted.count.clear()
    assert run_stages(counted, dataset, "nine", cycles=8) == line  # nothing is trained again
    assert counted.count["list"] < 30 and counted.count["get_bytes"] < 35, counted.count
    assert counted.count["put_file"] == 0
    counted.count.clear()
    run_stages(counted, dataset, "twenty", cycles=19)
    assert counted.count["list"] < 75 and counted.count["get_bytes"] < 75, counted.count


def committed(run: CheckpointStore, directory: Path, stage: str, step: int, parent: CheckpointRef | None = None) -> Any:
    files = write_files(directory / stage, stage)
    return run.commit(files, checkpoint_manifest(files, step=step, stage=stage, work=stage, parent=parent))


def test_a_view_knows_what_it_committed_and_reads_again_after_a_conditional_write_that_failed(
    memory: ObjectStore, tmp_path: Path
):
    counted = Counted(memory, remote=False)
    view, other = RunView(counted, "run"), CheckpointStore(memory, "run")
    one = committed(view, tmp_path, "one", 1)
    assert view.set_head(one) == one and view.history() == [one]
    counted.count.clear()
    assert (view.list(), view.head(), view.latest(), view.ancestry(one)) == ([one], one, one, [one])
    assert not counted.count["get_bytes"] and not counted.count["list"]
    two = committed(other, tmp_path, "two", 2, one)  # a rival, such as one that took the lease over
    other.set_head(two)
    assert view.latest() == one and view.set_head(one) == one  # known so far; the store's head is not sent back
    assert other.head() == two
    aside = committed(view, tmp_path, "aside", 3, one)
    with pytest.raises(PreconditionFailedError, match="Another writer moved the head"):
        view.set_head(aside)
    assert view.list() == [one, two, aside] and view.head() == other.head() == two
    three = committed(other, tmp_path, "three", 4, two)
    other.set_head(three)
    assert committed(view, tmp_path, "three", 4, two) == three  # adopted
    assert view.set_head(three) == three == view.latest()
    view.refresh()
    counted.count.clear()
    assert len(view.list()) == 4 and view.head() == three
    assert (counted.count["list"], counted.count["get_bytes"]) == (1, 1)  # the head; a manifest never changes


def test_a_head_is_not_moved_to_what_a_prune_beside_the_flow_removed(memory: ObjectStore, tmp_path: Path):
    run, view = CheckpointStore(memory, "run"), RunView(memory, "run")
    one = committed(run, tmp_path, "one", 1)
    two = committed(run, tmp_path, "two", 2, one)
    three = committed(run, tmp_path, "three", 3, two)
    assert view.history() == [one, two, three]
    prune_run(memory, "run", RetentionPolicy(keep_last=1))
    assert run.list() == [three]
    with pytest.raises(CheckpointNotFoundError, match="pruned meanwhile"):
        view.set_head(two)
    assert run.head() is None and view.set_head(three) == three == run.head()


def test_a_checkpoint_that_is_pruned_while_the_run_is_read_stays_in_its_history(memory: ObjectStore, tmp_path: Path):
    run = CheckpointStore(memory, "run")
    one = committed(run, tmp_path, "one", 1)
    two = committed(run, tmp_path, "two", 2, one)

    class Pruned(Counted):
        def list(self, prefix: str) -> Any:
            listed = list(memory.list(prefix))
            prune_run(memory, "run", RetentionPolicy(keep_last=1))
            return listed

    for found in (CheckpointStore(Pruned(memory, remote=False), "run"), RunView(Pruned(memory, remote=False), "run")):
        assert [(ref.uri, ref.is_pruned) for ref in found.history()] == [(one.uri, True), (two.uri, False)]


def test_a_stage_that_another_process_trained_meanwhile_is_looked_up_again(
    memory: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    dataset = DatasetRef(memory.uri, dataset_manifest(write_files(tmp_path / "data", "data")))
    profile = tiny_profile()
    (stage, *_) = plan_stages(profile)
    run = Run("run", memory.uri, profile, view=RunView(memory, "run"))
    settings, fingerprint = identity = stage_identity(run, stage, dataset.dataset_id, None)
    assert find_stage(run, stage, None, identity) is None
    work = WorkDirectory(*work_name(run, stage.name, fingerprint))
    identities: list[object] = []
    monkeypatch.setattr("relora_train.runs.find.pretrained_content", identities.append)
    with ThreadPoolExecutor() as pool:
        outcome = pool.submit(train_stage, run, stage, dataset, None, on_event=lambda event: None, provenance={})
        while "waiting for it" not in caplog.text and not outcome.done():
            time.sleep(0.01)
        files = write_files(tmp_path / "made", "made")
        manifest = checkpoint_manifest(files, step=stage.end_step, stage=stage.name)
        update = {"fingerprint": fingerprint, "fingerprint_settings": settings}
        made = CheckpointStore(memory, "run").commit(files, manifest.model_copy(update=update))
        work.release(remove=True)
        assert outcome.result(60).checkpoint == made and outcome.result().reused
    assert len(identities) == 1, "a local model.pretrained is read once, however often its stage is looked for"
