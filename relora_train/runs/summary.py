"""The summary of a run, as the command line prints it and scripts read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.runs.datasets import DatasetOutcome
from relora_train.runs.evaluations import EvaluationOutcome
from relora_train.runs.run import Run, StageOutcome
from relora_train.settings.base import FrozenConfig


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
    prepared: DatasetOutcome,
    outcomes: Sequence[StageOutcome],
    evaluations: Sequence[EvaluationOutcome],
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
