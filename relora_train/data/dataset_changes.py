"""Say in words how two datasets differ: files that came, went or changed, another Python, other settings."""

import json
import platform
from collections.abc import Sequence
from typing import Any

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.data.source_files import SourceFile

_MOST_FILES = 2_000
"""A manifest keeps no names of a corpus with more files."""

_SHOWN = 5


def source_record(kind: str, files: Sequence[SourceFile]) -> dict[str, Any]:
    """Return the part of a source that a manifest keeps beside its identity: names and digests of files, the Python."""
    if kind == "python-stdlib":
        return {"python": platform.python_version()}
    few = 0 < len(files) <= _MOST_FILES and kind != "packages"  # whose versions name their files
    return {"source_files": {file.name: file.sha256 for file in files}} if few else {}


def dataset_changes(theirs: DatasetManifest, ours: DatasetManifest) -> list[str]:
    """Return lines 'what: theirs -> ours' for what makes two datasets differ."""
    before, after = dict(theirs.inputs), dict(ours.inputs)
    of_one = "source" in before and "source" in after  # a mixture has a key for each source
    changed = of_one and before.pop("source") != after.pop("source")
    lines = [_source_change(theirs, ours)] if changed else []
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return lines + [f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}" for key in keys]


def _source_change(theirs: DatasetManifest, ours: DatasetManifest) -> str:
    before, after = theirs.inputs["source"], ours.inputs["source"]
    if before.get("format") == after.get("format") == "python-stdlib":
        versions = [manifest.statistics.get("python", "unknown version") for manifest in (theirs, ours)]
        return f"the standard library: Python {versions[0]} -> {versions[1]}"
    if "content_sha256" not in before or "content_sha256" not in after:  # of a hub, or a series' selection
        return f"data: {_shown(before)} -> {_shown(after)}"
    old_files, files = (manifest.statistics.get("source_files") for manifest in (theirs, ours))
    setting = "data.packages" if after["format"] == "packages" else "data.paths"
    counts = f"{setting}: {before['files']} files -> {after['files']}"
    if not old_files or not files:
        return f"{counts} ({before['size_bytes']:,} bytes -> {after['size_bytes']:,})"
    # Compared by content where a name is new: a corpus may have been moved.
    changed = [name for name in files if name in old_files and files[name] != old_files[name]]
    new = [name for name in files if name not in old_files and files[name] not in old_files.values()]
    gone = [name for name in old_files if name not in files and old_files[name] not in files.values()]
    parts = [
        f"{what}: {', '.join(name.rpartition('/')[2] for name in names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("new", new), ("gone", gone), ("changed", changed))
        if names
    ]
    return f"{counts} ({'; '.join(parts) or 'in another order, or one of them in two copies'})"


def _shown(value: Any) -> str:
    """Values short enough to read; of a digest the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "absent" if value is None else json.dumps(value)
