"""The model card of an export: README.md with the hub's metadata, made from manifests and recorded settings.

It names no store and no path of a machine: a reader has no use for them, and they may be private.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import yaml

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import ReLoRAError
from relora_train.runs.evaluations import dataset_of, profile_of
from relora_train.runs.run import line_of
from relora_train.settings.objectives import measures_in
from relora_train.settings.profile import Profile
from relora_train.storage.base import find_bytes, find_json
from relora_train.storage.opening import open_store
from relora_train.storage.redaction import masked, without_secrets
from relora_train.text import count, decimal, markdown_cell, markdown_table

CARD_NAME = "README.md"
SIGNATURE = "Written by `relora export` of ReLoRA Train."
"""Ends every card, so that a README by someone else is told apart and stays."""
SPECTRA = "spectra.png"

T = TypeVar("T")


def is_by_others(path: Path) -> bool:
    """Return True for a README that `relora export` did not write."""
    return path.name == CARD_NAME and path.is_file() and SIGNATURE.encode() not in path.read_bytes()


def write_card(checkpoint: CheckpointRef, directory: Path, *, license_id: str | None = None) -> None:
    """Write the card, and beside it the spectra of the run's report if that ends in this checkpoint."""
    store, run_id = open_store(checkpoint.store_uri), checkpoint.manifest.run_id
    spectra = None
    summary = _known(lambda: find_json(store, f"runs/{run_id}/report/summary.json")) or {}
    if [stage.get("fingerprint") for stage in summary.get("stages", ())][-1:] == [checkpoint.fingerprint]:
        spectra = _known(lambda: find_bytes(store, f"runs/{run_id}/report/{SPECTRA}"))
    if spectra:
        (directory / SPECTRA).write_bytes(spectra[0])
    card = model_card(line_of(checkpoint), license_id=license_id, with_spectra=spectra is not None)
    (directory / CARD_NAME).write_text(card, encoding="utf-8")


def model_card(line: Sequence[CheckpointRef], *, license_id: str | None, with_spectra: bool) -> str:
    """Return the card of a line's last checkpoint."""
    manifest, name = line[-1].manifest, markdown_cell(f"{line[-1].manifest.run_id}@{line[-1].manifest.stage}")
    profile, first = _known(lambda: profile_of(line[-1])), _known(lambda: profile_of(line[0]))
    measures = measures_in(manifest.evaluation)
    base, shown_base = _base_model(first)
    header = {
        "library_name": "transformers",
        "pipeline_tag": measures.pipeline_tag,
        **({"base_model": base} if base else {}),
        "tags": ["relora"],
        **({"license": license_id} if license_id else {"license": "other", "license_name": "not-chosen-yet"}),
    }
    unlicensed = "**Not chosen yet.** Replace `license` and `license_name` in the header of this file."
    scores = (measures.headline, measures.second)
    columns = (
        "Stage",
        "Step",
        measures.budget.capitalize(),
        *(measure.name.capitalize() for measure in scores),
        "Update's rank",
        "Id",
    )
    rows = [
        (
            f"{ref.manifest.run_id}@{ref.manifest.stage}",
            count(ref.step),
            count(ref.manifest.tokens_seen),
            *(measure.change(ref.manifest.evaluation) for measure in scores),
            decimal(ref.manifest.merge_report.get("effective_rank"), 1),
            ref.fingerprint[:12],
        )
        for ref in line
    ]
    parent = line[0].manifest.parent
    began = f"The first of these began from {'an earlier checkpoint' if parent else shown_base}."
    figure = f"![Singular values of the whole update]({SPECTRA})"
    versions = ", ".join(f"{package} {number}" for package, number in sorted(manifest.versions.items()))
    text = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        "A model trained with ReLoRA ([arXiv 2307.05695]"
        "(https://arxiv.org/abs/2307.05695)): a sequence of low-rank updates, each merged into the weights.",
        f"Step {count(manifest.step)}, {count(manifest.tokens_seen)} {measures.budget} seen, "
        f"{count(manifest.cycle)} merged updates. Fingerprint: `{manifest.fingerprint}`.",
        "## Lineage and scores",
        f"Scores on held-out {measures.held_out}, before → after each stage; the rank of a merged update is its "
        f"effective rank, mean over layers. {began}",
        "\n".join(markdown_table(columns, rows)),
        *([figure] if with_spectra else []),
        "## Data",
        "\n".join(f"- {line}" for line in _data_facts(line[-1], profile)),
        "## Made with",
        f"{versions or 'Versions were not recorded'}.",
        "## License",
        f"{f'`{license_id}`.' if license_id else unlicensed} Those of the data and of a base model may bind the "
        "weights too.",
        SIGNATURE,
    ]
    return masked("\n\n".join(text)) + "\n"


def _base_model(profile: Profile | None) -> tuple[str | None, str]:
    """Return the hub id that a line began from, if it was one, and what to call its beginning."""
    pretrained = profile.model.pretrained if profile else None
    if profile is None or pretrained is None:
        return None, "random weights" if profile else "settings that cannot be read"
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1 or Path(pretrained).exists():
        return None, "a local model"
    revision = f" at revision {profile.model.revision}" if profile.model.revision else ""
    return pretrained, markdown_cell(pretrained + revision)


def _data_facts(checkpoint: CheckpointRef, profile: Profile | None) -> list[str]:
    facts = []
    if profile is not None:
        weights = [f" of weight {source.weight:g}" for source in profile.data.sources] or [""]
        for data, weight in zip(profile.data.parts(), weights, strict=True):
            hub = [data.hub_id, data.hub_config, data.hub_split, data.hub_revision] if data.source == "hub" else []
            names = [PurePosixPath(without_secrets(path)).name for path in data.paths]
            described = ", ".join(filter(None, [*hub, *data.packages, *names]))
            facts.append(f"Source{weight}: {data.source}{': ' if described else ''}{markdown_cell(described)}")
    facts.append(f"Dataset id: `{checkpoint.manifest.dataset_id}`")
    if dataset := _known(lambda: dataset_of(checkpoint).manifest):
        noun = "image" if dataset.images else "document"
        parts = [("Training", dataset.train_documents, dataset.train_tokens)]
        parts.append(("Held out", dataset.val_documents, dataset.val_tokens))
        for part, number, tokens in parts:
            tokens_text = "" if dataset.images else f" of {count(tokens)} tokens"
            facts.append(f"{part}: {count(number)} {noun}{'' if number == 1 else 's'}{tokens_text}")
    return facts


def _known(read: Callable[[], T]) -> T | None:
    """Return what is read, or None: a card leaves out what is gone, or was written by another version."""
    with suppress(ReLoRAError, ValueError):
        return read()
    return None
