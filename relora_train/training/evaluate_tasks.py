"""The process that scores a committed checkpoint by tasks of lm-evaluation-harness, and how its results are read."""

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import chdir
from typing import Any, cast

from relora_train.distributed import process_group
from relora_train.errors import ConfigError, SourceUnreadableError
from relora_train.process import Emit, serve_request
from relora_train.settings.keys import settings_digest
from relora_train.settings.tasks import TaskSelection
from relora_train.training.evaluate import hold_as_computed
from relora_train.training.models.registry import objective_of
from relora_train.training.requests import TasksRequest
from relora_train.training.torch_settings import configure_torch


def evaluate_tasks(request: TasksRequest, emit: Emit) -> None:
    """Score a checkpoint by each task, in float32 or under the profile's autocast; the tasks are loaded first."""
    with chdir(request.selection.include or "."):  # the paths in its files begin there
        loaded = load_tasks(request.selection)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    profile = request.profile
    configure_torch(profile)
    with process_group(profile.launch.device) as ranks:
        model = objective_of(profile).load_model(request.checkpoint_directory)
        hold_as_computed(model, profile.precision)
        model.to(ranks.device)
        tokenizer = AutoTokenizer.from_pretrained(request.checkpoint_directory)
        end = cast(Any, model).config.eos_token_id
        if tokenizer.eos_token is None and isinstance(end, int):  # a tokenizer.json does not say which one it is
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=profile.evaluation.batch_sequences,
            # It enters a context of its own, which without this turns an autocast around it off.
            mixed_precision_dtype="bfloat16" if profile.precision.computes_in_bfloat16 else None,
        )
        scores = {}
        for name, known in loaded.items():
            results = simple_evaluate(
                harness, tasks=[name], limit=request.selection.limit, log_samples=False, task_manager=known
            )
            scores[name] = scores_in(results)
            emit("scored", task=name, scores={score["score"]: score["value"] for score in scores[name]})
    request.result_path.write_text(json.dumps(scores))


class _Loaded:
    """A task with its documents, in the place of the manager that would load them once more."""

    def __init__(self, found: Any, manager: Any) -> None:
        self._found, self._manager = found, manager

    def load(self, names: Sequence[str]) -> Any:
        return self._found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def load_tasks(selection: TaskSelection) -> dict[str, Any]:
    """Return each task by name, ready for the harness, its documents read.

    Raise ConfigError for a name that there is not, SourceUnreadableError for a task that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=selection.include, include_defaults=False)
    if not {*selection.tasks} <= {*manager.all_tasks} or manager.all_groups:  # reading all of them takes seconds
        manager = TaskManager(include_path=selection.include)
    if unknown := [name for name in selection.tasks if name not in manager.all_tasks]:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        where = (
            f", nor in {selection.include}" if selection.include else "; a directory of your own goes with --include"
        )
        raise ConfigError(f"lm-evaluation-harness has no task {unknown[0]!r}{where}.{hint}")
    loaded = {}
    for name in selection.tasks:
        try:
            loaded[name] = _Loaded(manager.load([name]), manager)
        except Exception as error:  # whatever its YAML, its code, its data or the network raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SourceUnreadableError(
                f"Task {name!r} could not be loaded: {reason} ({type(error).__name__}). If its data are on the hub, "
                "this machine must reach it or have them in its cache. A task without network has a YAML file with "
                "dataset_path: json and local data_files, in the directory of --include."
            ) from None
    return loaded


def scores_in(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores of a task, or of a group and all of its tasks, as the harness gives them."""
    found = []
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        for key, value in numbers.items():
            metric, _, choice = key.partition(",")
            if not choice or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{choice}")
            config = results["configs"].get(task, {})
            found.append(
                {
                    "score": f"{task}/{metric}" + (f",{choice}" if choice != "none" else ""),
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                    "shots": results["n-shot"].get(task),
                    "documents": results["n-samples"].get(task, {}).get("effective"),
                    "version": results["versions"].get(task),
                    "config_digest": settings_digest(json.loads(json.dumps(config, default=str))),
                }
            )
    return found


if __name__ == "__main__":
    serve_request(TasksRequest, evaluate_tasks)
