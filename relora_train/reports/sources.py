"""The sources of a mixture as a run has read them: tokens, shares, how often each was read."""

import json

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.data.interleaving import epochs_by_source
from relora_train.errors import ReLoRAError
from relora_train.reports.run_data import SourceRow
from relora_train.runs.evaluations import dataset_of


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
