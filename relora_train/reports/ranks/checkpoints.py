"""The files of a checkpoint that an analysis reads, fetched by name; and where on a line an analysis starts.

A file is used only when its size and SHA-256 are its manifest's, and a digest covers a whole file: so whole files are
fetched, but only those with a tensor that is needed. The optimizer's state is never among them. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import CheckpointCorruptError
from relora_train.reports.ranks.adapters import ADAPTER_FILES, AdapterDirectory
from relora_train.reports.ranks.cycles import MergedCycle
from relora_train.reports.ranks.weights import INDEX_NAME, WEIGHTS_NAME

ChooseNames = Callable[[Sequence[str]], Sequence[str]]
"""Chooses from the names of weights."""

_WEIGHTS = re.compile(r"model(-[^/]+)?\.safetensors")


def fetch_weights(ref: CheckpointRef, fetch_files: FetchFiles, choose: ChooseNames) -> Path:
    """Return a directory with the index, if there is one, and the files that hold the chosen weights."""
    held = {entry.path for entry in ref.manifest.files}
    if INDEX_NAME not in held:
        return fetch_files(ref, [WEIGHTS_NAME])
    directory = fetch_files(ref, [INDEX_NAME])
    try:
        weight_map: dict[str, str] = json.loads((directory / INDEX_NAME).read_bytes())["weight_map"]
        files = sorted({weight_map[name] for name in choose(tuple(weight_map))})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(f"{ref.uri}/{INDEX_NAME} cannot be read: {error}. Use another one.") from None
    return fetch_files(ref, [INDEX_NAME, *files])


def weights_bytes(ref: CheckpointRef) -> int:
    """Return the bytes of all its weights."""
    return sum(entry.size_bytes for entry in ref.manifest.files if _WEIGHTS.fullmatch(entry.path))


def has_adapter(ref: CheckpointRef) -> bool:
    """Return True if the checkpoint keeps the update that it merged."""
    return set(ADAPTER_FILES) <= {entry.path for entry in ref.manifest.files}


def adapter_bytes(refs: Sequence[CheckpointRef]) -> int:
    """Return the bytes of all their adapters."""
    return sum(entry.size_bytes for ref in refs for entry in ref.manifest.files if entry.path in ADAPTER_FILES)


def fetch_cycles(refs: Sequence[CheckpointRef], fetch_files: FetchFiles) -> list[MergedCycle]:
    """Return the adapters of these checkpoints, each of which has one."""
    cycles = []
    for ref in refs:
        layers = ref.manifest.merge_report.get("layers", {})
        norms = {name: float(layer["weight_norm"]) for name, layer in layers.items() if "weight_norm" in layer}
        cycles.append(MergedCycle(ref.manifest.stage, AdapterDirectory(fetch_files(ref, ADAPTER_FILES)), norms))
    return cycles


def start_of_line(line: Sequence[CheckpointRef]) -> CheckpointRef | None:
    """Return where a run's total update begins: the last checkpoint before its first merge, else its first checkpoint.

    None stands for the initial weights, which are nowhere stored: where the first stage of all is a low-rank one that
    kept its adapter. All that a run without a warm start has changed in those layers is the sum of its adapters.
    """
    before = [ref for ref in line if ref.manifest.cycle == 0]
    merged = len(before) < len(line)
    if before:
        return before[-1] if merged else before[0]
    return None if line[0].manifest.parent is None and has_adapter(line[0]) else line[0]


def low_rank_stages(
    line: Sequence[CheckpointRef], start: CheckpointRef | None
) -> tuple[Sequence[CheckpointRef], str | None]:
    """Return the stages of a line after `start`, and why their adapters are not its whole update (None: they are)."""
    after = list(line)
    if start is not None:
        after = list(line[[ref.uri for ref in line].index(start.uri) + 1 :])
    before = start
    for ref in after:
        if not has_adapter(ref):
            return after, f"{ref.manifest.stage} is no low-rank stage, or keeps no adapter"
        parent = ref.manifest.parent
        if before is not None and parent is not None and parent.fingerprint != before.fingerprint:
            return after, f"the checkpoint that {ref.manifest.stage} started from was removed"
        before = ref
    return after, None
