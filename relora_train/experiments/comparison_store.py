"""Put the report of a comparison into its store: HTML, figures and numbers below experiments/<name>/<digest>/."""

from __future__ import annotations

from dataclasses import dataclass

from relora_train.checkpoints.layout import experiment_prefix
from relora_train.experiments.comparison_page import render_comparison
from relora_train.experiments.comparison_plots import draw_comparison
from relora_train.experiments.records import Comparison
from relora_train.storage.base import ObjectStore

HTML_NAME, JSON_NAME = "report.html", "comparison.json"


@dataclass(frozen=True)
class StoredComparison:
    """Where a comparison lies."""

    html_uri: str
    json_uri: str
    picture_uris: tuple[str, ...]


def store_comparison(data: Comparison, store: ObjectStore) -> StoredComparison:
    """Write the report; one of the same arms from before, with fewer seeds or more, is replaced."""
    prefix = f"{experiment_prefix(data.experiment)}{data.digest}"
    pictures = draw_comparison(data)
    html = render_comparison(data, pictures)
    files = {**pictures, JSON_NAME: (data.model_dump_json(indent=1) + "\n").encode(), HTML_NAME: html.encode()}
    for name, content in files.items():
        store.put_bytes(f"{prefix}/{name}", content)
    return StoredComparison(
        html_uri=f"{store.uri}/{prefix}/{HTML_NAME}",
        json_uri=f"{store.uri}/{prefix}/{JSON_NAME}",
        picture_uris=tuple(f"{store.uri}/{prefix}/{name}" for name in pictures),
    )
