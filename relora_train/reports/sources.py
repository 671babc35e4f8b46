"""The data as a run has read it: a mixture's sources, by tokens, shares and times, and what was left out."""

import json
from contextlib import suppress

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.data.interleaving import epochs_by_source
from relora_train.data.left_out import left_out_note, too_long_note
from relora_train.errors import ReLoRAError
from relora_train.reports.run_data import SourceRow
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.run import parts_of


def left_out_of(checkpoint: CheckpointRef, fetch_files: FetchFiles) -> tuple[str, ...]:
    """Return sentences on the records that the checkpoint's dataset lacks, and on examples too long for a sequence."""
    notes = list[str]()
    with suppress(ReLoRAError):  # a report needs no dataset
        dataset = dataset_of(checkpoint)
        parts = {"": dataset, **parts_of(dataset)}
        notes += [
            f"Dataset {part.manifest.name}: {note}"
            for part in parts.values()
            if part and (note := left_out_note(part.manifest.statistics.get("left_out", ())))
        ]
    lines = (fetch_files(checkpoint, ["metrics.jsonl"]) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record.get("kind") == "data"]
    if records and (note := too_long_note(records[-1])):
        notes.append(note.capitalize())
    return tuple(f"{note}." for note in notes)


def sources_read(checkpoint: CheckpointRef, fetch_files: FetchFiles) -> tuple[SourceRow, ...]:
    """Return what training has read of each source of the checkpoint's dataset; none where that is no mixture or gone.

    Read from the position in the data alone, which a run that goes on with another dataset begins anew.
    """
    try:
        manifest = dataset_of(checkpoint).manifest
    except ReLoRAError:  # a report needs no dataset
        return ()
    if not manifest.mixture:
        return ()
    files = fetch_files(checkpoint, ["training_state.json", "profile.json"])
    examples = json.loads((files / "training_state.json").read_bytes())["samples_seen"]
    length = json.loads((files / "profile.json").read_bytes())["batch"]["sequence_length"]
    read = epochs_by_source(manifest, examples, length)
    total = max(1, examples * length)
    weights = {part.name: part.weight for part in manifest.mixture}
    return tuple(
        SourceRow(name, weights[name], tokens, tokens / total, epochs) for name, (tokens, epochs) in read.items()
    )
