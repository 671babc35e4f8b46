"""Verify names what is missing, damaged or left over, and is silent only when there is nothing."""

import json
import uuid

import pytest
from test_pruning import add, straight_run

from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.checkpoints.upkeep.verify import verify_checkpoint, verify_run
from relora_train.errors import CheckpointNotFoundError
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store


def found(store: ObjectStore) -> list[tuple[str, str]]:
    return [(each.kind, each.uri.removeprefix(f"{store.uri}/")) for each in verify_run(store, "run").findings]


def test_a_whole_run_is_clean_and_every_file_of_it_was_read(store, files):
    refs = straight_run(store, files, cycles=2)
    result = verify_run(store, "run")
    assert result.is_clean and (result.bundles, result.files) == (4, 16)  # three checkpoints and their dataset
    assert result.size_bytes == 4 * sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    assert verify_checkpoint(refs[1]).is_clean


def test_every_damage_is_named_and_none_hides_another(store, files):
    refs = straight_run(store, files, cycles=2)
    model, config = f"{refs[0].prefix}/model.safetensors", f"{refs[1].prefix}/config.json"
    data = bytearray(store.get_bytes(model)[0])
    data[7] ^= 1
    store.put_bytes(model, bytes(data))
    store.delete(config)
    store.put_bytes(f"{refs[2].prefix}/manifest.json", b"{}")
    store.put_bytes("datasets/corpus/d/config.json", b"longer than it was, or shorter; in any case not the same bytes")
    store.put_bytes(f"{refs[1].prefix}/stranger.bin", b"x")
    store.put_bytes("runs/run/checkpoints/step-00000900-0123456789ab/model.safetensors", b"x")
    store.put_bytes("runs/run/elsewhere.bin", b"x")
    store.put_bytes("runs/run/refs/gone.json", json.dumps({"checkpoint": refs[0].prefix[:-12] + "0" * 12}).encode())
    store.put_bytes("runs/run/refs/odd.json", b"[]")
    assert sorted(found(store)) == sorted(
        [
            ("damaged", model),
            ("missing", config),
            ("damaged", f"{refs[2].prefix}/manifest.json"),
            ("damaged", "datasets/corpus/d/config.json"),
            ("unreferenced", f"{refs[1].prefix}/stranger.bin"),
            ("unreferenced", "runs/run/checkpoints/step-00000900-0123456789ab"),
            ("unreferenced", "runs/run/elsewhere.bin"),
            ("missing", refs[0].prefix[:-12] + "0" * 12),
            ("damaged", "runs/run/refs/odd.json"),
        ]
    )
    assert {each.kind for each in verify_checkpoint(refs[1]).findings} == {"missing", "damaged", "unreferenced"}


def test_a_missing_dataset_is_named_once(store, files):
    refs = straight_run(store, files, cycles=2)
    store.delete("datasets/corpus/d/manifest.json")
    assert found(store) == [("missing", "datasets/corpus/d")]
    assert [each.kind for each in verify_checkpoint(refs[0]).findings] == ["missing"]


def test_a_removal_is_no_fault_and_half_of_one_is(store, files):
    refs = straight_run(store, files, cycles=2)
    prune_run(store, "run", RetentionPolicy(keep_last=1))
    assert found(store) == []
    store.put_bytes(f"{refs[0].prefix}/model.safetensors", b"x")
    store.put_bytes(f"{refs[2].prefix}/deleted.json", store.get_bytes(f"{refs[0].prefix}/deleted.json")[0])
    store.put_bytes(f"{refs[1].prefix}/deleted.json", b"?")
    assert sorted(found(store)) == sorted(
        [
            ("unreferenced", refs[0].prefix),
            ("damaged", f"{refs[1].prefix}/deleted.json"),
            ("unreferenced", f"{refs[2].prefix}/deleted.json"),
        ]
    )


def test_what_a_live_flow_is_uploading_is_a_note(store, files):
    straight_run(store, files, cycles=1)
    store.put_bytes("runs/run/checkpoints/step-00000900-0123456789ab/model.safetensors", b"x")
    store.put_bytes("runs/run/snapshots/0123456789ab/step-850/state.safetensors", b"x")
    with hold_run(store, "run"):
        result = verify_run(store, "run")
    assert result.is_clean and len(result.notes) == 2
    assert not verify_run(store, "run").is_clean


def test_snapshots_are_read_and_those_of_finished_stages_are_left_over(store, files):
    refs = straight_run(store, files, cycles=1)
    base = f"runs/run/snapshots/{'ab' * 6}/step-150"
    snapshot = refs[1].manifest.model_dump(mode="json") | {"kind": "snapshot", "new_field": 1}
    for entry in refs[1].manifest.files:
        store.put_file(f"{base}/{entry.path}", files / entry.path)
    store.put_bytes(f"{base}/manifest.json", json.dumps(snapshot).encode())
    assert found(store) == []
    store.put_bytes(f"{base}/config.json", b"0")
    assert found(store) == [("damaged", f"{base}/config.json")]
    store.put_bytes(
        f"runs/run/snapshots/{refs[1].fingerprint[:12]}/step-1/manifest.json", json.dumps(snapshot).encode()
    )
    assert ("unreferenced", f"runs/run/snapshots/{refs[1].fingerprint[:12]}") in found(store)


def test_a_run_that_is_not_there_is_no_clean_run(store, files):
    with pytest.raises(CheckpointNotFoundError, match="no run 'run'"):
        verify_run(store, "run")
    add(store, files, 0, None)
    assert found(store) == [("missing", "datasets/corpus/d")]


def test_what_is_removed_while_it_is_read_is_not_found_fault_with(tmp_path, files, monkeypatch):
    from relora_train.checkpoints.upkeep import verify

    store = open_store(f"memory://{uuid.uuid4().hex}")
    refs = straight_run(store, files, cycles=1)
    read, seen = verify.verify_bundle, []

    def removing(*arguments) -> None:
        if not seen:
            seen.append(prune_run(store, "run", RetentionPolicy(keep_last=1)).removed)
        read(*arguments)

    monkeypatch.setattr(verify, "verify_bundle", removing)
    result = verify_run(store, "run")
    assert seen == [[refs[0]]] and result.is_clean
    assert any("was removed while it was read" in note for note in result.notes)
