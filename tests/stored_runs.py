"""Runs in a store whose stages are trained in this process, as `train_by_policy` would have a process do it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_data import DATASET_ID, write_tiny_dataset

from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest, read_manifest
from relora_train.events import Event
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import Stage, stages_after
from relora_train.runs.divergence import train_by_policy
from relora_train.runs.run import DatasetRef, Run
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from relora_train.training.requests import StageRequest
from relora_train.training.trainer import run_stage


def _slightly_more(profile: Profile, stage: Stage, step: int) -> float:
    return 1.01 * learning_rate(profile, stage, step)


class Workshop:
    """A store with a tiny dataset, and what was trained for it, in order."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.store_uri = root.as_uri()
        self.store = open_store(self.store_uri)
        write_tiny_dataset(root / dataset_prefix("tiny", DATASET_ID))
        manifest = read_manifest(self.store, dataset_prefix("tiny", DATASET_ID), DatasetManifest)
        assert manifest is not None
        self.dataset: DatasetRef = DatasetRef(self.store.uri, manifest)
        self.trained: list[tuple[str, float]] = []
        self.events: list[Event] = []
        self.disturbed = False
        """Whether a stage comes out with other weights than its settings give, as on a GPU that rounds otherwise."""
        patch.setenv("RELORA_CACHE", str(root.parent / "cache"))
        patch.setattr("relora_train.runs.workers.run_worker", self._work)

    def _work(self, module: str, request: StageRequest, path: Path, **options: Any) -> None:
        assert module == "relora_train.training.trainer"
        self.trained.append((request.stage.name, request.profile.optimizer.learning_rate))
        request = StageRequest.model_validate_json(request.model_dump_json())  # as it comes out of its file
        with pytest.MonkeyPatch.context() as patch:
            if self.disturbed:
                patch.setattr("relora_train.training.step.learning_rate", _slightly_more)
            run_stage(request, lambda event, **fields: None)

    def train(self, profile: Profile, run_id: str = "tiny", parent: CheckpointRef | None = None) -> list[CheckpointRef]:
        """What the flow does: every stage that is left, found or trained."""
        run, line = Run(run_id, self.store_uri, profile, branches=parent is not None), []
        for stage in stages_after(profile, parent.manifest if parent else None):
            outcome = train_by_policy(run, stage, self.dataset, parent, on_event=self.events.append, provenance={})
            parent = outcome.checkpoint
            line.append(parent)
        return line

    def names(self) -> list[str]:
        """The stages trained since the last call."""
        names = [name for name, _ in self.trained]
        self.trained.clear()
        return names
