"""Of a growing source: every new document, old ones by their share, and no held-out document ever in training."""

import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from made_up_corpus import made_up_text

from relora_train.data.prepare import describe_dataset, prepare_dataset
from relora_train.data.selection import SelectedSource, Selection, contents_of, resolve_inputs, select_source
from relora_train.data.sources import resolve_source
from relora_train.data.splitting import split_digest, split_of
from relora_train.errors import SourceUnreadableError
from relora_train.settings.data import DataConfig, TokenizerConfig

FRACTION = 0.2


def write_night(directory: Path, night: int, documents: int) -> list[str]:
    texts = [f"{night} {number} {made_up_text(number)}" for number in range(documents)]
    path = directory / f"night-{night}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    return DataConfig(source="jsonl", paths=(str(tmp_path),), validation_fraction=FRACTION, workers=1)


def digest_of(path: Path) -> str:
    return resolve_source(DataConfig(source="jsonl", paths=(str(path),))).files[0].sha256


def select(source: DataConfig, new: Path, old: Path, ratio: float, seed: int = 0) -> tuple[list[str], Selection]:
    selection = Selection(new=(digest_of(new),), old=(digest_of(old),), old_ratio=ratio, seed=seed)
    return list(resolve_inputs(source, TokenizerConfig(), selection).source.read(source.validation_fraction)), selection


def sides(texts: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "val": []}
    for text in texts:
        found[split_of(split_digest(text), FRACTION)].append(text)
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_old_documents_make_up_their_share_and_half_of_the_held_out_part(
    source: DataConfig, tmp_path: Path, ratio: float
):
    old, new = write_night(tmp_path, 0, 4000), write_night(tmp_path, 1, 1000)
    texts, _ = select(source, tmp_path / "night-1.jsonl", tmp_path / "night-0.jsonl", ratio)
    assert texts[: len(new)] == new  # all of them, first
    chosen, ours = sides(texts[len(new) :]), sides(new)
    assert set(texts[len(new) :]) <= set(old) and len(set(texts)) == len(texts)
    # 5 standard deviations of a binomial count; sizes vary by document, hence the factor 2.
    expected = len(ours["train"]) * ratio / (1 - ratio)
    assert abs(len(chosen["train"]) - expected) <= 10 * math.sqrt(expected)
    assert abs(len(chosen["val"]) - len(ours["val"])) <= 10 * math.sqrt(len(ours["val"]))


def test_what_is_chosen_follows_from_content_and_seed_alone_and_differs_every_night(source: DataConfig, tmp_path: Path):
    for night in range(3):
        write_night(tmp_path, night, 1000 if night == 0 else 100)
    old, first, second = (tmp_path / f"night-{night}.jsonl" for night in range(3))
    texts, _ = select(source, first, old, 0.5)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for number, path in enumerate((first, old)):
        (moved / f"{number}.jsonl").write_bytes(path.read_bytes())
    again, _ = select(source.model_copy(update={"paths": (str(moved),)}), first, old, 0.5)
    assert again == texts
    nights = [(first, old, 0.5, 0), (second, old, 0.5, 0), (first, old, 0.5, 1)]
    tonight, tomorrow, reseeded = ({t for t in select(source, *night)[0] if t.startswith("0 ")} for night in nights)
    assert len({frozenset(tonight), frozenset(tomorrow), frozenset(reseeded)}) == 3


def test_the_mix_is_part_of_the_datasets_identity(source: DataConfig, tmp_path: Path):
    write_night(tmp_path, 0, 50)
    write_night(tmp_path, 1, 50)
    new, old = tmp_path / "night-1.jsonl", tmp_path / "night-0.jsonl"

    def identity(ratio: float, seed: int = 0, **parts: Path) -> str:
        given = {"new": new, "old": old, **parts}
        selection = Selection(
            new=(digest_of(given["new"]),), old=(digest_of(given["old"]),), old_ratio=ratio, seed=seed
        )
        return describe_dataset(source, TokenizerConfig(), selection=selection)[0]

    ids = [identity(0.0), identity(0.5), identity(0.5, seed=1), identity(0.5, new=old, old=new)]
    assert len(set(ids)) == 4 and identity(0.5) == ids[1]
    whole = Selection(new=contents_of(resolve_source(source)))
    plain = describe_dataset(source, TokenizerConfig())
    assert describe_dataset(source, TokenizerConfig(), selection=whole) == plain  # shared with an ordinary run


def test_a_prepared_mix_holds_what_was_selected(source: DataConfig, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_night(corpus, 0, 200)
    write_night(corpus, 1, 100)
    source = source.model_copy(update={"paths": (str(corpus),)})
    texts, selection = select(source, corpus / "night-1.jsonl", corpus / "night-0.jsonl", 0.5)
    settings = TokenizerConfig(vocab_size=300)
    made = prepare_dataset(source, settings, tmp_path / "work", selection=selection).manifest
    expected = sides(texts)
    assert (made.train_documents, made.val_documents) == (len(expected["train"]), len(expected["val"]))
    assert made.dataset_id == describe_dataset(source, settings, selection=selection)[0]
    assert made.train_documents < prepare_dataset(source, settings, tmp_path / "work").manifest.train_documents


def test_new_data_that_is_gone_is_named(source: DataConfig, tmp_path: Path):
    write_night(tmp_path, 0, 5)
    with pytest.raises(SourceUnreadableError, match="1 of 1 new files"):
        select_source(resolve_source(source), Selection(new=("0" * 64,)))


def test_of_a_hub_dataset_new_documents_are_those_that_the_old_revision_lacks(tmp_path: Path):
    # Two repositories on disk stand for two revisions of one on the hub: the same loader, without the network.
    old_texts, new_texts = ([f"{name} {i}" for i in range(count)] for name, count in (("old", 400), ("new", 100)))
    sources = []
    for name, texts in (("before", old_texts), ("after", [*old_texts[100:], *new_texts])):
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name / "train-00000.parquet")
        data = DataConfig(source="hub", hub_id=str(tmp_path / name), hub_revision="0123456789" * 4)
        sources.append(resolve_source(data))
    before, after = sources
    chosen = list(SelectedSource(after, before, Selection(new=("b",), old=("a",), old_ratio=0.5)).read(FRACTION))
    assert chosen[:100] == new_texts
    assert 0 < len(chosen) - 100 < 200 and set(chosen[100:]) <= set(old_texts)
    assert list(SelectedSource(before, before, Selection(new=("b",), old=("a",), old_ratio=0.5)).read(FRACTION)) == []
