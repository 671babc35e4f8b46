"""The stages of a run: each is a function from one checkpoint to the next, and has a fingerprint.

The low-rank phase is counted in cycles, not in steps. Cycle k + 1 follows a checkpoint with k merges, wherever its step
lies: at the point where the jagged cosine of the settings in force has its k-th merge. So a run can be continued,
extended or branched with any schedule from any of its checkpoints; growing cycles are the exception.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.settings.keys import differing_settings, flatten, settings_digest
from relora_train.settings.method import DropoutMask
from relora_train.settings.objectives import DEFAULT_OBJECTIVE, own_settings
from relora_train.settings.profile import Profile, unset_later_keys

StageKind = Literal["full", "warm_start", "relora", "lora"]


@dataclass(frozen=True)
class Stage:
    """Updates start_step + 1 … end_step of a run."""

    name: str
    """'warm-start', 'cycle-2', 'lora' or 'full-3': part of names, URIs and logs."""

    kind: StageKind
    start_step: int
    end_step: int
    cycle: int
    """Merges done when the stage has ended; 0 for full-rank stages, after which cycles are counted anew."""

    phase_step: int
    """The stage's beginning on its learning rate's curve: updates of the low-rank phase, or of the run for full rank,
    that count as done before it."""

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def first_step(self) -> int:
        return self.start_step + 1

    @property
    def low_rank(self) -> bool:
        """True if A and B are trained and merged at the end."""
        return self.kind in ("relora", "lora")

    @property
    def keeps_optimizer(self) -> bool:
        """True if the next stage continues with the optimizer's state; a warm start's and a LoRA's end with them."""
        return self.kind in ("relora", "full")


def plan_stages(profile: Profile) -> tuple[Stage, ...]:
    """Return the stages of a run from its first step, in order.

    relora: warm start, then one stage a cycle. lora: warm start, then one low-rank stage merged at its end.
    full: full rank throughout, with a checkpoint wherever relora would have one.
    """
    warm = profile.schedule.warm_start_steps
    if profile.method == "full":
        return _full_rank_stages(profile, after=0)
    first = (Stage("warm-start", "warm_start", 0, warm, 0, phase_step=0),) if warm else ()
    return (*first, *_low_rank_stages(profile, after=warm, merges=0))


def stages_after(profile: Profile, parent: CheckpointManifest | None) -> tuple[Stage, ...]:
    """Return the stages that remain after any checkpoint of any run; () when nothing does. Without one, the whole plan.

    The same settings give the rest of the plan. With others:

    - relora goes on with cycle parent.cycle + 1 and ends after schedule.cycles in all. A checkpoint without a merge
      (a warm start, or full rank) counts as the warm start, whatever its step; a merged LoRA counts as one cycle.
    - More cycles than before lengthen the cosine: its horizon is the new total. So the first added cycle climbs to
      its point on the longer curve, above where the shorter one ended (without schedule.jagged in one step). With
      schedule.horizon the curve stays what it was.
    - Cycles that grow can only be gone on with as they are: their lengths follow from their number.
    - lora is one update, merged once: it starts from a checkpoint without a merge, and nothing follows it.
    - full goes on along the one cosine of the whole run, at the checkpoint's step.

    Raises ConfigError for another model than the checkpoint's, and for a LoRA from a checkpoint with merged cycles. So
    it does for cycles that grow and would not have ended where the checkpoint's did.
    """
    if parent is None:
        return plan_stages(profile)
    _refuse_another_model(profile, parent)
    if profile.method == "full":
        return _full_rank_stages(profile, after=parent.step)
    if profile.method == "lora" and parent.cycle:
        if parent.stage == "lora":
            return ()
        raise ConfigError(
            f"{parent.stage} of run {parent.run_id!r} has {parent.cycle} merged cycles, and a LoRA is one update that "
            f"is merged once. Begin before any merge, such as at {parent.run_id}@warm-start, or use method = 'relora'."
        )
    schedule, merges = profile.schedule, parent.cycle
    if schedule.cycle_growth != 1 and profile.method == "relora" and 0 < merges < schedule.cycles:
        done = parent.step - int(parent.fingerprint_settings.get("schedule.warm_start_steps", 0))
        if done != (expected := schedule.cycle_bounds[merges]):
            raise ConfigError(
                f"{parent.stage} of run {parent.run_id!r} ended after {done} steps of its cycles, where "
                f"schedule.cycle_growth {schedule.cycle_growth:g} with {schedule.cycles} cycles of "
                f"{schedule.cycle_length} steps on average has cycle {merges} end after {expected}: cycles that grow "
                "share their steps among all, so none can be added later. Set schedule.cycles, cycle_length and "
                "cycle_growth as they were there, or cycle_growth = 1 for further cycles of cycle_length steps each."
            )
    return _low_rank_stages(profile, after=parent.step, merges=merges)


def until(name: str | None, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages up to the one of this name, itself included; all for None. Raises ConfigError for another."""
    if name is None:
        return tuple(stages)
    names = [stage.name for stage in stages]
    if name not in names:
        raise ConfigError(f"There is no stage {name!r} to stop after; left to train are {', '.join(names) or 'none'}.")
    return tuple(stages[: names.index(name) + 1])


def _full_rank_stages(profile: Profile, *, after: int) -> tuple[Stage, ...]:
    """Return the full-rank stages; one that `after` lies in is cut to begin there."""
    schedule = profile.schedule
    warm = schedule.warm_start_steps
    bounds = [0, *([warm] if warm else []), *(warm + bound for bound in schedule.cycle_bounds[1:])]
    return tuple(
        Stage(f"full-{i}", "full", max(start, after), end, 0, phase_step=max(start, after))
        for i, (start, end) in enumerate(itertools.pairwise(bounds), start=1)
        if end > after
    )


def _low_rank_stages(profile: Profile, *, after: int, merges: int) -> tuple[Stage, ...]:
    """Return the stages that follow step `after`, at which `merges` cycles were done."""
    schedule = profile.schedule
    if profile.method == "lora":
        return (Stage("lora", "lora", after, after + schedule.phase_steps, 1, phase_step=0),)
    bounds = schedule.cycle_bounds[merges:]  # none are left where more were merged than there are
    return tuple(
        Stage(f"cycle-{cycle}", "relora", after + start - bounds[0], after + end - bounds[0], cycle, phase_step=start)
        for cycle, (start, end) in enumerate(itertools.pairwise(bounds), start=merges + 1)
    )


def _refuse_another_model(profile: Profile, parent: CheckpointManifest) -> None:
    """Raise if settings describe another model: the weights decide, so they would be recorded and not used."""
    ours = flatten({"model": profile.model.model_dump(mode="json"), **own_settings(profile)})
    ours["objective"] = profile.objective
    theirs = {key: value for key, value in parent.fingerprint_settings.items() if key in ours}
    theirs |= {"objective": theirs.get("objective", DEFAULT_OBJECTIVE)} if theirs else {}
    if theirs and (lines := differing_settings({key: ours[key] for key in theirs}, theirs)):
        shown = "".join(f"\n  - {line}" for line in lines)
        raise ConfigError(
            f"{parent.stage} of run {parent.run_id!r} holds another model than profile {profile.name!r} describes "
            f"(there -> now):{shown}\nA checkpoint is continued with its own model. Set these back, or start a run "
            "without --resume-from."
        )


def fingerprint_settings(
    profile: Profile,
    stage: Stage,
    dataset_id: str,
    *,
    pretrained_content: str | None = None,
    dropout_mask: DropoutMask | None = None,
) -> dict[str, Any]:
    """Return every setting that can change what the stage computes, as flat dotted keys with JSON values.

    Left out because they cannot: names, paths, logging, evaluation, number of ranks (data order and re-initialisation
    do not depend on it; sums may round differently), and whatever belongs to later stages or other methods only.
    A low-rank stage's schedule.warm_start_steps and total_steps say where its phase began and will end, in its own
    steps. On a branch these can differ from the profile's: one curve has one fingerprint.
    pretrained_content: digest of the files of model.pretrained, when the stage starts from them. dropout_mask: the kind
    that relora.dropout_mask = 'auto' was settled to.
    """
    named_below = {"learning_rate", "warm_start_learning_rate"} | unset_later_keys(profile, "optimizer")
    named_below |= set() if stage.low_rank else {"low_rank_state"}
    optimizer = profile.optimizer.model_dump(mode="json", exclude=named_below)
    unfrozen = set() if stage.low_rank else {"frozen"}
    settings: dict[str, Any] = {
        "stage": {"kind": stage.kind, "start_step": stage.start_step, "end_step": stage.end_step},
        "dataset_id": dataset_id,
        "seed": profile.seed,
        "model": profile.model.model_dump(mode="json"),
        "batch": profile.batch.model_dump(mode="json", exclude=unset_later_keys(profile, "batch")),
        "precision": profile.precision.model_dump(
            mode="json", exclude=unset_later_keys(profile, "precision") | unfrozen
        ),
        "optimizer": optimizer,
        "schedule": {
            "total_steps": profile.schedule.warm_start_steps + profile.schedule.horizon_steps,
            "warmup_steps": profile.schedule.warmup_steps,
            "min_lr_ratio": profile.schedule.min_lr_ratio,
        },
    }
    settings |= own_settings(profile)
    if pretrained_content is not None:
        settings["model"]["pretrained_content"] = pretrained_content
    if stage.kind == "warm_start":
        optimizer["warm_start_learning_rate"] = profile.warm_start_learning_rate
    else:
        optimizer["learning_rate"] = profile.optimizer.learning_rate
    if stage.low_rank:
        phase_start = stage.start_step - stage.phase_step
        settings["schedule"]["warm_start_steps"] = phase_start
        settings["schedule"]["total_steps"] = phase_start + profile.schedule.horizon_steps
        settings["relora"] = profile.relora.model_dump(mode="json", exclude={"dropout_mask", "train"})
        if frozen := profile.relora.frozen:  # absent otherwise: everything else was always trained
            settings["relora"]["train"] = dict.fromkeys(frozen, False)
        if "hash" in (dropout_mask, profile.relora.dropout_mask):  # absent otherwise: masks were once of one kind only
            settings["relora"]["dropout_mask"] = "hash"
    if stage.kind == "relora":
        settings["schedule"]["cycle_length"] = profile.schedule.cycle_length
        if profile.schedule.cycle_growth != 1:
            settings["schedule"]["cycle_growth"] = profile.schedule.cycle_growth
        if stage.cycle > 1:  # the first cycle climbs by warmup_steps
            settings["schedule"]["restart_warmup_steps"] = profile.schedule.restart_warmup_steps
            if not profile.schedule.jagged:  # absent otherwise: checkpoints from before the key keep their fingerprint
                settings["schedule"]["jagged"] = False
        unset = unset_later_keys(profile, "optimizer_reset")
        settings["optimizer_reset"] = profile.optimizer_reset.model_dump(mode="json", exclude=unset)
    return flatten(settings)


def stage_fingerprint(settings: dict[str, Any], parent_fingerprint: str | None) -> str:
    """Return a SHA-256 in hex over a stage's settings and its parent's fingerprint.

    A checkpoint with that fingerprint is that stage's result, whichever run made it.
    """
    return settings_digest({"settings": settings, "parent": parent_fingerprint})
