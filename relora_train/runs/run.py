"""One run in a store: its identity and settings, the datasets and checkpoints it reads, and the line it is on.

Manifests in the store alone say what has been done. `find.py` looks a stage up, `train.py` trains it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from relora_train.checkpoints.fetch import fetch_bundle, fetch_checkpoint
from relora_train.checkpoints.layout import dataset_prefix, split_checkpoint_uri
from relora_train.checkpoints.lease import Lease, hold_run
from relora_train.checkpoints.lineage import CheckpointRef, read_checkpoint, removal_at
from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, find_dataset
from relora_train.checkpoints.run import CheckpointStore, RunView
from relora_train.data.interleaving import PARTS_FILE
from relora_train.errors import CheckpointNotFoundError, ObjectNotFoundError, ReLoRAError
from relora_train.events import Event
from relora_train.method.stages import Stage
from relora_train.runs.publishing import Publisher
from relora_train.runs.reporting import RunReporter
from relora_train.runs.tracking import Tracking
from relora_train.runs.workers import READY_WORKER, Worker
from relora_train.settings.base import FrozenConfig
from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.base import ObjectStore
from relora_train.storage.durable import write_durably
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import checkpoint_cache, dataset_cache, short_digest

if TYPE_CHECKING:
    from relora_train.runs.datasets import DatasetOutcome
    from relora_train.runs.evaluations import EvaluationOutcome

STORE_VARIABLE = "RELORA_STORE"

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Run:
    """Identity and settings of one run; in a session also what its one flow holds."""

    run_id: str
    store_uri: str
    profile: Profile
    branches: bool = False
    """True: started from a named checkpoint. Other settings are then meant, and live beside the run's own line."""
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """Proof that this process is the run's one writer; None for a reader."""
    worker: Worker = field(default_factory=Worker, compare=False, repr=False)
    """Trains its stages."""
    publisher: Publisher = field(default_factory=Publisher, compare=False, repr=False)
    """Stores checkpoints while later stages train; one that never started leaves each to its own stage."""
    view: RunView | None = field(default=None, compare=False, repr=False)
    """The run as its flow knows it; None to ask the store at every question."""

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.store_uri)

    @property
    def checkpoints(self) -> CheckpointStore:
        return self.view or CheckpointStore(self.store, self.run_id)

    def is_unstored(self, checkpoint: CheckpointRef | None) -> bool:
        """Return True if the checkpoint is still on its way into the store, where nothing made from it can be yet."""
        return checkpoint is not None and not self.publisher.is_stored(checkpoint)


@contextmanager
def session(run: Run, *, depends_on: Sequence[str] = (), stages: Sequence[Stage] = ()) -> Iterator[Run]:
    """Be the only flow that trains a run for the length of the block; yield the run with what that takes.

    depends_on, and errors: as for hold_run. stages: what is to be trained, for those who watch.
    """
    ready = READY_WORKER.get()
    READY_WORKER.set(None)
    publisher = Publisher()  # for a store on this machine it never starts: nothing is gained
    with (
        hold_run(run.store, run.run_id, depends_on=depends_on) as lease,
        closing(ready or Worker(keeps=True)) as worker,
        publisher if run.store.is_remote else nullcontext(),
        RunReporter(run.store, run.run_id, run.profile.name, stages, still_ours=lease.raise_if_lost),
        Tracking(run.run_id, run.profile),
    ):
        yield replace(run, lease=lease, worker=worker, publisher=publisher, view=RunView(run.store, run.run_id))


@dataclass(frozen=True)
class DatasetRef:
    """One committed dataset in a store."""

    store_uri: str
    manifest: DatasetManifest

    @property
    def prefix(self) -> str:
        return dataset_prefix(self.manifest.name, self.manifest.dataset_id)

    @property
    def uri(self) -> str:
        return f"{self.store_uri}/{self.prefix}"

    @property
    def dataset_id(self) -> str:
        return self.manifest.dataset_id


@dataclass(frozen=True)
class StageOutcome:
    """A stage's checkpoint, and how it came to be there."""

    checkpoint: CheckpointRef
    """The checkpoint in the store or, if it is not stored yet, as it will be."""
    reused: bool
    """True: it was committed already."""
    stored: bool = True
    """False: trained, durable on this machine, and the run's publisher has yet to store it."""


def default_store_uri() -> str:
    """Return $RELORA_STORE, else the directory relora-store where the command was given."""
    return os.environ.get(STORE_VARIABLE) or str(Path("relora-store").resolve())


def choose_run_id(profile: Profile, parent: CheckpointRef | None) -> str:
    """Return a run id for settings without one. The same settings and the same parent meet their own run again."""
    own = default_run_id(profile)
    if parent is None or parent.manifest.run_id == own:
        return own
    return f"{profile.name}-{settings_digest({'run': own, 'parent': parent.fingerprint})[:8]}"


def parts_of(dataset: DatasetRef) -> dict[str, DatasetRef | None]:
    """Return the datasets of a mixture's sources, by name, with None for one that is gone; none of another dataset."""
    found = {
        part.name: find_dataset(open_store(dataset.store_uri), part.name, part.dataset_id)
        for part in dataset.manifest.mixture
    }
    return {name: DatasetRef(dataset.store_uri, it) if it else None for name, it in found.items()}


def fetch_dataset(dataset: DatasetRef) -> Path:
    """Return a local directory with the dataset's verified files; of a mixture, with the places of its sources'.

    Raises ObjectNotFoundError where the dataset of a source is gone.
    """
    store, directory = open_store(dataset.store_uri), dataset_cache(dataset.dataset_id)
    fetched = fetch_bundle(store, dataset.prefix, dataset.manifest, directory)
    if not dataset.manifest.mixture:
        return fetched
    places: dict[str, str] = {}
    for name, part in parts_of(dataset).items():
        if part is None:
            raise ObjectNotFoundError(
                f"The dataset of source {name!r} of {dataset.uri} is gone. Prepare it again with the profile of the "
                "run, or copy it back."
            )
        places[name] = str(fetch_dataset(part).resolve())
    # Beside a cache of this machine, as the store's own directory is read-only and may be shared.
    mixed = directory.with_name(f"{directory.name}-mixed-{short_digest(store.uri)}")
    mixed.mkdir(parents=True, exist_ok=True)
    for entry in dataset.manifest.files:
        write_durably(mixed / entry.path, (fetched / entry.path).read_bytes())
    write_durably(mixed / PARTS_FILE, json.dumps(places).encode())
    write_durably(mixed / MANIFEST_NAME, dataset.manifest.model_copy(update={"files_prefix": ""}).to_bytes())
    return mixed


def fetch_parent(parent: CheckpointRef) -> Path:
    """Return a local directory with a checkpoint's verified files. Raise CheckpointNotFoundError if it was pruned."""
    store = open_store(parent.store_uri)
    if parent.is_pruned:
        raise CheckpointNotFoundError(removal_at(store, parent.prefix) or f"{parent.uri} is gone.")
    return fetch_checkpoint(parent, checkpoint_cache(parent.manifest.run_id), store=store)


def line_of(checkpoint: CheckpointRef | None, *, run: Run | None = None) -> list[CheckpointRef]:
    """Return the checkpoints that led to this one, oldest first, itself last, across runs and stores.

    Ends early, without an error, at an ancestor that was deleted: every checkpoint is complete without its parents.
    run: the one that a flow knows already, so that the store need not be asked.
    """
    line: list[CheckpointRef] = []
    current = checkpoint
    while current is not None:
        run_id, store_uri = current.manifest.run_id, current.store_uri
        if run is not None and (run.run_id, run.store.uri) == (run_id, store_uri):
            known = run.checkpoints
        else:
            known = CheckpointStore(open_store(store_uri), run_id)
        line = [*known.ancestry(current), *line]
        parent, current = line[0].manifest.parent, None
        if parent is not None and parent.fingerprint not in {ref.fingerprint for ref in line}:
            store_uri, prefix = split_checkpoint_uri(parent.uri)
            try:
                current = read_checkpoint(open_store(store_uri), prefix)
            except ReLoRAError:
                break
    return line


def line_to_head(run: Run, line: list[CheckpointRef]) -> list[CheckpointRef]:
    """Return the line and what the run has beyond its end, as after a command that added cycles to it."""
    whole = line_of(run.checkpoints.head(missing_ok=True), run=run)
    return whole if line and line[-1] in whole else line


def first_and_last(line: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """Return the checkpoints that are sampled from: the last one before any merge, and the last one."""
    before = [checkpoint for checkpoint in line if checkpoint.manifest.cycle == 0]
    chosen = [before[-1] if before else line[0], line[-1]]
    return chosen[:1] if chosen[0].fingerprint == chosen[1].fingerprint else chosen


class StageSummary(FrozenConfig):
    """One row of the final table."""

    stage: str
    start_step: int
    end_step: int
    tokens: int
    evaluation: dict[str, float]
    """The scores after the stage, and before it under names that end in '_before'; see the manifest."""

    seconds: float
    uri: str
    reused: bool
    divergence: dict[str, Any] = Field(default_factory=dict)
    """Empty unless the stage diverged and was trained at a lower learning rate; see the manifest."""


class RunSummary(FrozenConfig):
    """A finished flow run."""

    run_id: str
    store_uri: str
    dataset_uri: str
    dataset_reused: bool
    stages: tuple[StageSummary, ...]
    later_stages: tuple[str, ...] = ()
    """Stages beyond the profile's last one, which another command added. The report has them too."""

    evaluations: tuple[dict[str, Any], ...]
    """Scores and samples by the evaluation task."""

    evaluations_reused: int
    report_uri: str
    picture_uris: tuple[str, ...]


def summarize_run(
    run: Run,
    prepared: "DatasetOutcome",
    outcomes: Sequence[StageOutcome],
    evaluations: "Sequence[EvaluationOutcome]",
    later: Sequence[CheckpointRef],
    *,
    report_uri: str,
    picture_uris: Sequence[str],
) -> RunSummary:
    """Summarize a finished flow run. later: the checkpoints beyond the profile's last stage."""
    stages = []
    for outcome in outcomes:
        manifest = outcome.checkpoint.manifest
        start = manifest.parent.step if manifest.parent else 0
        stages.append(
            StageSummary(
                stage=manifest.stage,
                start_step=start,
                end_step=manifest.step,
                tokens=(manifest.step - start) * run.profile.batch.tokens,
                evaluation=manifest.evaluation,
                seconds=manifest.stage_seconds,
                uri=outcome.checkpoint.uri,
                reused=outcome.reused,
                divergence=manifest.divergence,
            )
        )
    return RunSummary(
        run_id=run.run_id,
        store_uri=run.store_uri,
        dataset_uri=prepared.dataset.uri,
        dataset_reused=prepared.reused,
        stages=tuple(stages),
        later_stages=tuple(checkpoint.manifest.stage for checkpoint in later),
        evaluations=tuple(evaluation.record for evaluation in evaluations),
        evaluations_reused=sum(evaluation.reused for evaluation in evaluations),
        report_uri=report_uri,
        picture_uris=tuple(picture_uris),
    )
