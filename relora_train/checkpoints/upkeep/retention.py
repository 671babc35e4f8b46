"""Decide which checkpoints of a run may go. pruning.py has the effects.

A checkpoint goes only if nothing says that it stays. These stay whatever the policy: the end of every line, and what
something outside the line depends on (protections.py). Every checkpoint is complete without its ancestors, so removing
one never damages a descendant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from relora_train.checkpoints.layout import join_key
from relora_train.checkpoints.lineage import CheckpointRef, line_to
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import CheckpointCorruptError, ConfigError
from relora_train.settings.profile import profile_to_read
from relora_train.storage.base import ObjectStore


@dataclass(frozen=True)
class RetentionPolicy:
    """keep_last: of every line the last so many; keep_every: also every so many-th cycle, the warm start included."""

    keep_last: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.keep_last, self.keep_every) if value is not None]
        if not given or min(given) < 1:
            raise ConfigError(
                f"keep_last {self.keep_last} and keep_every {self.keep_every} make no retention policy: give at least "
                "one of them, of at least 1, by --keep-last and --keep-every or in the profile's [retention]."
            )


@dataclass(frozen=True)
class Verdict:
    """A checkpoint and why it stays; no reason: it goes."""

    checkpoint: CheckpointRef
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        return bool(self.reasons)


def plan_pruning(
    history: Sequence[CheckpointRef], policy: RetentionPolicy, protected: Mapping[str, Sequence[str]]
) -> Sequence[Verdict]:
    """Return a verdict on every checkpoint that is there, in the order of `history`. Planning again changes nothing.

    history: CheckpointStore.history(), removed ones included, since they hold the lines together.
    protected: checkpoint prefix -> why others need it.
    """
    present = [ref for ref in history if not ref.is_pruned]
    lines = {ref.prefix: [known for known in line_to(ref, history) if not known.is_pruned] for ref in present}
    inner = {ancestor.prefix for line in lines.values() for ancestor in line[:-1]}
    ends = [ref for ref in present if ref.prefix not in inner]
    last = {ref.prefix for end in ends for ref in lines[end.prefix][-(policy.keep_last or 1) :]}
    verdicts = []
    for ref in present:
        reasons = list(protected.get(ref.prefix, ()))
        if ref in ends:
            reasons.append("the end of a line")
        elif ref.prefix in last:
            reasons.append(f"one of the last {policy.keep_last} of its line")
        if policy.keep_every is not None and stage_number(ref.manifest.stage) % policy.keep_every == 0:
            reasons.append(f"every {policy.keep_every} cycles")
        verdicts.append(Verdict(ref, tuple(reasons)))
    return verdicts


def stage_number(stage: str) -> int:
    """Return 3 for 'cycle-3' and 'full-3', 0 for 'warm-start', 1 for 'lora'."""
    number = re.search(r"-(\d+)$", stage)
    return int(number[1]) if number else int(stage == "lora")


def policy_of_run(store: ObjectStore, run_id: str) -> RetentionPolicy | None:
    """Return the policy of the newest checkpoint's profile; None if the run has no checkpoint or no policy."""
    refs = CheckpointStore(store, run_id).list()
    if not refs:
        return None
    newest = max(refs, key=lambda ref: ref.manifest.created_at)
    place = join_key(newest.prefix, newest.manifest.files_prefix, "profile.json")
    try:
        retention = profile_to_read(store.get_bytes(place)[0]).retention
    except ValidationError as error:
        raise CheckpointCorruptError(
            f"{store.uri}/{place} is no valid profile: {error.errors()[0]['msg']}. Give --keep-last or --keep-every."
        ) from None
    if retention.keep_last is None and retention.keep_every is None:
        return None
    return RetentionPolicy(retention.keep_last, retention.keep_every)
