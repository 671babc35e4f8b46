"""Find the one checkpoint that a person names, and list what a store holds across its runs.

RUN, RUN@latest               the end of the run's line
RUN@cycle-2, RUN@warm-start   that stage on the run's line (full-2, lora: likewise)
RUN@step-400                  that step on the run's line
series:NAME, series:NAME@3    the champion of the series; the one that its change 3 made
s3://.., file:///.., /path  a checkpoint's own URI or directory, in any store

Ambiguous, incomplete and absent ones are errors, never guesses.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from relora_train.checkpoints.layout import (
    RUN_ID_PATTERN,
    CheckpointPlace,
    checkpoints_prefix,
    parse_checkpoint_prefix,
    split_checkpoint_uri,
)
from relora_train.checkpoints.lineage import (
    CheckpointRef,
    end_of_line,
    line_to,
    read_checkpoint,
    removal_at,
    without_pruned_ends,
)
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import resolve_series
from relora_train.checkpoints.series_record import SERIES_PATTERN
from relora_train.errors import (
    CheckpointAmbiguousError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ConfigError,
)
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.storage.redaction import refuse_secrets
from relora_train.text import did_you_mean

_log = logging.getLogger("relora_train.checkpoints.names")

_NAMED_RUNS = 20
_SERIES = "series:"
_NAME = re.compile(rf"(?P<run_id>{RUN_ID_PATTERN})(@(?P<selector>[A-Za-z0-9-]+))?")


def resolve_checkpoint(spec: str, default_store: ObjectStore) -> CheckpointRef:
    """Return the one committed checkpoint that `spec` names; `default_store` holds the runs and series."""
    if "://" in refuse_secrets(spec):
        return _at_uri(spec)
    if spec.startswith(_SERIES):
        match = re.fullmatch(rf"{_SERIES}(?P<name>{SERIES_PATTERN})(@(?P<number>\d+))?", spec)
        if match is None:
            raise ConfigError(
                f"{spec!r} names no promoted checkpoint: write series:NAME, or series:NAME@3 for change 3."
            )
        return resolve_series(default_store, match["name"], int(match["number"]) if match["number"] else None)
    if "/" in spec or spec in (".", ".."):
        return _at_directory(spec)
    match = _NAME.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"{spec!r} names no checkpoint: write RUN, RUN@latest, RUN@cycle-2, RUN@warm-start, RUN@step-400, "
            "series:NAME, or a checkpoint's URI or directory."
        )
    listed = default_store.list(checkpoints_prefix(match["run_id"]))
    places = ["/".join(info.key.split("/")[:4]) for info in listed]
    if match["selector"] is None and Path(spec).is_dir():
        if places:
            raise CheckpointAmbiguousError(f"{spec!r} is a run and a directory: write {spec}@latest or ./{spec}.")
        return _at_directory(spec)
    return _of_run(CheckpointStore(default_store, match["run_id"]), match["selector"] or "latest", places)


def _of_run(run: CheckpointStore, selector: str, places: Sequence[str]) -> CheckpointRef:
    """Return the checkpoint that a selector names. places: the prefixes at which the run has objects."""
    refs = run.list()
    if not refs and places:
        raise _incomplete(run, f"{run.store.uri}/{places[0]}")
    if not refs:
        raise unknown_run(run.store, run.run_id)
    if selector == "latest" and (latest := run.latest()):
        return latest
    step = re.fullmatch(r"step-(\d+)", selector)
    candidates = [ref for ref in refs if (ref.step == int(step[1]) if step else ref.manifest.stage == selector)]
    history = run.history()
    if not candidates:
        for ref in history:
            if ref.is_pruned and ref.manifest.stage == selector:
                raise _incomplete(run, ref.uri)
        for prefix in places if step else ():
            place = parse_checkpoint_prefix(prefix)
            if step and place is not None and place.step == int(step[1]):
                raise _incomplete(run, f"{run.store.uri}/{prefix}")
        hint = did_you_mean(selector, ["latest", *(ref.manifest.stage for ref in refs)])
        raise CheckpointNotFoundError(
            f"Run {run.run_id!r} in {run.store.uri} has no checkpoint {selector!r}.{hint} It has:{_names(refs)}"
        )

    # Nothing off the run's line is chosen, not even if it is the only one.
    head, present = run.head(), without_pruned_ends(history)
    try:
        end = end_of_line(present, head, run_id=run.run_id)
        line = line_to(end, history) if end else ()
    except CheckpointAmbiguousError:
        if head:
            line = line_to(head, history)
        else:  # what all lines share before they part
            parents = {ref.manifest.parent.fingerprint for ref in present if ref.manifest.parent}
            lines = [line_to(ref, present) for ref in present if ref.fingerprint not in parents]
            line = [ref for ref in present if all(ref in line for line in lines)]
    on_line = [ref for ref in candidates if ref.prefix in {known.prefix for known in line}]
    if len(on_line) == 1:
        return on_line[0]
    raise CheckpointAmbiguousError(
        f"{run.run_id}@{selector} is not on the one line of run {run.run_id!r} that is known to be meant. "
        f"Name the checkpoint by its URI:{_names(candidates)}"
    )


def unknown_run(store: ObjectStore, run_id: str) -> CheckpointNotFoundError:
    """Return what to say of a run that a store does not hold, or holds without a checkpoint."""
    known = sorted({info.key.split("/")[1] for info in store.list("runs/") if info.key.count("/") > 1})
    if run_id in known:
        return CheckpointNotFoundError(
            f"Run {run_id!r} in {store.uri} has no checkpoint yet. `relora watch {run_id}` shows how far it is."
        )
    there = ", ".join(known[:_NAMED_RUNS]) + (f" and {len(known) - _NAMED_RUNS} more" if known[_NAMED_RUNS:] else "")
    hint = did_you_mean(run_id, known)
    return CheckpointNotFoundError(
        f"{store.uri} has no run {run_id!r}.{hint} Runs there: {there or 'none'}. Check the name and the store."
    )


def _at_directory(spec: str) -> CheckpointRef:
    directory = Path(spec).expanduser().absolute()
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"{directory} is no directory. Give a checkpoint's directory, URI or RUN@name.")
    return _at_uri(directory.as_uri())


def _at_uri(uri: str) -> CheckpointRef:
    store_uri, prefix = split_checkpoint_uri(uri)
    store = open_store(store_uri)
    ref = read_checkpoint(store, prefix)
    if ref is not None:
        return ref
    place = parse_checkpoint_prefix(prefix)
    has_files = any(True for _ in store.list(f"{prefix}/" if prefix else ""))
    if place is not None and has_files:
        raise _incomplete(CheckpointStore(store, place.run_id), uri)
    if place is not None:
        raise CheckpointNotFoundError(
            f"{uri} does not exist. Run {place.run_id!r} has:{_names(CheckpointStore(store, place.run_id).list())}"
        )
    raise (CheckpointIncompleteError if has_files else CheckpointNotFoundError)(
        f"{uri} holds no manifest.json, so it is no complete checkpoint. Give the URI of a checkpoint itself, "
        "as `relora show RUN` shows it."
    )


def _incomplete(run: CheckpointStore, uri: str) -> CheckpointError:
    if removal := removal_at(run.store, uri.removeprefix(f"{run.store.uri}/")):
        return CheckpointNotFoundError(removal)
    try:
        latest = run.latest()
    except CheckpointError as error:
        return CheckpointIncompleteError(f"{uri} has no manifest.json, so its upload never finished. {error}")
    if latest is None:
        advice = f"Run {run.run_id!r} has no complete checkpoint: start it again, or delete {uri}."
    else:
        advice = (
            f"Latest complete checkpoint of run {run.run_id!r} is step {latest.step} ({latest.uri}); "
            f"resume from that step, or delete {uri}."
        )
    return CheckpointIncompleteError(f"{uri} has no manifest.json, so its upload never finished. {advice}")


def _names(refs: Sequence[CheckpointRef]) -> str:
    return "".join(f"\n  {ref.manifest.stage}, step {ref.step}: {ref.uri}" for ref in refs) or " nothing"


@dataclass(frozen=True)
class RunInfo:
    """One run in a store."""

    run_id: str
    checkpoint_count: int
    latest_step: int
    profile: str | None
    """The latest checkpoint's; None when its manifest is damaged."""
    modified_at: datetime
    """The time of the newest commit, by the store's clock."""


def list_runs(store: ObjectStore) -> Sequence[RunInfo]:
    """Return every run with at least one committed checkpoint, by run id."""
    by_run: dict[str, list[tuple[CheckpointPlace, datetime]]] = {}
    for place, modified_at in _committed(store):
        by_run.setdefault(place.run_id, []).append((place, modified_at))
    runs = []
    for run_id, found in sorted(by_run.items()):
        latest = max((place for place, _ in found), key=lambda place: place.step)
        ref = _read_or_warn(store, latest.prefix)
        profile = ref.manifest.profile if ref else None
        runs.append(RunInfo(run_id, len(found), latest.step, profile, max(moment for _, moment in found)))
    return runs


def read_checkpoints(store: ObjectStore) -> list[CheckpointRef]:
    """Return every committed checkpoint of every run. A damaged manifest is left out with a warning."""
    refs = [_read_or_warn(store, place.prefix) for place, _ in _committed(store)]
    return [ref for ref in refs if ref is not None]


def read_heads(store: ObjectStore, refs: Iterable[CheckpointRef]) -> set[str]:
    """Return the URIs of the heads of the runs that `refs` belong to; a run whose head is lost has none."""
    heads = set()
    for run_id in {ref.manifest.run_id for ref in refs if ref.store_uri == store.uri}:
        try:
            head = CheckpointStore(store, run_id).head(missing_ok=True)
        except CheckpointError as error:
            _log.warning("%s", error)
            continue
        heads |= {head.uri} if head else set()
    return heads


def _committed(store: ObjectStore) -> Iterable[tuple[CheckpointPlace, datetime]]:
    for info in store.list("runs/"):
        prefix, _, name = info.key.rpartition("/")
        if name == MANIFEST_NAME and (place := parse_checkpoint_prefix(prefix)):
            yield place, info.modified_at


def _read_or_warn(store: ObjectStore, prefix: str) -> CheckpointRef | None:
    try:
        return read_checkpoint(store, prefix)
    except CheckpointError as error:
        _log.warning("%s", error)  # lists and trees are where an operator sees the damage, so they must still come
        return None
