"""The retention policy of a run: the section [retention] of the profile its latest checkpoint was made with."""

from __future__ import annotations

from pydantic import ValidationError

from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.errors import CheckpointCorruptError
from relora_train.settings.profile import profile_to_read
from relora_train.storage.base import ObjectStore


def policy_of_run(store: ObjectStore, run_id: str) -> RetentionPolicy | None:
    """Return the policy of the newest checkpoint's profile; None if the run has no checkpoint or no policy."""
    refs = CheckpointStore(store, run_id).list()
    if not refs:
        return None
    newest = max(refs, key=lambda ref: ref.manifest.created_at)
    place = "/".join(part for part in (newest.prefix, newest.manifest.files_prefix, "profile.json") if part)
    try:
        retention = profile_to_read(store.get_bytes(place)[0]).retention
    except ValidationError as error:
        raise CheckpointCorruptError(
            f"{store.uri}/{place} is no valid profile: {error.errors()[0]['msg']}. Give --keep-last or --keep-every."
        ) from None
    if retention.keep_last is None and retention.keep_every is None:
        return None
    return RetentionPolicy(retention.keep_last, retention.keep_every)
