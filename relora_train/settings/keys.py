"""Settings by their dotted keys: layers of them, their digest, how two sets differ, and which keys were removed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

REMOVED_KEYS: Mapping[str, Mapping[str, Any]] = {
    "relora": {"init": "kaiming", "rank_allocation": "uniform", "merge_dtype": "float32"},
    "optimizer": {"low_rank_lr_ratio": 1.0, "low_rank_b_lr_ratio": 1.0},
}
"""Keys that were measured and deleted, by section, with the defaults that they had."""

LAST_COMMIT_WITH_REMOVED_KEYS = "1a88187"


def settings_digest(settings: dict[str, Any]) -> str:
    """Return the SHA-256 in hex of settings as canonical JSON: the same for the same values in any order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return lines 'key: theirs -> ours' for every setting that differs, sorted by key."""
    lines = []
    for key in sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
        hint = removed(key)
        lines.append(f"{key}: {theirs.get(key, 'absent')} -> {ours.get(key, 'absent')}{f' ({hint})' if hint else ''}")
    return lines


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key or by section, as sections; a later one goes over those before, key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            first, dot, rest = str(key).partition(".")
            content = {rest: value} if dot else value
            if isinstance(content, Mapping):
                before = result.get(first)
                content = layered(before if isinstance(before, Mapping) else {}, content)
            result[first] = content
    return result


def removed(key: str) -> str:
    """Return what to do about a removed key, such as 'relora.init'; '' for any other."""
    section, _, name = key.partition(".")
    if name not in REMOVED_KEYS.get(section, {}):
        return ""
    return (
        "the key was removed, since it did not help (profiles/experiments/RESULTS.md). Leave it out, or train with "
        f"commit {LAST_COMMIT_WITH_REMOVED_KEYS}, the last that has it"
    )
