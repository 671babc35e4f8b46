"""Gathers a run from its line of checkpoints alone: manifests, metrics.jsonl, profile.json and weights.

Any line will do: a warm start only, method full or lora, or a run whose earlier stages are another run's checkpoints.
Imports no torch; only the files that are read are fetched, never an optimizer state.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

import numpy as np

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import CheckpointNotFoundError
from relora_train.reports.ranks.analysis import INITIAL, history_for_report, spectra_for_report, start_of_line
from relora_train.reports.run_data import (
    TRAIN_NUMBERS,
    TRAIN_RECORD,
    Evaluation,
    MergeRow,
    RunData,
    Sample,
    Scores,
    StageRow,
    TrainCurve,
)
from relora_train.reports.work import profile_of, rate_curve, stage_of, stage_work
from relora_train.runs.metrics import checkpoint_metrics
from relora_train.settings.objectives import SCORES, measures_in
from relora_train.settings.profile import Profile

_STAGE_FACTS = ("stage", "run_id", "cycle", "fingerprint", "size_bytes", "divergence")
_MERGE_NUMBERS = ("max_relative_output_change", "relative_update_norm", "effective_rank", "optimizer_state_zeroed")


def collect_run_data(
    line: Sequence[CheckpointRef],
    fetch_files: FetchFiles,
    *,
    evaluations: Sequence[Mapping[str, Any]] = (),
    task_scores: Sequence[Mapping[str, Any]] = (),
    spectra: bool = True,
) -> RunData:
    """Gather a run from its checkpoints, oldest first; the last one is the run's result.

    Reads metrics.jsonl and profile.json of every checkpoint, and with `spectra` the weights of two (that of
    `start_of_line` and the last) and all adapters; of large models neither, and the report says so. Raises
    CheckpointNotFoundError for an empty line.
    """
    if not line:
        raise CheckpointNotFoundError("There is no checkpoint to report on. Run at least one stage first.")
    last, manifests = line[-1].manifest, {ref.fingerprint: ref.manifest for ref in line}
    metrics = [list(checkpoint_metrics(checkpoint, fetch_files)) for checkpoint in line]
    train = train_curve([record for records in metrics for record in records])
    every = [(fetch_files(ref, ["profile.json"]) / "profile.json").read_bytes() for ref in line]
    settings, profiles = json.loads(every[-1]), [profile_of(one) for one in every]
    stages = [
        (stage_of(manifest, _parent(manifest, manifests), profile) if profile else None, profile, manifest)
        for manifest, profile in zip(manifests.values(), profiles, strict=True)
    ]
    update = _total_update(line, fetch_files) if spectra else {}
    return RunData(
        method=str(settings.get("method", "")),
        stages=_stage_rows(line, metrics, profiles),
        train=train,
        rates=rate_curve(stages, train),
        merges=tuple(
            MergeRow(
                stage=manifest.stage,
                step=manifest.step,
                cycle=int(report.get("cycle", manifest.cycle)),
                layers=report.get("layers", {}),
                **{name: report.get(name) for name in _MERGE_NUMBERS},
            )
            for manifest, report in ((ref.manifest, ref.manifest.merge_report) for ref in line)
            if report
        ),
        evaluations=tuple(
            Evaluation(
                checkpoint_uri=str(item["checkpoint_uri"]),
                stage=str(item["stage"]),
                step=int(item["step"]),
                scores=_scores(item),
                val_tokens=item.get(measures_in(item).scored),
            )
            for item in evaluations
        ),
        samples=tuple(
            Sample(str(item["stage"]), int(item["step"]), str(sample["prompt"]), str(sample["text"]))
            for item in evaluations
            for sample in item.get("samples", ())
        ),
        task_scores=tuple(task_scores),
        settings=settings,
        **{name: getattr(last, name) for name in ("run_id", "profile", "versions", "dataset_id", "dataset_uri")},
        finished_at=last.created_at.astimezone(UTC),
        **update,
    )


def train_curve(records: Sequence[Mapping[str, Any]]) -> TrainCurve:
    """Return the records of kind 'train' by step, the last written of each; those of other kinds are left out."""
    by_step = {int(record["step"]): record for record in records if record.get("kind") == "train"}
    train = np.zeros(len(by_step), dtype=TRAIN_RECORD).view(np.recarray)
    train["step"] = sorted(by_step)
    for name in TRAIN_NUMBERS:
        values = (by_step[step].get(name) for step in sorted(by_step))
        train[name] = [value if isinstance(value, (int, float)) else np.nan for value in values]
    return train


def _parent(manifest: CheckpointManifest, manifests: Mapping[str, CheckpointManifest]) -> CheckpointManifest | None:
    return manifests.get(manifest.parent.fingerprint) if manifest.parent else None


def stage_peak_bytes(checkpoint: CheckpointRef, fetch_files: FetchFiles) -> int | None:
    """Return the most memory that a stage's training held, on its first rank; None where that was not recorded."""
    peaks = [
        record.get("peak_bytes")
        for record in checkpoint_metrics(checkpoint, fetch_files)
        if record.get("kind") == "memory"
    ]
    return next((int(peak) for peak in reversed(peaks) if peak is not None), None)


def _stage_rows(
    line: Sequence[CheckpointRef], metrics: Sequence[list[dict[str, Any]]], profiles: Sequence[Profile | None]
) -> tuple[StageRow, ...]:
    manifests = {ref.fingerprint: ref.manifest for ref in line}  # not by URI: a store may have been moved
    rows = []
    for checkpoint, records, profile in zip(line, metrics, profiles, strict=True):
        manifest = checkpoint.manifest
        parent = manifest.parent
        before = {key.removesuffix("_before"): v for key, v in manifest.evaluation.items() if key.endswith("_before")}
        rows.append(
            StageRow(
                uri=checkpoint.uri,
                parent_uri=parent.uri if parent else None,
                start_step=parent.step if parent else 0,
                end_step=manifest.step,
                tokens=_stage_tokens(manifest, _parent(manifest, manifests)),
                seconds=manifest.stage_seconds,
                before=_scores(before),
                after=_scores(manifest.evaluation),
                rank=manifest.fingerprint_settings.get("relora.rank"),
                work=stage_work(manifest, records, profile),
                **{name: getattr(manifest, name) for name in _STAGE_FACTS},
            )
        )
    return tuple(rows)


def _stage_tokens(manifest: CheckpointManifest, parent: CheckpointManifest | None) -> int | None:
    if manifest.parent is None:
        return manifest.tokens_seen
    if parent is not None:
        return manifest.tokens_seen - parent.tokens_seen
    settings = manifest.fingerprint_settings
    sequences, length = settings.get("batch.sequences"), settings.get("batch.sequence_length")
    if not isinstance(sequences, int) or not isinstance(length, int):
        return None
    return sequences * length * (manifest.step - manifest.parent.step)


def _scores(values: Mapping[str, Any]) -> Scores:
    return Scores(**{name: values.get(name) for name in SCORES})


def _total_update(line: Sequence[CheckpointRef], fetch_files: FetchFiles) -> dict[str, Any]:
    """Return the fields of RunData that tell what the line has changed in the weights."""
    start, end = start_of_line(line), line[-1]
    if start is not None and start.uri == end.uri:
        return {}
    history, note = history_for_report(line, fetch_files)
    if start is None:
        spectra, why = tuple(layer[-1] for layer in history.growth) if history else (), ""
    else:
        spectra, why = spectra_for_report(start, end, fetch_files)
    return {
        "spectra_between": (INITIAL if start is None else start.manifest.stage, end.manifest.stage),
        "spectra": spectra,
        "history": history,
        "spectra_notes": tuple(text for text in (why, note) if text),
    }
