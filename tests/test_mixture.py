"""Several weighted sources are one dataset: shares by tokens, positions without state, parts that mixtures share."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles import checkpoint_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_corpus import made_up_text
from pydantic import ValidationError
from safetensors.torch import load_file
from stage_runs import run_all, stage_request, tiny_profile
from test_snapshot import run_with_stops

from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.cli.run import check_inputs
from relora_train.data.interleaving import Interleaving, epochs_by_source
from relora_train.data.mixed_dataset import MixedTokens, open_tokens, source_seed
from relora_train.data.mixture import resolve_sources, train_on_mixture
from relora_train.data.splitting import split_digest, split_of
from relora_train.data.tokenizer import train_tokenizer
from relora_train.errors import ConfigError, CorpusEmptyError, CorpusTooSmallError, ObjectNotFoundError
from relora_train.method.stages import fingerprint_settings, plan_stages
from relora_train.reports import sources as report_sources
from relora_train.runs.datasets import DatasetOutcome, prepare_or_reuse
from relora_train.runs.plan import plan
from relora_train.runs.retraining.interface import RetrainOptions
from relora_train.runs.retraining.retrain import plan_retrain
from relora_train.runs.run import DatasetRef, Run, fetch_dataset, parts_of
from relora_train.settings.data import DataConfig
from relora_train.settings.profile import Profile, default_run_id

LENGTH = 32
WEIGHTS = st.lists(st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**15), batch=st.integers(1, 60))
def test_each_source_gives_its_share_to_within_one_example_a_source_at_any_position(weights, start, batch):
    order = Interleaving(weights)
    before, after = order.counts(start), order.counts(start + batch)
    assert sum(before) == start
    for weight, count in zip(weights, before, strict=True):
        assert abs(count - start * weight / sum(weights)) < len(weights)
    taken = [order.place(position) for position in range(start, start + batch)]
    for source, (first, end, most) in enumerate(zip(before, after, order.most(batch), strict=True)):
        assert [index for one, index in taken if one == source] == list(range(first, end)), "each in turn, none twice"
        assert end - first <= most


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources: 'much' has about twice the text of 'few'."""
    root = tmp_path_factory.mktemp("corpus")
    for name, documents, first in (("much", 60, 0), ("few", 30, 1000)):
        texts = ("".join(made_up_text(first + 3 * n + part) for part in range(3)) for n in range(documents))
        lines = (json.dumps({"meta": {"text": text}}) for text in texts)
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def mixed(folder: Path, *, much=0.25, few=0.75, tokenizer=None, **sections) -> Profile:
    source = {"source": "jsonl", "text_field": "meta.text"}
    data = {
        "name": "mixed",
        "workers": 1,
        "shard_tokens": 20_000,
        "validation_fraction": 0.2,
        "sources": [
            {"name": name, "weight": weight, "paths": [str(folder / f"{name}.jsonl")], **source}
            for name, weight in (("much", much), ("few", few))
        ],
    }
    return tiny_profile(data=data, tokenizer=tokenizer or {"vocab_size": 300}, **sections)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([made_up_text(seed) for seed in range(40)], vocab_size=300).save(directory)
    return {"path": str(directory)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("store"))


def prepare(profile: Profile, store: str) -> DatasetOutcome:
    return prepare_or_reuse(Run("run", store, profile), on_event=lambda event: None)


@pytest.fixture(scope="module")
def made(folder, store, tokenizer) -> DatasetRef:
    return prepare(mixed(folder, tokenizer=tokenizer), store).dataset


@pytest.fixture(scope="module")
def directory(made) -> Path:
    return fetch_dataset(made)


def opened(directory: Path, split="train", seed=3) -> MixedTokens:
    dataset = open_tokens(directory, split, sequence_length=LENGTH, seed=seed)
    assert isinstance(dataset, MixedTokens)
    return dataset


def rows_by_source(made: DatasetRef) -> list[set[bytes]]:
    parts = [fetch_dataset(part) for part in parts_of(made).values() if part]
    alone = [open_tokens(part, "train", sequence_length=LENGTH, seed=0) for part in parts]
    return [{row.tobytes() for row in one.read_blocks(0, one.blocks)} for one in alone]


def test_a_batch_holds_each_source_by_weight_and_each_source_has_its_own_epochs(made, directory):
    dataset, (much, few) = opened(directory), rows_by_source(made)
    assert dataset.blocks == len(much) + len(few)
    given_of_few = []
    for batch in range(100):
        rows = [row.tobytes() for row in dataset.read_batch(8 * batch, 8)]
        assert sum(row in much for row in rows) == 2 and sum(row in few for row in rows) == 6
        given_of_few += [row for row in rows if row in few]
    whole = len(given_of_few) // len(few)
    assert whole >= 1
    for epoch in range(whole):
        assert set(given_of_few[epoch * len(few) : (epoch + 1) * len(few)]) == few
    assert source_seed(3, "much") != source_seed(3, "few"), "two sources of one size are not read in step"


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 10**12), count=st.integers(4, 12), ranks=st.integers(1, 4))
def test_a_batch_follows_from_its_position_on_any_number_of_ranks(directory, position, count, ranks):
    dataset = opened(directory)
    whole = dataset.read_batch(position, count)
    parts = [opened(directory).read_batch(position, count, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert all(np.array_equal(whole[rank::ranks], part) for rank, part in enumerate(parts))
    assert len(np.unique(whole, axis=0)) == count, "nothing twice in one update"


def test_evaluation_reads_the_held_out_text_of_all_sources_once(directory):
    dataset = opened(directory, "val")
    rows = dataset.read_spread(0, dataset.blocks, of=dataset.blocks)
    assert len(np.unique(rows, axis=0)) == dataset.blocks
    assert dataset.bytes_per_token == dataset.manifest.val_bytes / dataset.manifest.val_tokens


def test_other_weights_make_another_mixture_of_the_same_datasets(folder, store, tokenizer, made):
    assert prepare(mixed(folder, much=1, few=3, tokenizer=tokenizer), store).reused, "the ratio is the same"
    other = prepare(mixed(folder, much=0.5, few=0.5, tokenizer=tokenizer), store)
    assert not other.reused and other.dataset.dataset_id != made.dataset_id
    assert parts_of(other.dataset) == parts_of(made)
    profiles = [mixed(folder, much=weight, tokenizer=tokenizer) for weight in (0.25, 0.5)]
    assert default_run_id(profiles[0]) != default_run_id(profiles[1])
    stage = plan_stages(profiles[0])[0]
    prints = [fingerprint_settings(profiles[0], stage, ref.dataset_id) for ref in (made, other.dataset)]
    assert prints[0] != prints[1]
    assert check_inputs(profiles[0]) == made.dataset_id


def test_a_mixture_whose_part_is_gone_is_made_whole_again(folder, tmp_path, tokenizer, made, store):
    profile, first = mixed(folder, tokenizer=tokenizer), replace(made, store_uri=(tmp_path / "store").as_uri())
    shutil.copytree(store, tmp_path / "store")
    before = opened(fetch_dataset(first)).read_batch(5, 8)
    part = parts_of(first)["few"]
    (tmp_path / "store" / part.prefix / "manifest.json").unlink()
    with pytest.raises(ObjectNotFoundError, match=r"source 'few' of .* is gone\. Prepare it again"):
        fetch_dataset(first)
    again = prepare(profile, first.store_uri)
    assert not again.reused and again.dataset.manifest == first.manifest
    assert np.array_equal(before, opened(fetch_dataset(again.dataset)).read_batch(5, 8))


def test_a_tokenizer_is_trained_on_all_sources_by_weight_and_on_no_held_out_text(folder, tmp_path):
    """Each source has letters of its own, and so has what is held out: merges show what they were learned from."""
    drawn = (f"{'za zb ' * 80}{number}" for number in range(100))
    held_out = [text for text in drawn if split_of(split_digest(text), 0.2) == "val"]
    for name, word in (("much", "aa ab"), ("few", "ca cb")):
        lines = [json.dumps({"meta": {"text": f"{word} " * 40 + str(n)}}) for n in range(40)]
        lines = [json.dumps({"meta": {"text": text}}) for text in held_out] + lines
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def merges(much: float) -> str:
        profile = mixed(tmp_path, much=much, few=1, tokenizer={"vocab_size": 258, "training_bytes": 10_000})
        model = json.loads(train_on_mixture(profile.data, profile.tokenizer).json_text)["model"]
        return "".join("".join(merge) for merge in model["merges"])

    assert "a" in merges(20).replace("c", "") and "c" not in merges(20)
    assert "c" in merges(0.05) and "z" not in merges(1)


def test_a_trained_tokenizer_is_one_for_all_and_the_mixture_is_found_before_it_is_trained(folder, store):
    profile = mixed(folder)
    made = prepare(profile, store)
    assert not made.reused and prepare(profile, store).reused
    assert check_inputs(profile) == made.dataset.dataset_id
    hashes = {part.manifest.inputs["tokenizer"]["sha256"] for part in parts_of(made.dataset).values() if part}
    assert len(hashes) == 1
    assert hashes == {entry.sha256 for entry in made.dataset.manifest.files if entry.path == "tokenizer.json"}


def test_a_run_resumes_bit_for_bit_from_a_snapshot_and_from_a_checkpoint(directory, tmp_path):
    profile = tiny_profile(batch={"micro_sequences": 2}, schedule={"cycles": 1})
    whole = run_all(profile, directory, tmp_path / "whole")
    request = stage_request(profile, "warm-start", directory, tmp_path / "again" / "warm-start")
    run_with_stops(request, [2, 5], tmp_path / "snapshots")
    run_with_stops(
        stage_request(profile, "cycle-1", directory, tmp_path / "again" / "cycle-1", request.output_directory),
        [9],
        tmp_path / "more-snapshots",
    )
    for stage in whole:
        ours, theirs = (
            load_file(root / stage / "model.safetensors") for root in (tmp_path / "again", tmp_path / "whole")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_report_tells_tokens_share_and_epochs_of_each_source(made, directory, tmp_path):
    (tmp_path / "training_state.json").write_text(json.dumps({"samples_seen": 801}))
    (tmp_path / "profile.json").write_text(json.dumps({"batch": {"sequence_length": LENGTH}}))
    checkpoint = SimpleNamespace(
        uri="x", manifest=checkpoint_manifest(tmp_path).model_copy(update={"dataset_uri": made.uri})
    )
    rows = report_sources.data_read(checkpoint, lambda ref, names: tmp_path)["sources"]  # type: ignore[arg-type]
    much, few = made.manifest.mixture
    assert [(row.name, row.weight, row.tokens) for row in rows] == [
        ("much", "1/4", 200 * LENGTH),
        ("few", "3/4", 601 * LENGTH),
    ]
    assert [row.epochs for row in rows] == [200 * LENGTH / much.train_tokens, 601 * LENGTH / few.train_tokens]
    assert sum(row.share for row in rows) == 1
    assert epochs_by_source(made.manifest, 801, LENGTH)["few"] == (rows[1].tokens, rows[1].epochs)
    gone = SimpleNamespace(uri="x", manifest=checkpoint.manifest.model_copy(update={"dataset_uri": f"{made.uri}0"}))
    told = report_sources.data_read(gone, lambda ref, names: tmp_path)  # type: ignore[arg-type]
    assert "sources" not in told and ("State", "The dataset is not there any more.") in told["data_facts"]


def test_a_source_that_is_read_often_is_told_and_one_below_a_batch_is_refused(folder, store, tokenizer, made, caplog):
    prepare(mixed(folder, tokenizer=tokenizer, schedule={"cycles": 80}), store)
    told = [record.message for record in caplog.records if "Source 'few'" in record.message]
    assert len(told) == 1 and "Above 4, more text or a smaller weight serves better" in told[0]
    assert not any("Source 'much'" in record.message for record in caplog.records)
    dataset = opened(fetch_dataset(made))
    few = "Source 'few' of dataset 'mixed' .* by its weight, 3/4 of the sum, .* takes up to 750, [0-9.]+ epochs of it"
    with pytest.raises(CorpusTooSmallError, match=few):
        dataset.read_batch(0, 1_000)


FAULTS = {
    "Input should be greater than 0": {"weight": 0},
    "two of [[data.sources]] are called 'a'": {"name": "a"},
    "source 'digits' is of images": {"source": "digits"},
    "source 'jsonl' needs paths": {"source": "jsonl"},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_of_a_source_is_told_with_the_settings(message):
    with pytest.raises(ValidationError) as error:
        DataConfig.model_validate({"sources": [{"name": "a"}, {"name": "b", **FAULTS[message]}]})
    assert message in str(error.value)


def test_keys_of_one_source_beside_several_are_refused_and_so_is_a_series(folder, store):
    with pytest.raises(ValidationError, match=r"data\.text_field, data\.max_documents say nothing beside"):
        DataConfig.model_validate({"text_field": "x", "max_documents": 3, "sources": [{"name": "a"}]})
    with pytest.raises(ConfigError, match=r"\[\[data\.sources\]\] does not go with it"):
        plan_retrain(Run("x", store, mixed(folder)).store, "series", mixed(folder), RetrainOptions())


def test_an_empty_source_is_named_before_a_tokenizer_is_trained(folder, tmp_path):
    for name in ("much", "few"):
        (tmp_path / f"{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes() if name == "much" else b"")
    profile = mixed(tmp_path)
    with pytest.raises(CorpusEmptyError, match="Source 'few' of dataset 'mixed' holds no text"):
        train_on_mixture(profile.data, profile.tokenizer)


def test_without_several_sources_nothing_is_called_otherwise():
    assert DataConfig().parts() == (DataConfig(),) and DataConfig().shares == {}
    assert len(resolve_sources(DataConfig())) == 1
    assert DatasetManifest.model_fields["mixture"].default == ()


def test_the_plan_names_the_sources_and_their_shares(folder):
    shown = plan(mixed(folder)).data_source
    assert shown.startswith("much 25.0%: jsonl ") and "; few 75.0%: jsonl " in shown


def test_settings_that_cannot_change_the_mixture_change_no_id(folder, tokenizer, made):
    fast = mixed(folder, tokenizer=tokenizer)
    fast = fast.model_copy(update={"data": fast.data.model_copy(update={"workers": 2, "engine": "tokenizers"})})
    assert check_inputs(fast) == made.dataset_id
