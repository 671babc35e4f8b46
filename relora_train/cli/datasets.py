"""`relora datasets`: the datasets of a store and what depends on each; removes one that nothing depends on."""

from typing import Annotated

import typer
from rich.text import Text

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.checkpoints.upkeep.datasets import StoredDataset, delete_dataset, list_datasets
from relora_train.cli.options import AsJson, Store, answer, open_named
from relora_train.cli.output import View, table
from relora_train.text import MISSING, count, moment, size


def datasets(
    delete: Annotated[
        str | None,
        typer.Option(metavar="NAME/ID", help="Remove this one, by NAME/ID or its ID, if nothing depends on it."),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the datasets of a store: size, sources, and the runs, series and mixtures that depend on each."""
    opened = open_named(store)
    if delete is not None:
        gone = delete_dataset(opened, delete)
        said = f"Dataset {gone.name} is deleted: {size(gone.size_bytes)}."
        answer(as_json, {"deleted": f"{opened.uri}/{gone.prefix}", "size_bytes": gone.size_bytes}, lambda: [Text(said)])
        return
    found = list_datasets(opened)
    record = [
        {
            "name": each.name.partition("/")[0],
            "uri": f"{opened.uri}/{each.prefix}",
            "size_bytes": each.size_bytes,
            "modified_at": each.modified_at.isoformat(),
            "used_by": each.used_by,
            **(_facts(each.manifest) if each.manifest else {"unfinished": True}),
        }
        for each in found
    ]
    columns = ("dataset", "holds", "held out", "size", "made", "sources", "used by")
    made = table(columns, [_row(each) for each in found], left=("sources", "used by"))
    answer(as_json, record, lambda: [Text(f"In {opened.uri}"), made] if found else _none(opened.uri))


def _none(uri: str) -> View:
    return [Text(f"There is no dataset in {uri} yet.")]


def _facts(manifest: DatasetManifest) -> dict[str, object]:
    fields = {"dataset_id", "train_tokens", "val_tokens", "vocab_size", "mixture"}
    return {**manifest.model_dump(mode="json", include=fields), "unit": manifest.unit}


def _row(each: StoredDataset) -> tuple[str, ...]:
    rest = (size(each.size_bytes), moment(each.modified_at))
    if each.manifest is None:
        return (each.name, "unfinished", MISSING, *rest, MISSING, "; ".join(each.used_by) or "nothing")
    unit = each.manifest.unit
    sources = [f"{part.name} ({part.weight})" for part in each.manifest.mixture]
    return (
        each.name,
        f"{count(each.manifest.train_tokens)} {unit}",
        count(each.manifest.val_tokens),
        *rest,
        ", ".join(sources) or str(each.manifest.inputs.get("source", {}).get("format", MISSING)),
        "; ".join(each.used_by) or "nothing",
    )
