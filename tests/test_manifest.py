import hashlib
import json
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from relora_train.checkpoints.manifest import (
    CheckpointManifest,
    DatasetManifest,
    FileEntry,
    SnapshotManifest,
    content_digest,
    describe_files,
    hash_file,
    parse_manifest,
    read_manifest,
    result_digest,
)
from relora_train.errors import CheckpointCorruptError
from relora_train.storage.memory import MemoryStore

FILES = [
    {"path": "metrics.jsonl", "size_bytes": 3, "sha256": "1" * 64},
    {"path": "adapter/A.bin", "size_bytes": 0, "sha256": "2" * 64},
    {"path": "weights.bin", "size_bytes": 40, "sha256": "3" * 64},
]
CHECKPOINT = {
    "files": FILES, "attempt": "a1", "run_id": "run", "profile": "p",
    "stage": "warm-start", "step": 0, "cycle": 0, "tokens_seen": 0, "fingerprint": "f" * 64, "fingerprint_settings": {},
    "parent": None, "dataset_id": "d" * 64, "dataset_uri": "memory://x/d",
}  # fmt: skip
SNAPSHOT = {
    "files": FILES, "attempt": "a1", "run_id": "run", "stage": "cycle-1", "step": 0,
    "fingerprint": "f" * 64,
}  # fmt: skip
DATASET = {
    "files": FILES, "attempt": "a1", "name": "d", "dataset_id": "d" * 64, "inputs": {},
    "token_dtype": "uint16", "vocab_size": 300, "eos_id": 0, "train_tokens": 9, "train_documents": 2, "train_bytes": 30,
    "val_tokens": 4, "val_documents": 1, "val_bytes": 12,
}  # fmt: skip
IMAGES = {
    "size": 3, "channels": 2, "classes": 2, "largest_value": 1, "mean": [0.5, 0.5], "deviation": [0.1, 0.1],
}  # fmt: skip
KINDS = {CheckpointManifest: CHECKPOINT, SnapshotManifest: SNAPSHOT, DatasetManifest: DATASET}


def parsed(kind, /, **changed):
    return parse_manifest(kind, json.dumps(KINDS[kind] | changed).encode(), uri="memory://x/manifest.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_without_its_optional_fields_reads_and_comes_back_as_it_was_written(kind):
    """Such as one from before the field: an absent field is no error, and means what it meant."""
    manifest = parsed(kind)
    assert parse_manifest(kind, manifest.to_bytes(), uri="x") == manifest
    assert manifest.to_bytes() == parse_manifest(kind, manifest.to_bytes(), uri="x").to_bytes()
    name = kind.__name__.removesuffix("Manifest").lower()
    assert manifest.to_bytes().startswith(f'{{\n "format_version": 1,\n "kind": "{name}",\n "files": ['.encode())
    assert manifest.to_bytes().endswith(b"}\n") and manifest.to_bytes().count(b"\n") > 20, "for people to read"
    assert manifest.files_prefix == "" and manifest.versions == {} and manifest.size_bytes == 43
    assert manifest.created_at.tzinfo == UTC and abs((datetime.now(UTC) - manifest.created_at).total_seconds()) < 600


def test_what_a_checkpoint_does_not_say_is_empty():
    manifest = parsed(CheckpointManifest)
    assert (manifest.variant_of, manifest.stage_seconds) == (None, 0)
    assert [manifest.evaluation, manifest.merge_report, manifest.divergence, manifest.provenance] == [{}] * 4
    assert parsed(SnapshotManifest).parent is None
    assert parsed(DatasetManifest).images is None and parsed(DatasetManifest).statistics == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"format_version": 2}, "format_version"),
        ({"kind": "another"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"attempt": ""}, "attempt"),
        ({"attempt": "a" * 65}, "attempt"),
        ({"files_prefix": "../elsewhere"}, "files_prefix"),
        ({"files": [FILES[0] | {"size_bytes": -1}]}, "files.0.size_bytes"),
        ({"files": [FILES[0] | {"sha256": "1" * 63}]}, "files.0.sha256"),
        ({"files": [FILES[0], FILES[0] | {"path": "Metrics.jsonl"}]}, "files"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_object_and_the_place_named(kind, changed, where):
    with pytest.raises(CheckpointCorruptError, match=rf"memory://x/manifest.json .* {kind.__name__}: {where}: "):
        parsed(kind, **changed)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        *((CheckpointManifest, {name: -1}) for name in ("step", "cycle", "tokens_seen", "stage_seconds")),
        *((CheckpointManifest, {name: "f" * 63}) for name in ("fingerprint", "variant_of")),
        (CheckpointManifest, {"run_id": "../x"}),
        (SnapshotManifest, {"step": -1}),
        (SnapshotManifest, {"fingerprint": "F" * 64}),
        (SnapshotManifest, {"run_id": "../x"}),
        (DatasetManifest, {"name": "a/b"}),
        (DatasetManifest, {"dataset_id": "d" * 63}),
        (DatasetManifest, {"token_dtype": "int8"}),
        *((DatasetManifest, {"images": IMAGES | {name: 0}}) for name in ("size", "channels", "largest_value")),
        (DatasetManifest, {"images": IMAGES | {"classes": 1}}),
    ],
)
def test_values_that_nothing_writes_are_refused(kind, changed):
    with pytest.raises(CheckpointCorruptError, match=next(iter(changed))):
        parsed(kind, **changed)


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", "a/", "./a", ".hidden", "a/.b", "", "a b"]
)
def test_a_manifest_cannot_name_a_file_outside_its_bundle(path):
    with pytest.raises(ValidationError, match="leave the bundle"):
        FileEntry(path=path, size_bytes=0, sha256="0" * 64)


def test_half_a_manifest_is_damaged_as_a_whole():
    with pytest.raises(
        CheckpointCorruptError, match=r"memory://x/m is damaged .*is not a valid DatasetManifest: document: .*delete"
    ):
        parse_manifest(DatasetManifest, b'{"kind": "dataset"', uri="memory://x/m")


def test_a_manifest_cannot_be_changed_after_it_was_checked():
    checkpoint = parsed(CheckpointManifest, parent={"uri": "memory://x/p", "fingerprint": "p", "step": 3})
    images = parsed(DatasetManifest, images=IMAGES).images
    parts = ((checkpoint, "step"), (checkpoint.files[0], "path"), (checkpoint.parent, "uri"), (images, "size"))
    for part, name in parts:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))
        with pytest.raises(ValidationError, match="surprise"):
            type(part).model_validate({**part.model_dump(), "surprise": 1})


def test_a_dataset_says_what_stands_before_its_documents():
    assert parsed(DatasetManifest).bos_ids == ()
    assert parsed(DatasetManifest, inputs={"bos_ids": [1, 2]}).bos_ids == (1, 2)


def test_rows_of_images_are_their_pixels_and_their_class():
    manifest = parsed(DatasetManifest, images=IMAGES)
    assert manifest.images.row_bytes == 2 * 3 * 3 + 1
    assert (manifest.unit, parsed(DatasetManifest).unit) == ("images", "tokens")


def test_files_are_described_by_their_place_their_size_and_all_of_their_bytes(tmp_path):
    contents = {"b.bin": b"x" * ((1 << 20) + 1), "a/z.json": b"{}", "a/b/empty": b""}
    for name, content in {**contents, "manifest.json": b"{}"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    described = describe_files(tmp_path)
    assert [entry.path for entry in described] == ["a/b/empty", "a/z.json", "b.bin"]
    for entry in described:
        content = contents[entry.path]
        assert (entry.size_bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert hash_file(tmp_path / entry.path) == entry.sha256


def test_the_content_is_every_file():
    listing = [[entry["path"], entry["size_bytes"], entry["sha256"]] for entry in FILES]
    expected = hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()
    assert content_digest(parsed(CheckpointManifest)) == content_digest(parsed(SnapshotManifest)) == expected
    assert content_digest(parsed(CheckpointManifest, files=FILES[1:])) != expected


def test_a_bundle_is_there_when_its_manifest_is():
    store = MemoryStore()
    assert read_manifest(store, "runs/x", SnapshotManifest) is None
    store.put_bytes("runs/x/manifest.json", parsed(SnapshotManifest).to_bytes())
    assert read_manifest(store, "runs/x", SnapshotManifest).files == parsed(SnapshotManifest).files


def test_the_result_is_every_file_but_the_records_of_how_it_was_made():
    digest = result_digest(parsed(CheckpointManifest))
    listing = [[entry["path"], entry["size_bytes"], entry["sha256"]] for entry in FILES[1:]]
    assert digest == hashlib.sha256(json.dumps(listing).encode()).hexdigest(), "stored digests are compared with it"
    profile = {"path": "profile.json", "size_bytes": 1, "sha256": "4" * 64}
    for same in (FILES[::-1], FILES[1:], [*FILES, profile]):
        assert result_digest(parsed(CheckpointManifest, files=same)) == digest
    for name, value in (("path", "weights.bin2"), ("size_bytes", 41), ("sha256", "5" * 64)):
        other = [*FILES[:2], FILES[2] | {name: value}]
        assert result_digest(parsed(CheckpointManifest, files=other)) != digest
