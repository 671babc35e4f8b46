"""The report of an experiment in its store: HTML, figures and numbers below experiments/<name>/<digest>/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relora_train.checkpoints.layout import experiment_prefix
from relora_train.storage.base import ObjectStore


def store_report(
    store: ObjectStore, experiment: str, digest: str, *, html: str, json: str, pictures: Mapping[str, bytes]
) -> dict[str, Any]:
    """Write the report in the place of an earlier one, and return the URIs under their names in a summary."""
    prefix = f"{experiment_prefix(experiment)}{digest}"
    for name, content in {**pictures, "comparison.json": json.encode(), "report.html": html.encode()}.items():
        store.put_bytes(f"{prefix}/{name}", content)
    return {
        "html_uri": f"{store.uri}/{prefix}/report.html",
        "json_uri": f"{store.uri}/{prefix}/comparison.json",
        "picture_uris": tuple(f"{store.uri}/{prefix}/{name}" for name in pictures),
    }
