"""Scores of committed checkpoints by tasks of lm-evaluation-harness, kept beside their evaluations.

The harness runs in a process of its own and is never imported here. A record of a task is reused as long as the
directory of --include, the limit and the harness's version are the same; data outside that directory are not watched.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relora_train.checkpoints.layout import check_run_id, checkpoint_name
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import hash_file
from relora_train.errors import AccessDeniedError, ConfigError
from relora_train.runs.evaluations import EvaluationOutcome, profile_of
from relora_train.runs.run import OnEvent, fetch_parent
from relora_train.runs.workers import run_worker
from relora_train.settings.keys import settings_digest
from relora_train.settings.objectives import OBJECTIVES
from relora_train.settings.profile import Profile, unset_later_keys
from relora_train.settings.tasks import TaskMeasure, TaskSelection
from relora_train.storage.base import ObjectStore, find_json, put_json
from relora_train.storage.opening import open_store
from relora_train.storage.workspace import WorkDirectory, short_digest
from relora_train.training.requests import TasksRequest

_log = logging.getLogger("relora_train.runs.task_scores")


def check_tasks(selection: TaskSelection) -> TaskSelection:
    """Return the tasks with an absolute directory. Raise ConfigError without the harness or without the directory."""
    _harness_version()
    if selection.include is None:
        return selection
    directory = Path(selection.include).expanduser().absolute()
    if not directory.is_dir():
        raise ConfigError(f"{directory}, where tasks are to be included from, is no directory. Correct the path.")
    return selection.model_copy(update={"include": str(directory)})


def score_by_tasks(checkpoint: CheckpointRef, selection: TaskSelection, *, on_event: OnEvent) -> EvaluationOutcome:
    """Score a checkpoint by tasks; `task_scores` of the record has an entry for each. Recorded ones are reused."""
    selection, profile, store = check_tasks(selection), profile_of(checkpoint), open_store(checkpoint.store_uri)
    if not OBJECTIVES[profile.objective].has_tasks:
        raise ConfigError(
            f"{checkpoint.uri} is a model of objective {profile.objective!r}, and the tasks of lm-evaluation-harness "
            "are for language models. Leave --tasks out: its own evaluation scores it."
        )
    keys = _keys(checkpoint, profile, selection)
    with WorkDirectory(
        checkpoint.manifest.run_id, f"tasks-{short_digest(f'{store.uri}/{sorted(keys.values())}')}"
    ) as work:
        found = {name: record for name, key in keys.items() if (record := _sound(find_json(store, key)))}
        missing = tuple(name for name in keys if name not in found)
        if missing:
            request = TasksRequest(
                profile=profile,
                checkpoint_directory=fetch_parent(checkpoint),
                selection=selection.model_copy(update={"tasks": missing}),
                result_path=work.path / "result.json",
            )
            module = "relora_train.training.evaluate_tasks"
            run_worker(module, request, work.path / "request.json", on_event=on_event)
            for name, scores in json.loads(request.result_path.read_text()).items():
                found[name] = _record(checkpoint, name, selection.limit, scores)
                try:
                    put_json(store, keys[name], found[name])
                except AccessDeniedError as error:  # a store that can only be read still has its checkpoints scored
                    _log.warning("These scores are not recorded, so the next time makes them again: %s", error)
    about = {"checkpoint_uri": checkpoint.uri, "stage": checkpoint.manifest.stage, "step": checkpoint.step}
    return EvaluationOutcome({**about, "task_scores": [found[name] for name in keys]}, reused=not missing)


def measured(checkpoint: CheckpointRef, measure: TaskMeasure, *, on_event: OnEvent) -> float:
    """Return a checkpoint's score, made now unless it is recorded. ConfigError for a metric that the task lacks."""
    outcome = score_by_tasks(checkpoint, measure.selection, on_event=on_event)
    return _value(outcome.record["task_scores"][0], measure)


def recorded_measure(checkpoint: CheckpointRef, measure: TaskMeasure) -> float | None:
    """Return what `measured` would reuse, or None if it would score."""
    selection = check_tasks(measure.selection)
    (key,) = _keys(checkpoint, profile_of(checkpoint), selection).values()
    record = _sound(find_json(open_store(checkpoint.store_uri), key))
    return None if record is None else _value(record, measure)


def recorded_task_scores(store: ObjectStore, line: Sequence[CheckpointRef]) -> list[dict[str, Any]]:
    """Return the scores of a line's checkpoints in its order, the newest of each task and limit."""
    newest: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for run_id in dict.fromkeys(ref.manifest.run_id for ref in line):
        listed = [info for info in store.list(f"runs/{run_id}/evaluations/") if "-task-" in info.key]
        for info in sorted(listed, key=lambda info: info.modified_at):
            if record := _sound(find_json(store, info.key)):
                newest[record["fingerprint"], record["task"], record["limit"]] = record
    scores = []
    for ref in line:
        for (fingerprint, *_), record in sorted(newest.items(), key=lambda item: str(item[0])):
            if fingerprint == ref.fingerprint:
                about = {name: record[name] for name in ("stage", "step", "limit", "harness")}
                scores += [about | score for score in record["scores"]]
    return scores


def _sound(record: Any) -> dict[str, Any] | None:
    """Return a record that can be shown, or None for one that is damaged: that is none."""
    try:
        named = {name: record[name] for name in ("run_id", "stage", "fingerprint", "task", "harness")}
        known = {name: None if record[name] is None else int(record[name]) for name in ("step", "limit")}
        scores = []
        for score in record["scores"]:
            numbers = [score["value"], *(score[name] or 0 for name in ("stderr", "shots", "documents"))]
            direction, _ = score["higher_is_better"], score["version"]
            if direction not in (True, False, None) or not all(isinstance(number, int | float) for number in numbers):
                return None
            scores.append({**score, "score": str(score["score"])})
        return {**{name: str(value) for name, value in named.items()}, **known, "scores": scores}
    except (ValueError, KeyError, TypeError):
        return None


def _record(checkpoint: CheckpointRef, task: str, limit: int | None, scores: object) -> dict[str, Any]:
    # Without `checkpoint_uri`: versions before this one take every record that has it for an evaluation.
    manifest = checkpoint.manifest
    about = {"run_id": manifest.run_id, "stage": manifest.stage, "step": checkpoint.step}
    return {
        **about, "fingerprint": checkpoint.fingerprint, "task": task, "limit": limit, "harness": _harness_version(),
        "scores": scores,
    }  # fmt: skip


def _value(record: Mapping[str, Any], measure: TaskMeasure) -> float:
    scores = {score["score"]: score for score in record["scores"]}
    if measure.score not in scores:
        raise ConfigError(f"There is no score {measure.score!r}. Its task gives {', '.join(scores) or 'none'}.")
    higher = scores[measure.score]["higher_is_better"]
    if higher is not None and higher != (measure.better == "higher"):
        raise ConfigError(
            f"A {measure.better} {measure.score} would be taken for better, and it is worse. Take another score; in an "
            "experiment, correct measure.better."
        )
    return float(scores[measure.score]["value"])


def _keys(checkpoint: CheckpointRef, profile: Profile, selection: TaskSelection) -> dict[str, str]:
    settings = {
        "include": _content(Path(selection.include)) if selection.include else None,
        "limit": selection.limit,
        "harness": _harness_version(),
        "precision": profile.precision.model_dump(mode="json", exclude=set(unset_later_keys(profile, "precision"))),
    }
    place = f"runs/{check_run_id(checkpoint.manifest.run_id)}/evaluations/"
    place += f"{checkpoint_name(checkpoint.step, checkpoint.fingerprint)}-task-"
    return {name: f"{place}{settings_digest(settings | {'task': name})[:8]}.json" for name in selection.tasks}


def _content(directory: Path) -> dict[str, str]:
    """Return the digest of each file that a task may be made of."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: hash_file(path) for name, path in files.items() if not re.search(r"(^|/)(\.|__pycache__/)", name)}


def _harness_version() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise ConfigError(
            "Tasks are scored by lm-evaluation-harness, which is not installed. Run "
            "`pip install 'relora-train[lm-eval]'` where models are scored."
        ) from None
