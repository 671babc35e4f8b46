"""The summary of a run, as the command line prints it and scripts read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from relora_train.runs.evaluations import EvaluationOutcome
from relora_train.runs.run import DatasetRef, Run, StageOutcome
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


def summarize_stage(run: Run, outcome: StageOutcome) -> StageSummary:
    """Return a stage's row, from its manifest."""
    manifest = outcome.checkpoint.manifest
    start = manifest.parent.step if manifest.parent else 0
    return StageSummary(
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


def summarize_run(
    run: Run,
    dataset: DatasetRef,
    stages: Sequence[StageOutcome],
    evaluations: Sequence[EvaluationOutcome],
    *,
    later_stages: Sequence[str],
    dataset_reused: bool,
    report_uri: str,
    picture_uris: Sequence[str],
) -> RunSummary:
    """Summarize a finished flow run."""
    return RunSummary(
        run_id=run.run_id,
        store_uri=run.store_uri,
        dataset_uri=dataset.uri,
        dataset_reused=dataset_reused,
        stages=tuple(summarize_stage(run, outcome) for outcome in stages),
        later_stages=tuple(later_stages),
        evaluations=tuple(evaluation.record for evaluation in evaluations),
        evaluations_reused=sum(evaluation.reused for evaluation in evaluations),
        report_uri=report_uri,
        picture_uris=tuple(picture_uris),
    )
