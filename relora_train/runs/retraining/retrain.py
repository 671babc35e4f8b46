"""One retrain of a series: what is new, what is trained on it, and whether the result is promoted. No torch.

A retrain goes on from the champion (or begins anew with `fresh_warm_start`) on what its source holds more than when
the series was last trained, scores the result and the champion on the same held-out set, and promotes the better one.
Everything it does has a name that follows from its data, settings and champion, and is found again by that name: a
killed retrain is continued, a doubled one adopts what the first did, a missed one only leaves more data for the next.
A refused candidate's data counts as seen unless `retry_refused`: the next night's candidate would be refused for the
same reason, and old data come back through `old_data_ratio`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from relora_train.checkpoints.lease import Lease
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.checkpoints.series import find_champion, promote, who
from relora_train.checkpoints.series_record import Change, Scores, check_series, find_series
from relora_train.data.dataset_inputs import inputs_of
from relora_train.data.selection import Selection, contents_of
from relora_train.data.sources import Source, resolve_source
from relora_train.errors import ConfigError, CorpusEmptyError, CorpusTooSmallError, PreconditionFailedError
from relora_train.runs.datasets import Corpus, DatasetOutcome, prepare_or_reuse
from relora_train.runs.kept_worker import KeptWorker
from relora_train.runs.publishing import Publisher
from relora_train.runs.retraining.options import MarginKind, RetrainOptions
from relora_train.runs.retraining.series_data import (
    Decision,
    Outcome,
    Pending,
    SeriesData,
    begin,
    end,
    read_data,
    read_decisions,
    record_decision,
    scores_record,
)
from relora_train.runs.run import DatasetRef, OnEvent, Run
from relora_train.runs.tokenizer_choice import as_checkpoint
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
    """What one retrain does, decided before any work."""

    series: str
    store_uri: str
    options: RetrainOptions
    profile: Profile
    champion: CheckpointRef | None
    """What the candidate is compared with; None in a new series."""
    corpus: Corpus
    new: tuple[str, ...]
    """Digests of the new files, or the hub revision: what counts as seen afterwards."""
    run_id: str
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """That this process is the series' one writer."""

    @property
    def parent(self) -> CheckpointRef | None:
        """What the candidate is trained from."""
        return None if self.options.fresh_warm_start else self.champion

    @property
    def depends_on(self) -> Sequence[str]:
        """What must not be pruned meanwhile."""
        return [self.champion.uri] if self.champion else []

    def run(self, lease: Lease | None, worker: KeptWorker | None = None, publisher: Publisher | None = None) -> Run:
        """The run that the candidate is trained in."""
        return Run(
            self.run_id,
            self.store_uri,
            self.profile,
            branches=self.parent is not None,
            lease=lease,
            worker=worker,
            publisher=publisher,
        )


def plan_retrain(
    store: ObjectStore, series: str, settings: Profile, options: RetrainOptions, *, lease: Lease | None = None
) -> RetrainPlan | None:
    """What to train on and from where; None when the source holds nothing that the series has not seen.

    Raises ConfigError for settings with which the series cannot go on, and the errors of the source and its store.
    """
    check_series(series)
    _refuse_other_objectives(settings)
    _finish_promoted(store, series)
    data, _ = read_data(store, series)
    _refuse_other_split(settings, data)
    champion = find_champion(store, series)
    source = resolve_source(settings.data)
    new = _new_parts(source, data, champion)
    if not new:
        return None
    parent = None if options.fresh_warm_start else champion
    if parent is None:
        selection = Selection(new=_known_parts(source, data, new))
    else:
        old = _known_parts(source, data, ())
        selection = Selection(new=new, old=old, old_ratio=options.old_data_ratio, seed=settings.seed)
    tokenizer = facts_of(settings).tokenizer()
    if champion is not None:
        kept = as_checkpoint(champion, settings, always=True)
        tokenizer, settings = kept.tokenizer, settings.model_copy(update={"data": kept.data})
        source = replace(source, data=kept.data)
    profile = settings if parent is None else _lengthened(settings, parent, options.cycles)
    identity = {
        "settings": default_run_id(profile.model_copy(update={"data": DataConfig(), "tokenizer": TokenizerConfig()})),
        "dataset": inputs_of(source, tokenizer, selection).dataset_id,
        "parent": parent.fingerprint if parent else None,
    }
    return RetrainPlan(
        series=series,
        store_uri=store.uri,
        options=options,
        profile=profile,
        champion=champion,
        corpus=Corpus(tokenizer, selection),
        new=new,
        run_id=f"{series}-{settings_digest(identity)[:8]}",
        lease=lease,
    )


def prepare_next(run: Run, plan: RetrainPlan, *, on_event: OnEvent) -> DatasetOutcome | None:
    """The committed dataset of a plan, made if need be; None when the new documents do not fill one update.

    Then they wait, as new as before, for more to come. The first dataset of a series, and one for a fresh warm start,
    must suffice: else CorpusTooSmallError.
    """
    try:
        outcome = prepare_or_reuse(run, on_event=on_event, corpus=plan.corpus)
        if note := outcome.dataset.manifest.statistics.get("split_note"):
            raise CorpusTooSmallError(
                f"Series {plan.series!r} needs documents of which the split rule holds some out: {note}. Give more "
                "documents, or cut long files into documents (JSON lines)."
            )
    except (CorpusEmptyError, CorpusTooSmallError) as error:
        if plan.parent is None:
            raise
        _log.info("%s", error)
        _wait_for_more(plan)
        return None
    batch, manifest = run.profile.batch, outcome.dataset.manifest
    enough = count_sequences(manifest, "train", batch.sequence_length) >= batch.sequences
    if plan.parent is None or (enough and count_sequences(manifest, "val", batch.sequence_length)):
        return outcome
    _wait_for_more(plan)
    return None


def _wait_for_more(plan: RetrainPlan) -> None:
    """Bind the next retrain to nothing: it shall take what has come by then too."""
    end(open_store(plan.store_uri), plan.series, (), replaces=False)


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

    A champion that changed since the plan was made was not compared with: then nothing is promoted ('overtaken'), and
    the data stay new for a retrain that goes on from the other one.
    """
    if plan.lease is not None:
        plan.lease.check()
    store, options = open_store(plan.store_uri), plan.options
    scores = Scores(
        candidate_loss=evaluation["val_loss"],
        champion_loss=champion_evaluation["val_loss"] if champion_evaluation else None,
        dataset_uri=dataset.uri,
    )
    better, reason = judge(scores.candidate_loss, scores.champion_loss, options.margin, options.margin_kind)
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
        scores=scores_record(scores),
        margin=f"{options.margin:g} {options.margin_kind}",
        new=plan.new,
        data_is_seen=outcome == "promoted" or (outcome == "refused" and not options.retry_refused),
        by=who(),
        provenance=dict(provenance),
    )
    record_decision(store, decision)
    seen = plan.new if decision.data_is_seen else ()
    end(store, plan.series, seen, replaces=plan.profile.data.source == "hub")
    return decision


def judge(candidate: float, champion: float | None, margin: float, kind: MarginKind) -> tuple[bool, str]:
    """Whether a candidate's validation loss beats the champion's by the margin, and why. Pure.

    Without a champion any finite loss does. With margin 0 it must still be lower, not equal.
    """
    if not math.isfinite(candidate):
        return False, f"its validation loss is {candidate}"
    if champion is None:
        return True, f"first of its series, validation loss {candidate:.4f}"
    needed = margin * champion if kind == "relative" else margin
    asked = f"{margin:.2%}" if kind == "relative" else f"{margin:g}"
    gain = champion - candidate
    shown = f"validation loss {candidate:.4f} against {champion:.4f}, better by {gain:.4f} ({gain / champion:.2%})"
    if not math.isfinite(champion):
        return True, f"validation loss {candidate:.4f} against {champion}"
    return gain > 0 and gain >= needed, f"{shown}; a margin of {asked} is asked for"


def count_sequences(manifest: DatasetManifest, split: str, sequence_length: int) -> int:
    """Sequences in an epoch of a split, as dataset.py cuts them, from the manifest alone. Pure."""
    size = {"uint16": 2, "uint32": 4}[manifest.token_dtype]
    shards = (entry for entry in manifest.files if entry.path.startswith(f"{split}/") and entry.path.endswith(".bin"))
    return sum(max(0, entry.size_bytes // size - 1) // sequence_length for entry in shards)


def _finish_promoted(store: ObjectStore, series: str) -> None:
    """Count the data of a retrain as seen that was killed between its promotion and its end."""
    data, _ = read_data(store, series)
    found = find_series(store, series)
    pending = data.pending
    if pending is None or found is None:
        return
    made = [change for change in found[0].changes if change.run_id == pending.run_id]
    if any(change.replaced == pending.champion for change in made):
        _log.warning("A retrain of series %r was killed after its promotion; its data counts as seen now.", series)
        if not any(one.run_id == pending.run_id and one.outcome == "promoted" for one in read_decisions(store, series)):
            record_decision(store, _decision_of(store, series, made[-1], pending))
        end(store, series, pending.new, replaces=pending.is_revision)


def _decision_of(store: ObjectStore, series: str, change: Change, pending: Pending) -> Decision:
    """The decision that a killed retrain could not write down any more, from the history."""
    return Decision(
        series=series,
        run_id=pending.run_id,
        outcome="promoted",
        reason=change.reason,
        candidate_uri=f"{store.uri}/{change.checkpoint}",
        champion_uri=f"{store.uri}/{change.replaced}" if change.replaced else None,
        scores=scores_record(change.scores) if change.scores else {},
        margin="",
        new=pending.new,
        data_is_seen=True,
        by=change.by,
        at=change.at,
    )


def _refuse_other_split(settings: Profile, data: SeriesData) -> None:
    if settings.data.validation_paths:
        raise ConfigError(
            "A series scores on what the split rule holds out of its new documents, so data.validation_paths does not "
            "go with it. Leave it out, or train with `relora run`."
        )
    ours = settings.data.validation_fraction
    if data.validation_fraction not in (None, ours):
        raise ConfigError(
            f"Series {data.series!r} holds out {data.validation_fraction} of its documents since its first retrain; "
            f"with data.validation_fraction {ours} the held-out set would be another. Set it back to "
            f"{data.validation_fraction}, or start another series."
        )


def _refuse_other_objectives(settings: Profile) -> None:
    if not OBJECTIVES[settings.objective].in_series:
        raise ConfigError(
            f"Profile {settings.name!r} has objective {settings.objective!r}, and a series goes on with new documents "
            "of text. Train it with `relora run`."
        )


def _new_parts(source: Source, data: SeriesData, champion: CheckpointRef | None) -> tuple[str, ...]:
    """What the source holds that the series has not seen; of a retrain that was killed, what it had begun with."""
    there = contents_of(source)
    new = tuple(part for part in there if part not in set(data.seen))
    pending = data.pending
    if pending is None or pending.champion != (champion.prefix if champion else None):
        return new
    return pending.new if pending.is_revision or set(pending.new) <= set(there) else new


def _known_parts(source: Source, data: SeriesData, new: Sequence[str]) -> tuple[str, ...]:
    """The parts of the source that the series has seen, and `new`; of a hub dataset the one revision to read."""
    if source.data.source == "hub":
        return tuple(new) or data.seen
    return tuple(sorted({*new, *(set(contents_of(source)) & set(data.seen))}))


def _lengthened(settings: Profile, parent: CheckpointRef, cycles: int) -> Profile:
    """The settings with so many cycles more than the parent has done."""
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
