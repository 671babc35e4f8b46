"""One retrain of a series: what is new, what is trained on it, and whether the result is promoted.

A retrain goes on from the champion (or begins anew with `fresh_warm_start`) on what its source holds more than when
the series was last trained. It scores the result and the champion on the same held-out set and promotes the better one.
A refused candidate's data counts as seen unless `retry_refused`: the next night's candidate would be refused for the
same reason, and old data come back through `old_data_ratio`.

All that it makes is found again by a name that follows from its data, settings and champion. A killed retrain is
continued, a doubled one adopts what the first did, and a missed one only leaves more data for the next.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from relora_train.checkpoints.lease import Lease
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.checkpoints.series import find_champion, promote, who
from relora_train.checkpoints.series_record import Scores, check_series
from relora_train.data.remote_shards import MapRanges
from relora_train.data.selection import Selection, contents_of, inputs_of
from relora_train.data.sources import resolve_source
from relora_train.errors import ConfigError, CorpusEmptyError, CorpusTooSmallError, PreconditionFailedError
from relora_train.runs.datasets import DatasetOutcome, TextSettings, as_checkpoint, prepare_or_reuse
from relora_train.runs.retraining.interface import MarginKind, RetrainOptions
from relora_train.runs.retraining.series_data import (
    Decision,
    Outcome,
    Pending,
    begin,
    end,
    finish_promoted,
    read_data,
    record_decision,
    scores_record,
)
from relora_train.runs.run import DatasetRef, OnEvent, Run
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.keys import settings_digest
from relora_train.settings.objectives import OBJECTIVES
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.training.models.registry import facts_of

_log = logging.getLogger("relora_train.runs.retraining.retrain")


@dataclass(frozen=True)
class RetrainPlan:
    """The decisions of one retrain, made before any work."""

    series: str
    store_uri: str
    options: RetrainOptions
    profile: Profile
    champion: CheckpointRef | None
    """The candidate is compared with it; None in a new series."""
    text: TextSettings
    new: tuple[str, ...]
    """Digests of the new files, or the hub revision, which count as seen afterwards."""
    run_id: str
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """Proof that this process is the series' one writer."""

    @property
    def parent(self) -> CheckpointRef | None:
        """The checkpoint that the candidate is trained from."""
        return None if self.options.fresh_warm_start else self.champion

    @property
    def run(self) -> Run:
        """The run that the candidate is trained in."""
        return Run(self.run_id, self.store_uri, self.profile, branches=self.parent is not None)


def plan_retrain(
    store: ObjectStore, series: str, settings: Profile, options: RetrainOptions, *, lease: Lease | None = None
) -> RetrainPlan | None:
    """Return what to train on and from where, or None if the source holds nothing that the series has not seen.

    Raises ConfigError for settings with which the series cannot go on, and the errors of the source and its store.
    """
    check_series(series)
    if not OBJECTIVES[settings.objective].in_series:
        raise ConfigError(
            f"Profile {settings.name!r} has objective {settings.objective!r}, and a series goes on with new documents "
            "of text. Train it with `relora run`."
        )
    finish_promoted(store, series)
    data, _ = read_data(store, series)
    if settings.data.sources:
        raise ConfigError(
            "A series goes on with the new documents of one source, so [[data.sources]] does not go with it. Name one "
            "source in [data], or train with `relora run`."
        )
    if settings.data.validation_paths:
        raise ConfigError(
            "A series scores on what the split rule holds out of its new documents, so data.validation_paths does not "
            "go with it. Leave it out, or train with `relora run`."
        )
    if data.validation_fraction not in (None, ours := settings.data.validation_fraction):
        raise ConfigError(
            f"Series {series!r} holds out {data.validation_fraction} of its documents since its first retrain; "
            f"with data.validation_fraction {ours} the held-out set would be another. Set it back to "
            f"{data.validation_fraction}, or start another series."
        )
    champion = find_champion(store, series)
    source = resolve_source(settings.data)
    there, pending = contents_of(source), data.pending
    new = tuple(part for part in there if part not in set(data.seen))
    if pending is not None and pending.champion == (champion.prefix if champion else None):  # a retrain was killed
        new = pending.new if pending.is_revision or set(pending.new) <= set(there) else new
    if not new:
        return None
    parent = None if options.fresh_warm_start else champion
    # A hub dataset is one part, its revision: the new one holds what the old one held.
    is_hub = settings.data.source == "hub"
    old = data.seen if is_hub else tuple(sorted(set(there) & set(data.seen)))
    if parent is None:
        selection = Selection(new=new if is_hub else tuple(sorted({*new, *old})))
    else:
        selection = Selection(new=new, old=old, old_ratio=options.old_data_ratio, seed=settings.seed)
    text = TextSettings(settings.data, facts_of(settings).tokenizer())
    if champion is not None:
        text = as_checkpoint(champion, settings, always=True)
        settings = settings.model_copy(update={"data": text.data})
    profile = settings if parent is None else _lengthened(settings, parent, options.cycles)
    identity = {
        "settings": default_run_id(profile.model_copy(update={"data": DataConfig(), "tokenizer": TokenizerConfig()})),
        "dataset": inputs_of(replace(source, data=text.data), text.tokenizer, selection).dataset_id,
        "parent": parent.fingerprint if parent else None,
    }
    return RetrainPlan(
        series=series,
        store_uri=store.uri,
        options=options,
        profile=profile,
        champion=champion,
        text=replace(text, selection=selection),
        new=new,
        run_id=f"{series}-{settings_digest(identity)[:8]}",
        lease=lease,
    )


def prepare_next(
    run: Run, plan: RetrainPlan, *, on_event: OnEvent, map_ranges: MapRanges | None = None
) -> DatasetOutcome | None:
    """Return the committed dataset of a plan, made if need be, or None if the new documents do not fill one update.

    Then they stay new and wait for more. The first dataset of a series, and one for a fresh warm start,
    must suffice: else CorpusTooSmallError.
    """
    try:
        outcome = prepare_or_reuse(run, on_event=on_event, text=plan.text, map_ranges=map_ranges)
        manifest, batch = outcome.dataset.manifest, run.profile.batch
        if note := manifest.statistics.get("split_note"):
            raise CorpusTooSmallError(
                f"Series {plan.series!r} needs documents of which the split rule holds some out: {note}. Give more "
                "documents, or cut long files into documents (JSON lines)."
            )
        enough = count_sequences(manifest, "train", batch.sequence_length) >= batch.sequences
        if plan.parent is None or (enough and count_sequences(manifest, "val", batch.sequence_length)):
            return outcome
    except (CorpusEmptyError, CorpusTooSmallError) as error:
        if plan.parent is None:
            raise
        _log.info("%s", error)
    end(open_store(plan.store_uri), plan.series, (), replaces=False)  # the next one takes what has come by then too
    return None


def start(plan: RetrainPlan) -> None:
    """Write down the data of a retrain whose training begins, so that a rerun takes the same. Safe to repeat."""
    pending = Pending(run_id=plan.run_id, new=plan.new, champion=plan.champion.prefix if plan.champion else None)
    begin(open_store(plan.store_uri), plan.series, pending, plan.profile.data.validation_fraction)


def conclude(
    plan: RetrainPlan,
    candidate: CheckpointRef,
    evaluation: Mapping[str, Any],
    champion_evaluation: Mapping[str, Any] | None,
    dataset: DatasetRef,
    *,
    provenance: Mapping[str, str],
) -> Decision:
    """Promote the candidate or refuse it, keep the decision, then count its data as seen. Safe to kill and to repeat.

    If the champion changed since the plan was made, the two were not compared. Then nothing is promoted ('overtaken'),
    and the data stay new for a retrain that goes on from the other champion.
    """
    if plan.lease is not None:
        plan.lease.check()
    store, options = open_store(plan.store_uri), plan.options
    scores = Scores(
        candidate_loss=evaluation["val_loss"],
        champion_loss=champion_evaluation["val_loss"] if champion_evaluation else None,
        dataset_uri=dataset.uri,
    )
    gate, ours, theirs = options.gate, scores.candidate_loss, scores.champion_loss
    shown = scores_record(scores)
    if gate is not None:
        ours, theirs = evaluation["gate_score"], (champion_evaluation or {}).get("gate_score")
        shown |= {"gate": gate, "candidate_score": ours, "champion_score": theirs}
    better, reason = judge(ours, theirs, options.margin, options.margin_kind, gate=gate)
    outcome: Outcome = "refused"
    if better:
        expected = plan.champion.prefix if plan.champion else None
        try:
            promote(store, plan.series, candidate, reason=reason, expected=expected, run_id=plan.run_id, scores=scores)
            outcome = "promoted"
        except PreconditionFailedError as error:
            outcome, reason = "overtaken", str(error)
    decision = Decision(
        series=plan.series,
        run_id=plan.run_id,
        outcome=outcome,
        reason=reason,
        candidate_uri=candidate.uri,
        champion_uri=plan.champion.uri if plan.champion else None,
        scores=shown,
        margin=f"{options.margin:g} {options.margin_kind}" + (f" of {gate}" if gate else ""),
        new=plan.new,
        data_is_seen=outcome == "promoted" or (outcome == "refused" and not options.retry_refused),
        by=who(),
        provenance=dict(provenance),
    )
    record_decision(store, decision)
    seen = plan.new if decision.data_is_seen else ()
    end(store, plan.series, seen, replaces=plan.profile.data.source == "hub")
    return decision


def judge(
    candidate: float, champion: float | None, margin: float, kind: MarginKind, *, gate: str | None = None
) -> tuple[bool, str]:
    """Return True if a candidate beats the champion by the margin, and the reason. Pure.

    The validation loss must be lower, or the score of a gate higher. Without a champion any finite number is enough.
    With margin 0 an equal one is not.
    """
    what = gate or "validation loss"
    if not math.isfinite(candidate):
        return False, f"its {what} is {candidate}"
    if champion is None:
        return True, f"first of its series, {what} {candidate:.4f}"
    if not math.isfinite(champion):
        return True, f"{what} {candidate:.4f} against {champion}"
    needed = margin * abs(champion) if kind == "relative" else margin
    asked = f"{margin:.2%}" if kind == "relative" else f"{margin:g}"
    gain = candidate - champion if gate else champion - candidate
    share = f" ({gain / champion:.2%})" if champion else ""
    shown = f"{what} {candidate:.4f} against {champion:.4f}, better by {gain:.4f}{share}"
    return gain > 0 and gain >= needed, f"{shown}; a margin of {asked} is asked for"


def count_sequences(manifest: DatasetManifest, split: str, sequence_length: int) -> int:
    """Count the sequences in an epoch of a split, as dataset.py cuts them, from the manifest alone. Pure."""
    size = {"uint16": 2, "uint32": 4}[manifest.token_dtype]
    shards = (entry for entry in manifest.files if entry.path.startswith(f"{split}/") and entry.path.endswith(".bin"))
    return sum(max(0, entry.size_bytes // size - 1) // sequence_length for entry in shards)


def _lengthened(settings: Profile, parent: CheckpointRef, cycles: int) -> Profile:
    """Return the settings with so many cycles more than the parent has done."""
    schedule = settings.schedule
    if settings.method == "lora" and parent.manifest.cycle:
        raise ConfigError(
            "A LoRA is one update that is merged once, so a series of method 'lora' cannot go on from its champion. "
            "Use method = 'relora', or a fresh warm start every time."
        )
    if schedule.cycle_growth != 1:
        raise ConfigError(
            f"schedule.cycle_growth {schedule.cycle_growth:g} shares a run's steps among all its cycles, so a series "
            "cannot go on from its champion with further ones. Use cycle_growth = 1, or a fresh warm start every time."
        )
    done = parent.manifest.cycle
    if settings.method == "full":
        done = max(0, math.ceil((parent.step - schedule.warm_start_steps) / schedule.cycle_length))
    return settings.model_copy(update={"schedule": schedule.model_copy(update={"cycles": done + cycles})})
