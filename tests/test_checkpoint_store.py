"""Checkpoints of a run: listed is what can be read, the head never loses a move, and no name is ever guessed."""

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import checkpoint_manifest, dataset_manifest, fingerprint_of, write_files
from hypothesis import given
from hypothesis import strategies as st

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetch_checkpoint, verify_bundle
from relora_train.checkpoints.layout import (
    check_run_id,
    checkpoint_prefix,
    dataset_prefix,
    parse_checkpoint_prefix,
    split_checkpoint_uri,
)
from relora_train.checkpoints.lineage import CheckpointRef, line_to
from relora_train.checkpoints.manifest import find_dataset
from relora_train.checkpoints.names import list_runs, resolve_checkpoint
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import (
    CheckpointAmbiguousError,
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ConfigError,
    PreconditionFailedError,
)
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store


def add(
    run: CheckpointStore,
    tmp_path: Path,
    stage: str,
    step: int,
    parent: CheckpointRef | None = None,
    *,
    variant: str = "",
) -> CheckpointRef:
    directory = write_files(tmp_path / "built" / uuid.uuid4().hex, f"{stage}{variant}")
    manifest = checkpoint_manifest(
        directory, run_id=run.run_id, step=step, stage=stage, work=f"{run.run_id} {stage} {variant}", parent=parent
    )
    return run.commit(directory, manifest)


def straight_run(
    store: ObjectStore, tmp_path: Path, run_id: str = "run"
) -> tuple[CheckpointStore, list[CheckpointRef]]:
    """warm-start, cycle-1, cycle-2, cycle-3 at steps 100, 200, 300, 400."""
    run, refs = CheckpointStore(store, run_id), []
    for index, stage in enumerate(("warm-start", "cycle-1", "cycle-2", "cycle-3")):
        refs.append(add(run, tmp_path, stage, 100 * (index + 1), refs[-1] if refs else None))
    return run, refs


# --- commit, find, list, fetch, verify ---


def test_a_committed_checkpoint_is_found_listed_fetched_and_verified(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    assert run.list() == refs
    assert refs[0].prefix == f"runs/run/checkpoints/step-00000100-{refs[0].fingerprint[:12]}"
    assert refs[0].uri == f"{store.uri}/{refs[0].prefix}"
    for ref in refs:
        verify_bundle(run.store, ref.prefix, ref.manifest)
        directory = fetch_checkpoint(ref, tmp_path / "cache", store=run.store)
        assert (directory / "model.safetensors").stat().st_size == 5000
        again = fetch_checkpoint(ref, tmp_path / "cache", store=run.store)
        assert again == directory


def test_an_empty_run_has_nothing_and_says_so(store):
    run = CheckpointStore(store, "run")
    assert list(run.list()) == []
    assert (run.head(), run.latest()) == (None, None)
    assert list(list_runs(store)) == []


def test_a_checkpoint_without_a_manifest_is_absent_everywhere(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    store.delete(f"{refs[3].prefix}/manifest.json")
    assert run.list() == refs[:3]
    assert run.latest() == refs[2]
    assert list_runs(store)[0].latest_step == 300


def test_a_repeated_stage_meets_its_own_checkpoint(store, tmp_path):
    run = CheckpointStore(store, "run")
    first = add(run, tmp_path, "warm-start", 100)
    assert add(run, tmp_path, "warm-start", 100) == first
    assert run.list() == [first]


def test_runs_do_not_see_each_other(store, tmp_path):
    one, two = CheckpointStore(store, "run"), CheckpointStore(store, "run-2")
    ref = add(two, tmp_path, "warm-start", 100)
    assert list(one.list()) == []
    assert two.list() == [ref]
    with pytest.raises(ConfigError, match="'run-2'"):
        one.commit(tmp_path, ref.manifest)


def test_runs_are_listed_with_what_an_operator_asks_first(store, tmp_path):
    straight_run(store, tmp_path, "b-run")
    add(CheckpointStore(store, "a-run"), tmp_path, "warm-start", 5)
    found = [(info.run_id, info.checkpoint_count, info.latest_step, info.profile) for info in list_runs(store)]
    assert found == [("a-run", 1, 5, "tiny"), ("b-run", 4, 400, "tiny")]
    assert list_runs(store)[0].modified_at.tzinfo is not None


def test_a_damaged_manifest_stops_reading_a_run_but_not_the_list_of_runs(store, tmp_path, caplog):
    run, refs = straight_run(store, tmp_path)
    store.put_bytes(f"{refs[3].prefix}/manifest.json", b"{}")
    with pytest.raises(CheckpointCorruptError, match=refs[3].prefix):
        run.list()
    assert list_runs(store)[0].profile is None
    assert refs[3].prefix in caplog.text


def test_a_manifest_that_was_copied_to_another_place_is_refused(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    data, _ = memory.get_bytes(f"{refs[0].prefix}/manifest.json")
    memory.put_bytes(f"{checkpoint_prefix('run', 999, 'f' * 64)}/manifest.json", data)
    with pytest.raises(CheckpointCorruptError, match="copied or renamed"):
        run.list()


@pytest.mark.parametrize("run_id", ["", ".", "..", "-x", ".x", "a/b", "a b", "ä", "a\n", "x" * 101, "a@b"])
def test_a_run_id_that_could_not_be_a_folder_is_refused_with_the_rule(run_id, memory):
    with pytest.raises(ConfigError, match="1 to 100 letters"):
        CheckpointStore(memory, run_id)


@given(
    run_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
    step=st.integers(0, 10**10),
    fingerprint=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    root=st.sampled_from(["s3://bucket", "s3://bucket/runs/x", "file:///data/runs", "memory://m"]),
)
def test_a_place_can_be_read_back_from_its_name(run_id, step, fingerprint, root):
    prefix = checkpoint_prefix(check_run_id(run_id), step, fingerprint)
    place = parse_checkpoint_prefix(prefix)
    assert (place.run_id, place.step, place.short_fingerprint) == (run_id, step, fingerprint[:12])
    assert split_checkpoint_uri(f"{root}/{prefix}") == split_checkpoint_uri(f"{root}/{prefix}/") == (root, prefix)


# --- the head ---


def test_the_head_is_what_was_set_and_does_not_go_back_along_its_line(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    assert run.head() is None
    assert run.set_head(refs[1]) == refs[1] == run.head()
    assert run.set_head(refs[3]) == refs[3] == run.head()
    assert run.set_head(refs[0]) == refs[3] == run.head()


def test_the_head_moves_sideways_to_a_branch(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    run.set_head(refs[3])
    branch = add(run, tmp_path, "cycle-3", 400, refs[2], variant="lower lr")
    assert run.set_head(branch) == branch == run.latest()


def test_a_sideways_move_that_another_writer_overtook_is_refused(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    branch = add(run, tmp_path, "cycle-3", 400, refs[2], variant="lower lr")
    run.set_head(refs[2])

    class Overtaken(CheckpointStore):
        def _head(self):
            answer = super()._head()
            if answer[0] == refs[2]:
                run.set_head(refs[3])  # between our read and our write
            return answer

    with pytest.raises(PreconditionFailedError, match=refs[3].prefix):
        Overtaken(memory, "run").set_head(branch)
    assert run.head() == refs[3]


def test_writers_that_move_the_head_forward_together_end_at_the_furthest(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    barrier = threading.Barrier(4)

    def move(ref: CheckpointRef) -> CheckpointRef:
        barrier.wait()
        return run.set_head(ref)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, refs))
    assert run.head() == refs[3]


def test_a_head_of_another_run_or_store_is_refused(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    with pytest.raises(ConfigError, match="not its own"):
        CheckpointStore(memory, "other").set_head(refs[0])
    with pytest.raises(ConfigError, match="not its own"):
        CheckpointStore(open_store(tmp_path), "run").set_head(refs[0])
    assert run.head() is None


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"checkpoint": 5}', b'{"checkpoint": "runs/other/x"}'])
def test_a_damaged_head_is_refused_with_the_way_out(memory, record):
    memory.put_bytes("runs/run/refs/head.json", record)
    with pytest.raises(CheckpointCorruptError, match=r"runs/run/refs/head.json is damaged.*Delete it"):
        CheckpointStore(memory, "run").latest()


def test_a_head_whose_checkpoint_was_deleted_is_an_error_until_the_next_commit_replaces_it(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    run.set_head(refs[3])
    memory.delete(f"{refs[3].prefix}/manifest.json")
    with pytest.raises(CheckpointNotFoundError, match=refs[3].prefix):
        run.latest()
    assert run.set_head(refs[2]) == refs[2] == run.head()


# --- the line of a run ---


def test_latest_goes_on_from_the_head_so_that_a_lost_head_update_costs_nothing(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    assert run.latest() == refs[3]
    run.set_head(refs[1])
    assert run.latest() == refs[3]


def test_two_lines_without_a_head_or_from_it_are_ambiguous_and_named(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    branch = add(run, tmp_path, "cycle-3", 400, refs[2], variant="lower lr")
    with pytest.raises(CheckpointAmbiguousError) as caught:
        run.latest()
    assert refs[3].uri in str(caught.value) and branch.uri in str(caught.value)
    run.set_head(refs[2])
    with pytest.raises(CheckpointAmbiguousError, match=refs[2].prefix):
        run.latest()
    run.set_head(branch)
    assert run.latest() == branch


def test_a_line_ends_where_its_parent_lies_in_another_run(memory, tmp_path):
    _, refs = straight_run(memory, tmp_path)
    branch_run = CheckpointStore(memory, "branch")
    first = add(branch_run, tmp_path, "cycle-3", 400, refs[2])
    second = add(branch_run, tmp_path, "cycle-4", 500, first)
    assert branch_run.ancestry(second) == [first, second]
    assert branch_run.latest() == second


def test_parents_that_go_in_a_circle_do_not_hang(memory, tmp_path):
    _, refs = straight_run(memory, tmp_path)
    parent = refs[1].manifest.parent.model_copy(update={"fingerprint": refs[1].fingerprint})
    manifest = refs[0].manifest.model_copy(update={"parent": parent})
    circle = CheckpointRef(refs[0].uri, refs[0].store_uri, refs[0].prefix, manifest)
    assert line_to(refs[1], [circle, refs[1]]) == [circle, refs[1]]


# --- resolve ---


def test_every_way_to_name_a_checkpoint_finds_it(store, tmp_path):
    run, refs = straight_run(store, tmp_path)
    elsewhere = open_store(f"memory://{uuid.uuid4().hex}")
    names = {
        "run": 3, "run@latest": 3, "run@cycle-2": 2, "run@warm-start": 0, "run@step-400": 3, "run@step-00000200": 1,
    }  # fmt: skip
    for with_head in (False, True):
        if with_head:
            run.set_head(refs[3])
        assert {name: resolve_checkpoint(name, store) for name in names} == {n: refs[i] for n, i in names.items()}
    assert [resolve_checkpoint(ref.uri, elsewhere) for ref in refs] == refs
    assert resolve_checkpoint(f"{refs[0].uri}/", elsewhere) == refs[0]


def test_a_directory_names_the_checkpoint_in_it(tmp_path, memory, monkeypatch):
    store = open_store(tmp_path / "store")
    _, refs = straight_run(store, tmp_path)
    directory = store.local_path(refs[0].prefix)
    monkeypatch.chdir(directory.parent)
    for spec in (str(directory), f"./{directory.name}", directory.name):
        assert resolve_checkpoint(spec, memory) == refs[0]
    with pytest.raises(CheckpointNotFoundError, match="is no directory"):
        resolve_checkpoint(str(tmp_path / "absent"), memory)


def test_a_checkpoint_that_was_fetched_or_copied_anywhere_can_be_named_by_its_directory(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    fetched = fetch_checkpoint(refs[1], tmp_path / "my cache", store=run.store)
    ref = resolve_checkpoint(str(fetched), memory)
    assert ref.manifest == refs[1].manifest
    assert fetch_checkpoint(ref, tmp_path / "other") == fetched


def test_a_variant_can_be_copied_away_too(tmp_path, memory):
    run = CheckpointStore(memory, "run")
    prefix = checkpoint_prefix("run", 100, fingerprint_of("run warm-start "))
    memory.put_bytes(f"{prefix}/claim.json", b"another attempt")
    ref = add(run, tmp_path, "warm-start", 100)
    assert ref.manifest.files_prefix.startswith("variant-")
    fetched = fetch_checkpoint(ref, tmp_path / "cache", store=run.store)
    assert fetch_checkpoint(resolve_checkpoint(str(fetched), memory), tmp_path / "other") == fetched


def test_a_name_that_is_a_run_and_a_directory_is_ambiguous(memory, tmp_path, monkeypatch):
    straight_run(memory, tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointAmbiguousError, match=r"run@latest or \./run"):
        resolve_checkpoint("run", memory)
    assert resolve_checkpoint("run@latest", memory).step == 400


def test_what_does_not_exist_is_answered_with_what_does(store, tmp_path):
    _, refs = straight_run(store, tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"no run 'absent'\. Runs there: run"):
        resolve_checkpoint("absent@latest", store)
    for spec in ("run@cycle-9", "run@step-401", f"{store.uri}/{checkpoint_prefix('run', 9, 'f' * 64)}"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            resolve_checkpoint(spec, store)
        assert all(ref.uri in str(caught.value) for ref in refs)
    with pytest.raises(CheckpointNotFoundError, match=r"holds no manifest.json"):
        resolve_checkpoint(f"{store.uri}/somewhere/else", store)


@pytest.mark.parametrize("spec", ["", "@latest", "run@", "run@cycle 2", "a b", "run@x@y", "ä"])
def test_a_name_of_no_known_form_is_refused_with_the_forms(spec, memory):
    with pytest.raises(ConfigError, match="RUN@cycle-2"):
        resolve_checkpoint(spec, memory)


def test_a_checkpoint_whose_upload_never_finished_names_the_latest_complete_one(store, tmp_path):
    _, refs = straight_run(store, tmp_path)
    store.delete(f"{refs[3].prefix}/manifest.json")
    for spec in ("run@step-400", refs[3].uri):
        with pytest.raises(CheckpointIncompleteError) as caught:
            resolve_checkpoint(spec, store)
        message = str(caught.value)
        assert message.startswith(f"{refs[3].uri} has no manifest.json, so its upload never finished.")
        assert f"Latest complete checkpoint of run 'run' is step 300 ({refs[2].uri})" in message
        assert f"or delete {refs[3].uri}" in message


def test_a_run_with_only_an_unfinished_upload_says_that(memory):
    memory.put_bytes("runs/run/checkpoints/step-00000100-0123456789ab/model.safetensors", b"1")
    with pytest.raises(CheckpointIncompleteError, match="no complete checkpoint: start it again"):
        resolve_checkpoint("run", memory)


def test_a_stage_on_two_lines_follows_the_head_or_is_ambiguous(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    branch = add(run, tmp_path, "cycle-2", 300, refs[1], variant="lower lr")
    for spec in ("run@cycle-2", "run@step-300"):
        with pytest.raises(CheckpointAmbiguousError) as caught:
            resolve_checkpoint(spec, memory)
        assert refs[2].uri in str(caught.value)
        assert branch.uri in str(caught.value)
    assert resolve_checkpoint("run@cycle-1", memory) == refs[1]  # before the lines part
    with pytest.raises(CheckpointAmbiguousError, match=refs[3].prefix):
        resolve_checkpoint("run@cycle-3", memory)  # only one exists, on one of two lines: still a guess
    run.set_head(branch)
    assert resolve_checkpoint("run@cycle-2", memory) == branch
    with pytest.raises(CheckpointAmbiguousError, match=refs[3].prefix):
        resolve_checkpoint("run@cycle-3", memory)
    assert resolve_checkpoint(refs[3].uri, memory) == refs[3]


def test_a_dataset_is_found_by_its_whole_id(store, tmp_path):
    dataset_id = "ab" * 32
    directory = write_files(tmp_path / "data", "data")
    assert find_dataset(store, "corpus", dataset_id) is None
    manifest = dataset_manifest(directory, dataset_id=dataset_id)
    commit_bundle(store, dataset_prefix("corpus", dataset_id), directory, manifest)
    assert find_dataset(store, "corpus", dataset_id) == manifest
    assert find_dataset(store, "other", dataset_id) is None
    with pytest.raises(CheckpointCorruptError, match="not abababababababab0"):
        find_dataset(store, "corpus", dataset_id[:16] + "0" * 48)
    with pytest.raises(ConfigError, match="dataset name"):
        dataset_prefix("../x", dataset_id)


def test_what_the_store_holds_of_a_head_can_be_read_by_people(memory, tmp_path):
    run, refs = straight_run(memory, tmp_path)
    run.set_head(refs[0])
    record = json.loads(memory.get_bytes("runs/run/refs/head.json")[0])
    assert {key: record[key] for key in ("checkpoint", "step", "fingerprint")} == {
        "checkpoint": refs[0].prefix,
        "step": 100,
        "fingerprint": refs[0].fingerprint,
    }
