"""`relora delete`: remove a whole run."""

import sys
from typing import Annotated

import typer
from rich.text import Text

from relora_train.checkpoints.upkeep.deletion import delete_run, survey_run
from relora_train.cli.options import AsJson, RunName, Store, answer, open_named
from relora_train.cli.output import harmless
from relora_train.errors import ConfigError
from relora_train.text import counted, size


def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Remove a run with all its checkpoints, if nothing else depends on it; datasets stay."""
    opened = open_named(store)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"`relora delete {run}` cannot ask here. Say --yes to remove it without a question.")
        found = survey_run(opened, run)
        what = f"{counted(len(found.checkpoints), 'checkpoint')}, {size(found.size_bytes)}"
        if not found.dependents:
            typer.confirm(harmless(f"Remove run {run} from {opened.uri} ({what})?"), abort=True, err=True)
    done = delete_run(opened, run)
    record = {
        "run_id": run, "checkpoints": [ref.uri for ref in done.checkpoints], "removed_objects": done.object_count,
        "removed_bytes": done.size_bytes,
    }  # fmt: skip
    what = f"{counted(len(done.checkpoints), 'checkpoint')}, {size(done.size_bytes)}"
    answer(as_json, record, lambda: [Text(f"Run {run} is removed from {opened.uri}: {what}.")])
