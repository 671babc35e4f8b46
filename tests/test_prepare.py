"""A dataset is a pure function of its inputs: any number of workers, either engine, killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_up_corpus import made_up_text, write_corpus
from pydantic import ValidationError
from tokenizers import Tokenizer

from relora_train import events
from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetch_bundle
from relora_train.checkpoints.manifest import hash_file
from relora_train.data.dataset import TokenDataset
from relora_train.data.prepare import PreparedDataset, PrepareRequest, describe_dataset, prepare_dataset
from relora_train.data.splitting import cut_into_pieces, split_digest, split_of
from relora_train.data.tokenizer import DEFAULT_EOS_TOKEN, train_tokenizer
from relora_train.errors import CorpusEmptyError, CorpusTooSmallError, SourceUnreadableError
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.storage.memory import MemoryStore

TOKENIZER = TokenizerConfig(vocab_size=300)


def contents(prepared: PreparedDataset) -> dict[str, str]:
    """What the manifest lists, after a look at the disk."""
    for entry in prepared.manifest.files:
        assert hash_file(prepared.directory / entry.path) == entry.sha256
    return {entry.path: entry.sha256 for entry in prepared.manifest.files}


def texts_of(prepared: PreparedDataset, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(prepared.directory / "tokenizer.json"))
    return [tokenizer.decode(tokens[:-1]) for tokens in documents_of(prepared, split)]


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(prepared: PreparedDataset, split: str) -> list[list[int]]:
    """Token lists of the split's documents, by the lengths beside the shards."""
    found = []
    for path in sorted((prepared.directory / split).glob("*.bin")):
        tokens = np.fromfile(path, dtype=prepared.manifest.token_dtype)
        lengths = np.fromfile(path.with_suffix(".len"), dtype="<u4")
        assert lengths.sum() == len(tokens)
        found += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> PreparedDataset:
    return prepare_dataset(corpus, TOKENIZER, tmp_path_factory.mktemp("work"))


def test_every_document_is_found_again_once_with_one_separator(prepared):
    eos_id = prepared.manifest.eos_id
    config = json.loads((prepared.directory / "tokenizer_config.json").read_text())
    assert (eos_id, config["eos_token"]) == (0, DEFAULT_EOS_TOKEN)
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for text in map(made_up_text, range(400)):
        expected[split_of(split_digest(text), 0.2)].append(text)
    for split, texts in expected.items():
        assert texts_of(prepared, split) == texts
        assert all(tokens.count(eos_id) == 1 and tokens[-1] == eos_id for tokens in documents_of(prepared, split))


def test_the_manifest_counts_what_the_shards_hold(prepared):
    manifest = prepared.manifest
    for split in ("train", "val"):
        documents = documents_of(prepared, split)
        assert getattr(manifest, f"{split}_documents") == len(documents)
        assert getattr(manifest, f"{split}_tokens") == sum(map(len, documents))
    sizes = [len(made_up_text(seed).encode()) for seed in range(400)]
    assert manifest.train_bytes + manifest.val_bytes == sum(sizes)
    shards = [entry for entry in manifest.files if entry.path.endswith(".bin")]
    assert len(shards) > 5
    assert "split_note" not in manifest.statistics, "what the rule splits is split by the rule alone"
    assert all(entry.size_bytes <= 2 * 20_000 for entry in shards)


@pytest.mark.parametrize(("workers", "engine"), [(2, "auto"), (3, "tiktoken"), (2, "tokenizers")])
def test_workers_and_engine_change_no_byte(prepared, corpus, tmp_path, workers, engine):
    other = corpus.model_copy(update={"workers": workers, "engine": engine})
    again = prepare_dataset(other, TOKENIZER, tmp_path)
    assert contents(again) == contents(prepared)
    assert again.manifest.dataset_id == prepared.manifest.dataset_id


def test_the_id_is_known_beforehand_and_changes_with_every_input_but_with_no_other_setting(corpus, prepared, tmp_path):
    first, inputs = describe_dataset(corpus, TOKENIZER)
    assert (first, inputs) == (prepared.manifest.dataset_id, prepared.manifest.inputs)
    same = {"workers": 7, "engine": "tokenizers", "name": "another", "hub_split": "test"}
    assert describe_dataset(corpus.model_copy(update=same), TOKENIZER)[0] == first
    others = [{"shard_tokens": 30_000}, {"validation_fraction": 0.3}, {"max_documents": 399}, {"text_field": "body"}]
    ids = {describe_dataset(corpus.model_copy(update=change), TOKENIZER)[0] for change in others}
    for change in ({"vocab_size": 301}, {"training_bytes": 10_000}, {"eos_token": "</s>"}):
        ids.add(describe_dataset(corpus, TOKENIZER.model_copy(update=change))[0])
    for number, vocab_size in enumerate((300, 301)):
        (tmp_path / str(number)).mkdir()
        train_tokenizer([made_up_text(1)], vocab_size=vocab_size).save(tmp_path / str(number))
        ids.add(describe_dataset(corpus, TokenizerConfig(path=str(tmp_path / str(number))))[0])
    assert len(ids | {first}) == 10


def test_a_finished_dataset_is_returned_untouched(corpus, tmp_path):
    first = prepare_dataset(corpus, TOKENIZER, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    assert prepare_dataset(corpus, TOKENIZER, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")} == times
    lost = first.directory / "train" / "shard-00001.bin"
    lost.unlink()
    assert contents(prepare_dataset(corpus, TOKENIZER, tmp_path)) == contents(first)


def test_a_loaded_tokenizer_of_many_entries_makes_wide_tokens(corpus, tmp_path):
    tokenizer = Tokenizer.from_str(train_tokenizer([made_up_text(1)], vocab_size=300).json_text)
    tokenizer.add_special_tokens([f"<extra-{number}>" for number in range(66_000)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = corpus.model_copy(update={"max_documents": 40})
    wide = prepare_dataset(data, TokenizerConfig(path=str(tmp_path)), tmp_path / "work")
    assert wide.manifest.token_dtype == "uint32"
    assert wide.manifest.vocab_size > 66_000
    assert (wide.directory / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert all(tokens[-1] == wide.manifest.eos_id for tokens in documents_of(wide, "train"))


def test_a_prepared_dataset_goes_through_a_store_into_batches(prepared, tmp_path):
    store = MemoryStore()
    manifest = commit_bundle(store, "datasets/x", prepared.directory, prepared.manifest)
    directory = fetch_bundle(store, "datasets/x", manifest, tmp_path / "fetched")
    for split in ("train", "val"):
        fetched = TokenDataset(directory, split, sequence_length=32, seed=1)
        local = TokenDataset(prepared.directory, split, sequence_length=32, seed=1, manifest=prepared.manifest)
        assert np.array_equal(fetched.read_batch(5, 4), local.read_batch(5, 4))
        assert fetched.bytes_per_token > 1


def test_a_document_longer_than_a_shard_runs_on_in_the_next_one(tmp_path):
    long = " ".join(made_up_text(seed) for seed in range(200))
    path = write_rows(tmp_path / "a.jsonl", [long, *(made_up_text(seed) for seed in range(300))])
    data = DataConfig(source="jsonl", paths=(str(path),), shard_tokens=10_000, validation_fraction=0.1, workers=1)
    prepared = prepare_dataset(data, TOKENIZER, tmp_path)
    tokenizer = Tokenizer.from_file(str(prepared.directory / "tokenizer.json"))
    split = split_of(split_digest(long), 0.1)
    stream = [token for part in documents_of(prepared, split) for token in part]
    first = stream[: stream.index(prepared.manifest.eos_id)]
    assert len(first) > 10_000
    assert tokenizer.decode(first) == long


# Errors


def test_a_source_without_text_and_one_without_a_second_side_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n')
    data = DataConfig(source="jsonl", paths=(str(path),))
    with pytest.raises(CorpusEmptyError, match="1 empty documents"):
        prepare_dataset(data, TOKENIZER, tmp_path)
    for text in ('{"text": "alone"}\n', '{"text": "alike"}\n' * 30):
        path.write_text(text)
        with pytest.raises(CorpusTooSmallError, match=r"documents and none of them falls into the .* Give more text"):
            prepare_dataset(data, TOKENIZER, tmp_path)


def test_one_file_of_text_is_cut_into_documents_of_which_some_are_held_out(tmp_path):
    text = " ".join(made_up_text(seed) for seed in range(300))
    (tmp_path / "book.txt").write_text(text)
    data = DataConfig(source="text", paths=(str(tmp_path / "book.txt"),), workers=1, shard_tokens=50_000)
    made = prepare_dataset(data, TOKENIZER, tmp_path / "out")
    manifest, parts = made.manifest, {split: texts_of(made, split) for split in ("train", "val")}
    pieces = [piece.decode() for piece in cut_into_pieces(text, 8192)]
    assert sorted(parts["train"] + parts["val"]) == sorted(pieces) and len(pieces) > 15
    for split, found in parts.items():
        assert found == [piece for piece in pieces if piece in set(found)] and found, split
    assert manifest.train_bytes + manifest.val_bytes == len(text.encode())
    assert "1 documents empty, so documents were cut to 8,192 bytes" in manifest.statistics["split_note"]
    assert contents(prepare_dataset(data, TOKENIZER, tmp_path / "again")) == contents(made)


@pytest.mark.parametrize("fraction", [0.05, 0.95])
def test_of_documents_that_all_fall_on_one_side_the_nearest_is_moved(tmp_path, fraction):
    texts, seed = [], 0
    while len(texts) < 30:  # thirty in a row on the larger side
        text, seed = made_up_text(seed), seed + 1
        if (split_of(split_digest(text), fraction) == "val") == (fraction > 0.5) and len(text) > 20:
            texts.append(text)
    path = write_rows(tmp_path / "c.jsonl", texts)
    data = DataConfig(source="jsonl", paths=(str(path),), validation_fraction=fraction, workers=1)
    made = prepare_dataset(data, TOKENIZER, tmp_path / "out")
    alone, nearest = ("val", min) if fraction < 0.5 else ("train", max)
    assert texts_of(made, alone) == [nearest(texts, key=split_digest)]
    assert made.manifest.train_documents + made.manifest.val_documents == 30
    assert "the document nearest to that side was moved" in made.manifest.statistics["split_note"]


def test_named_files_are_held_out_and_all_else_is_trained_on(tmp_path, corpus):
    texts = [made_up_text(seed) for seed in range(60)]
    train, val = write_rows(tmp_path / "train.jsonl", texts[:40]), write_rows(tmp_path / "val.jsonl", texts[40:])
    paths = {"paths": (str(train),), "validation_paths": (str(val),)}
    data = corpus.model_copy(update={**paths, "max_documents": 30})
    made = prepare_dataset(data, TOKENIZER, tmp_path / "out")
    assert (texts_of(made, "train"), texts_of(made, "val")) == (texts[:30], texts[40:])
    ids = {describe_dataset(data.model_copy(update={"validation_fraction": f}), TOKENIZER)[0] for f in (0.1, 0.5)}
    assert ids == {made.manifest.dataset_id}
    write_rows(val, texts[41:])
    assert describe_dataset(data, TOKENIZER)[0] not in ids
    gone = data.model_copy(update={"validation_paths": (str(tmp_path / "gone"),)})
    with pytest.raises(SourceUnreadableError, match=r"Correct data\.validation_paths"):
        describe_dataset(gone, TOKENIZER)
    with pytest.raises(ValidationError, match="takes no validation_paths"):
        DataConfig(validation_paths=("x",))


def test_a_source_repaired_after_an_error_is_read_anew(corpus, tmp_path):
    whole = Path(corpus.paths[0]).read_text()
    path = tmp_path / "a.jsonl"
    data = corpus.model_copy(update={"paths": (str(path),)})
    path.write_text(whole + "{")
    with pytest.raises(SourceUnreadableError, match="line 401 is not valid JSON"):
        prepare_dataset(data, TOKENIZER, tmp_path)
    path.write_text(whole)
    assert prepare_dataset(data, TOKENIZER, tmp_path).manifest.train_documents > 0


# The process


def start(request: PrepareRequest, directory: Path, **environment: str) -> subprocess.Popen[str]:
    path = directory / "request.json"
    path.write_text(request.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "relora_train.data.prepare", "--request", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def request_for(data: DataConfig, directory: Path) -> PrepareRequest:
    return PrepareRequest(
        data=data, tokenizer=TOKENIZER, work_directory=directory / "work", result_path=directory / "result.json"
    )


def test_the_process_reports_progress_and_leaves_the_same_dataset(corpus, prepared, tmp_path):
    request = request_for(corpus, tmp_path)
    output, errors = start(request, tmp_path).communicate(timeout=60)
    progress = [event for line in output.split("\n") if (event := events.decode(line))]
    assert {event["event"] for event in progress} == {"tokenize_progress"}, errors
    finished = {event["phase"] for event in progress if event["done_bytes"] == event["total_bytes"]}
    assert finished == {"read", "train-tokenizer", "tokenize"}
    assert contents(PreparedDataset.model_validate_json(request.result_path.read_bytes())) == contents(prepared)


def test_no_phase_is_more_than_done(corpus, tmp_path):
    """Also not training a tokenizer on less than there is, though the last piece of text is read whole."""
    seen = []
    prepare_dataset(corpus, TOKENIZER.model_copy(update={"training_bytes": 10_000}), tmp_path, on_progress=seen.append)
    last = {progress["phase"]: progress for progress in seen}
    assert last["train-tokenizer"]["done_bytes"] == last["train-tokenizer"]["total_bytes"] == 10_000
    assert all(progress["done_bytes"] <= progress["total_bytes"] for progress in seen)


def test_the_process_reports_an_error_by_name_and_ends_with_its_status(tmp_path):
    process = start(request_for(DataConfig(source="text", paths=("/no/such/file",)), tmp_path), tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == SourceUnreadableError.exit_code
    assert events.decode(output)["error"] == "SourceUnreadableError"


def test_preparing_imports_no_torch_and_no_orchestrator_and_describing_no_datasets(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [made_up_text(seed) for seed in range(60)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    code = f"""
import sys
from pathlib import Path
from relora_train.data.prepare import *
from relora_train.data.dataset import TokenDataset
if __name__ == "__main__":
    data = DataConfig(source="parquet", paths=({str(tmp_path / "a.parquet")!r},), validation_fraction=0.3, workers=1)
    describe_dataset(data, TokenizerConfig(vocab_size=300))
    assert not {{"datasets", "torch", "boto3", "prefect"}} & set(sys.modules)
    made = prepare_dataset(data, TokenizerConfig(vocab_size=300), Path({str(tmp_path)!r}))
    TokenDataset(made.directory, "train", sequence_length=8, manifest=made.manifest).read_batch(0, 1)
    assert not {{"torch", "boto3", "prefect"}} & set(sys.modules)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    subprocess.run([sys.executable, script], check=True, timeout=60)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_preparation_continues_and_ends_with_the_same_bytes(tmp_path):
    data = write_corpus(tmp_path / "corpus.jsonl", documents=1000).model_copy(update={"shard_tokens": 10_000})
    undisturbed = prepare_dataset(data, TOKENIZER, tmp_path / "undisturbed")
    shards = sum(entry.path.endswith(".bin") for entry in undisturbed.manifest.files)
    slow = data.model_copy(update={"engine": "tokenizers", "workers": 2})
    request = request_for(slow, tmp_path)
    process = start(request, tmp_path)
    records = lambda: list((tmp_path / "work").glob("*/records/train-*.json"))  # noqa: E731
    wait_until(lambda: len(records()) >= 5)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    wait_until(lambda: not any(Path(f"/proc/{worker}/fd").exists() for worker in workers))  # none is left behind
    kept = {path.stem: path.stat().st_mtime_ns for path in records()}
    assert 5 <= len(kept) < shards
    assert not request.result_path.exists()
    done = (tmp_path / "work").glob("*/dataset/train/shard-*.bin")
    times = {path: path.stat().st_mtime_ns for path in done if f"train-{path.stem[-5:]}" in kept}

    resumed = start(request, tmp_path)
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, errors
    assert contents(PreparedDataset.model_validate_json(request.result_path.read_bytes())) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing finished was done again


@pytest.mark.parametrize("moment", ["staged", "dataset/tokenizer.json"])
def test_killed_before_its_first_shard_it_still_ends_with_the_same_bytes(corpus, prepared, tmp_path, moment):
    process = start(request_for(corpus, tmp_path), tmp_path)
    wait_until(lambda: any((tmp_path / "work").glob(f"*/{moment}")))
    process.kill()
    process.communicate(timeout=30)
    assert contents(prepare_dataset(corpus, TOKENIZER, tmp_path / "work")) == contents(prepared)


def test_the_process_leaves_with_its_parent(tmp_path):
    data = write_corpus(tmp_path / "corpus.jsonl", documents=3000).model_copy(update={"engine": "tokenizers"})
    process = start(request_for(data, tmp_path), tmp_path, RELORA_PARENT_PIPE="1")
    wait_until(lambda: any((tmp_path / "work").glob("*/staged")))
    process.stdin.close()  # as when the parent dies
    assert process.wait(timeout=30) == 130
    process.stdout.close()
    process.stderr.close()


def test_two_processes_make_one_dataset_and_both_return_it(corpus, prepared, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    racing = []
    for place in places:
        place.mkdir()
        request = request_for(corpus, place).model_copy(update={"work_directory": tmp_path / "work"})
        racing.append(start(request, place))
    for process in racing:
        process.communicate(timeout=60)
    first, second = (PreparedDataset.model_validate_json((place / "result.json").read_bytes()) for place in places)
    assert first == second
    assert contents(first) == contents(prepared)
