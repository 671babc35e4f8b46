"""Find the one checkpoint that a person names. Ambiguous, incomplete and absent ones are errors, never guesses.

RUN, RUN@latest               the end of the run's line
RUN@cycle-2, RUN@warm-start   that stage on the run's line (full-2, lora: likewise)
RUN@step-400                  that step on the run's line
series:NAME, series:NAME@3    the champion of the series; the one that its change 3 made
s3://.., file:///.., /path  a checkpoint's own URI or directory, in any store
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from relora_train.checkpoints.all_runs import list_runs
from relora_train.checkpoints.layout import (
    RUN_ID_PATTERN,
    checkpoints_prefix,
    parse_checkpoint_prefix,
    split_checkpoint_uri,
)
from relora_train.checkpoints.lineage import CheckpointRef, end_of_line, line_to, read_checkpoint, without_pruned_ends
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import resolve_series
from relora_train.checkpoints.series_record import SERIES_PATTERN
from relora_train.checkpoints.tombstone import removal_at
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

_SERIES = "series:"
_NAME = re.compile(rf"(?P<run_id>{RUN_ID_PATTERN})(@(?P<selector>[A-Za-z0-9-]+))?")


def resolve_checkpoint(spec: str, default_store: ObjectStore) -> CheckpointRef:
    """Return the one committed checkpoint that `spec` names; `default_store` holds the runs and series."""
    if "://" in refuse_secrets(spec):
        return _at_uri(spec)
    if spec.startswith(_SERIES):
        return _of_series(spec, default_store)
    if "/" in spec or spec in (".", ".."):
        return _at_directory(spec)
    match = _NAME.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"{spec!r} names no checkpoint: write RUN, RUN@latest, RUN@cycle-2, RUN@warm-start, RUN@step-400, "
            "series:NAME, or a checkpoint's URI or directory."
        )
    is_run = any(True for _ in default_store.list(checkpoints_prefix(match["run_id"])))
    if match["selector"] is None and Path(spec).is_dir():
        if is_run:
            raise CheckpointAmbiguousError(f"{spec!r} is a run and a directory: write {spec}@latest or ./{spec}.")
        return _at_directory(spec)
    return _of_run(CheckpointStore(default_store, match["run_id"]), match["selector"] or "latest")


def _of_series(spec: str, store: ObjectStore) -> CheckpointRef:
    match = re.fullmatch(rf"{_SERIES}(?P<name>{SERIES_PATTERN})(@(?P<number>\d+))?", spec)
    if match is None:
        raise ConfigError(f"{spec!r} names no promoted checkpoint: write series:NAME, or series:NAME@3 for change 3.")
    return resolve_series(store, match["name"], int(match["number"]) if match["number"] else None)


def _of_run(run: CheckpointStore, selector: str) -> CheckpointRef:
    refs = run.list()
    if not refs:
        raise _absent_run(run)
    if selector == "latest":
        latest = run.latest()
        if latest is not None:
            return latest
    step = re.fullmatch(r"step-(\d+)", selector)
    candidates = [ref for ref in refs if (ref.step == int(step[1]) if step else ref.manifest.stage == selector)]
    if not candidates:
        for ref in run.history():
            if ref.is_pruned and ref.manifest.stage == selector:
                raise _incomplete(run, ref.uri)
        if step:
            _refuse_incomplete_step(run, int(step[1]))
        raise CheckpointNotFoundError(
            f"Run {run.run_id!r} in {run.store.uri} has no checkpoint {selector!r}. It has:{_names(refs)}"
        )
    return _on_the_line(run, candidates, selector)


def _on_the_line(run: CheckpointStore, candidates: Sequence[CheckpointRef], selector: str) -> CheckpointRef:
    """Return the candidate on the run's line. Nothing off the line is chosen, not even if it is the only one."""
    head, history = run.head(), run.history()
    try:
        end = end_of_line(without_pruned_ends(history), head, run_id=run.run_id)
        line = line_to(end, history) if end else ()
    except CheckpointAmbiguousError:
        line = line_to(head, history) if head else _common_beginning(without_pruned_ends(history))
    places = {ref.prefix for ref in line}
    on_line = [ref for ref in candidates if ref.prefix in places]
    if len(on_line) == 1:
        return on_line[0]
    raise CheckpointAmbiguousError(
        f"{run.run_id}@{selector} is not on the one line of run {run.run_id!r} that is known to be meant. "
        f"Name the checkpoint by its URI:{_names(candidates)}"
    )


def _common_beginning(refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Return what all lines of a run share before they part."""
    parents = {ref.manifest.parent.fingerprint for ref in refs if ref.manifest.parent}
    lines = [line_to(ref, refs) for ref in refs if ref.fingerprint not in parents]
    return [ref for ref in refs if all(ref in line for line in lines)]


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
        "as `relora checkpoints RUN` shows it."
    )


def _refuse_incomplete_step(run: CheckpointStore, step: int) -> None:
    for info in run.store.list(checkpoints_prefix(run.run_id)):
        place = parse_checkpoint_prefix("/".join(info.key.split("/")[:4]))
        if place is not None and place.step == step:
            raise _incomplete(run, f"{run.store.uri}/{place.prefix}")


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


def _absent_run(run: CheckpointStore) -> CheckpointError:
    for info in run.store.list(checkpoints_prefix(run.run_id)):
        return _incomplete(run, f"{run.store.uri}/{'/'.join(info.key.split('/')[:4])}")
    known = ", ".join(found.run_id for found in list_runs(run.store)) or "none"
    return CheckpointNotFoundError(
        f"{run.store.uri} has no run {run.run_id!r}. Runs there: {known}. Check the name and the store."
    )


def _names(refs: Sequence[CheckpointRef]) -> str:
    return "".join(f"\n  {ref.manifest.stage}, step {ref.step}: {ref.uri}" for ref in refs) or " nothing"
