"""The data of a run: its dataset, what training has read of it and left out, and each source of a mixture."""

import json
from contextlib import suppress
from typing import Any

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.interleaving import epochs_by_source
from relora_train.data.left_out import left_out_note, too_long_note
from relora_train.errors import ReLoRAError
from relora_train.reports.run_data import SourceRow
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.plan import source_shown
from relora_train.runs.run import parts_of
from relora_train.settings.profile import profile_to_read
from relora_train.text import count, decimal, size


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


def data_read(checkpoint: CheckpointRef, fetch_files: FetchFiles) -> dict[str, Any]:
    """Return the fields data_facts and sources of RunData; without the dataset, which may be gone, what is known.

    The position in the data alone tells how much was read. A run that goes on with another dataset begins it anew.
    """
    names = {entry.path for entry in checkpoint.manifest.files} & {"training_state.json", "profile.json"}
    files = fetch_files(checkpoint, sorted(names))
    facts: list[tuple[str, str]] = []
    settings: dict[str, Any] = {}
    if "profile.json" in names:
        settings = json.loads((files / "profile.json").read_bytes())
        try:
            facts.append(("Source", source_shown(profile_to_read((files / "profile.json").read_bytes()).data)))
        except (ReLoRAError, ValueError):  # settings of another version
            facts.append(("Source", str(settings.get("data", {}).get("source", ""))))
    facts.append(("Dataset", checkpoint.manifest.dataset_uri))
    try:
        manifest = dataset_of(checkpoint).manifest
    except (ReLoRAError, ValueError):
        return {"data_facts": (*facts, ("State", "The dataset is not there any more."))}
    facts += dataset_facts(manifest)
    if "training_state.json" not in names:
        return {"data_facts": tuple(facts)}
    examples = json.loads((files / "training_state.json").read_bytes())["samples_seen"]
    length = 1 if manifest.images else settings.get("batch", {}).get("sequence_length", 0)
    read = examples * length
    if manifest.examples:  # how many rows make an epoch depends on how they were packed
        facts.append(("Read by training", f"{count(examples)} sequences of examples"))
    elif read and manifest.train_tokens:
        epochs = read / manifest.train_tokens
        facts.append(("Read by training", f"{count(read)} {manifest.unit}, {decimal(epochs, 2)} epochs"))
    sources = epochs_by_source(manifest, examples, length) if manifest.mixture else {}
    weights = {part.name: part.weight for part in manifest.mixture}
    rows = (
        SourceRow(name, weights[name], tokens, tokens / max(1, read), epochs)
        for name, (tokens, epochs) in sources.items()
    )
    return {"data_facts": tuple(facts), "sources": tuple(rows)}


def content_shown(manifest: DatasetManifest) -> str:
    """Return what names a dataset's corpus anywhere: 'SHA-256 …' or 'revision …'; '' for mixtures and selections."""
    source = manifest.inputs.get("source", {})
    names = {"content_sha256": "SHA-256", "revision": "revision"}
    return next((f"{name} {source[key]}" for key, name in names.items() if key in source), "")


def dataset_facts(manifest: DatasetManifest) -> list[tuple[str, str]]:
    statistics = manifest.statistics
    noun = "image" if manifest.images else "document"
    facts = [("Content", content)] if (content := content_shown(manifest)) else []
    for part, documents, tokens, of_bytes in (
        ("Training part", manifest.train_documents, manifest.train_tokens, manifest.train_bytes),
        ("Held out", manifest.val_documents, manifest.val_tokens, manifest.val_bytes),
    ):
        text = "" if manifest.images else f", {count(tokens)} tokens"
        facts.append((part, f"{count(documents)} {noun}{'' if documents == 1 else 's'}, {size(of_bytes)}{text}"))
    if not manifest.images:
        per_token = (manifest.train_bytes + manifest.val_bytes) / max(1, manifest.train_tokens + manifest.val_tokens)
        facts.append(("Compression", f"{decimal(per_token, 2)} bytes a token, {count(manifest.vocab_size)} entries"))
    counts = {
        kind: statistics[f"{kind}_documents"] for kind in ("duplicate", "empty") if f"{kind}_documents" in statistics
    }
    dropped = [f"{count(number)} {kind} {noun}{'' if number == 1 else 's'}" for kind, number in counts.items()]
    if dropped:
        facts.append(("Dropped", ", ".join(dropped)))
    if "split_note" in statistics:
        facts.append(("Split", str(statistics["split_note"])))
    return facts
