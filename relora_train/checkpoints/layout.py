"""The names of objects in a store. Pure functions.

- runs/<run_id>/checkpoints/step-00000400-<12 hex of the fingerprint>/    one merge checkpoint (a bundle)
- runs/<run_id>/checkpoints/step-00000400-<12 hex>/deleted.json           a checkpoint that was pruned (lineage.py)
- runs/<run_id>/snapshots/<12 hex of the fingerprint>/step-00000400-<8 hex>/  one snapshot inside a stage (a bundle)
- runs/<run_id>/refs/head.json                     the checkpoint that the run's line ends in
- runs/<run_id>/refs/<name>.json                   a pin: the checkpoint it names is never pruned
- runs/<run_id>/lease.json, prune.json             the flow that writes, or prunes (lease.py)
- runs/<run_id>/status.json                        how far the run is, for people (status.py)
- runs/<run_id>/diverged/<12 hex of the fingerprint>.json   a stage that diverged with these settings
- series/<name>/…                                  the promotions of a series (series_record.py)
- experiments/<name>/…                             reports of comparisons, runs that diverged
- datasets/<name>/<16 hex of dataset_id>/          one tokenized dataset (a bundle)
- preparing/<name>-<16 hex>/<16 hex of an attempt>/   ranges of a dataset on their way to other machines and back
- datasets/<name>/<16 hex of dataset_id>/deleting.json   its removal has begun (upkeep/datasets.py)
"""

import re
from dataclasses import dataclass

from relora_train.errors import ConfigError

HEAD_NAME = "head.json"
DELETING_NAME = "deleting.json"
EXPORT_NAME = "export-"
"""The beginning of a pin's name that marks an exported checkpoint."""

RUN_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_CHECKPOINT_PREFIX = re.compile(
    rf"runs/(?P<run_id>{RUN_ID_PATTERN})/checkpoints/step-(?P<step>\d{{8,}})-(?P<short>[0-9a-f]{{12}})"
)


@dataclass(frozen=True)
class CheckpointPlace:
    """A checkpoint's place, as its prefix names it."""

    prefix: str
    run_id: str
    step: int
    short_fingerprint: str


def check_name(name: str, what: str, *, longest: int = 100) -> str:
    """Return a name, or refuse one that could not be a folder and a part of a URI."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{longest - 1}}}", name):
        raise ConfigError(
            f"{name!r} is not a valid {what}: use 1 to {longest} letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit."
        )
    return name


def check_run_id(run_id: str) -> str:
    """Return the run id, or refuse one that could not be a folder and a part of a URI."""
    return check_name(run_id, "run id")


def join_key(*parts: str) -> str:
    """Join the parts of a key that are not empty."""
    return "/".join(part for part in parts if part)


def checkpoint_prefix(run_id: str, step: int, fingerprint: str) -> str:
    """Return the prefix of this work's checkpoint. A retry meets its own name, other settings never do."""
    return checkpoints_prefix(run_id) + checkpoint_name(step, fingerprint)


def checkpoint_name(step: int, fingerprint: str) -> str:
    """Return the last part of a checkpoint's prefix, which is the same in every run and store."""
    return f"step-{step:08d}-{fingerprint[:12]}"


def checkpoints_prefix(run_id: str) -> str:
    return f"runs/{check_run_id(run_id)}/checkpoints/"


def snapshots_prefix(run_id: str, fingerprint: str) -> str:
    """Return the prefix of one stage's snapshots, each named by snapshot_name."""
    return f"runs/{check_run_id(run_id)}/snapshots/{fingerprint[:12]}/"


def snapshot_name(step: int, attempt: str) -> str:
    """Return a name that no two attempts share, so that none meets another's leftovers."""
    return f"step-{step:08d}-{attempt[:8]}"


def parse_snapshot_name(name: str) -> int | None:
    """Return the step in a snapshot's name, or None for any other string."""
    match = re.fullmatch(r"step-(\d{8,})-[0-9a-f]{8}", name)
    return match and int(match[1])


def diverged_key(run_id: str, fingerprint: str) -> str:
    return f"runs/{check_run_id(run_id)}/diverged/{fingerprint[:12]}.json"


def parse_checkpoint_prefix(prefix: str) -> CheckpointPlace | None:
    """Return the place that a checkpoint's prefix names, or None for any other string."""
    match = _CHECKPOINT_PREFIX.fullmatch(prefix)
    return match and CheckpointPlace(prefix, match["run_id"], int(match["step"]), match["short"])


def split_checkpoint_uri(uri: str) -> tuple[str, str]:
    """Return store URI and prefix of a checkpoint's URI. Outside the layout it is a store of its own, prefix ''."""
    uri = uri.rstrip("/")
    root, separator, rest = uri.rpartition("/runs/")
    if separator and parse_checkpoint_prefix(f"runs/{rest}"):
        return root, f"runs/{rest}"
    return uri, ""


def experiment_prefix(name: str) -> str:
    """Return the prefix of an experiment's reports and records of diverged runs."""
    return f"experiments/{check_run_id(name)}/"


def dataset_prefix(name: str, dataset_id: str) -> str:
    """Return the prefix of a tokenized dataset, named by everything that decides its bytes."""
    return f"datasets/{check_name(name, 'dataset name')}/{dataset_id[:16]}"


def preparing_prefix(work: str, attempt: str) -> str:
    """Return the prefix below which one attempt at a dataset passes its ranges to other machines."""
    return f"preparing/{check_name(work, 'dataset name')}/{attempt}"
