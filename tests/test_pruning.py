"""Nothing that anything depends on is ever removed, and a prune can be killed anywhere and run again."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bundles import FILES, checkpoint_manifest, dataset_manifest
from hypothesis import given
from hypothesis import strategies as st

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.holder import Holder
from relora_train.checkpoints.layout import checkpoint_prefix
from relora_train.checkpoints.lease import hold_run, lease_key, take_lease
from relora_train.checkpoints.lineage import CheckpointRef, line_to, make_ref
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.pins import find_pinned, pin, pins_in, record_export, unpin
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy, plan_pruning, stage_number
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    PreconditionFailedError,
    RunInUseError,
    StorageError,
)
from relora_train.storage.base import ObjectStore
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

NOW = timedelta(seconds=-1)
"""As a grace period: everything is old enough."""
LAST = RetentionPolicy(keep_last=1)


def with_dataset(store: ObjectStore, files: Path) -> str:
    commit_bundle(store, "datasets/corpus/d", files, dataset_manifest(files))
    return f"{store.uri}/datasets/corpus/d"


def add(store: ObjectStore, files: Path, number: int, parent: CheckpointRef | None, run_id: str = "run", **more: str):
    """The checkpoint of warm start (0) or of a cycle."""
    stage = f"cycle-{number}" if number else "warm-start"
    manifest = checkpoint_manifest(
        files, run_id=run_id, step=100 * (number + 1), stage=stage, parent=parent,
        work=f"{run_id} {stage} {more.get('variant', '')} {parent and parent.fingerprint}",
    )  # fmt: skip
    dataset = f"{store.uri}/datasets/corpus/d"
    manifest = manifest.model_copy(update={"cycle": number, "dataset_uri": dataset})
    return CheckpointStore(store, run_id).commit(files, manifest)


def straight_run(store: ObjectStore, files: Path, cycles: int = 5, run_id: str = "run") -> list[CheckpointRef]:
    with_dataset(store, files)
    refs: list[CheckpointRef] = []
    for number in range(cycles + 1):
        refs.append(add(store, files, number, refs[-1] if refs else None, run_id))
    CheckpointStore(store, run_id).set_head(refs[-1])
    return refs


def stages(store: ObjectStore, run_id: str = "run") -> list[str]:
    return [ref.manifest.stage for ref in CheckpointStore(store, run_id).list()]


def keys_at(store: ObjectStore, ref: CheckpointRef) -> list[str]:
    return [info.key.removeprefix(f"{ref.prefix}/") for info in store.list(f"{ref.prefix}/")]


# --- the policy: pure ---


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[CheckpointRef], dict[str, tuple[str, ...]], RetentionPolicy]:
    """Trees of checkpoints, some removed earlier, some protected; a policy."""
    count = draw(st.integers(1, 14))
    refs: list[CheckpointRef] = []
    for index in range(count):
        parent = refs[draw(st.integers(0, index - 1))] if index and draw(st.integers(0, 9)) else None
        number = stage_number(parent.manifest.stage) + 1 if parent else 0
        manifest = checkpoint_manifest(
            EMPTY, step=100 * (number + 1), stage=f"cycle-{number}" if number else "warm-start",
            parent=parent, work=f"work {index}",
        )  # fmt: skip
        refs.append(make_ref(MemoryStore("m"), checkpoint_prefix("run", manifest.step, manifest.fingerprint), manifest))
    removed = draw(st.sets(st.integers(0, count - 1)))
    history = [CheckpointRef(**{**vars(ref), "is_pruned": index in removed}) for index, ref in enumerate(refs)]
    protected = {history[index].prefix: ("pinned",) for index in draw(st.sets(st.integers(0, count - 1)))}
    last, every = draw(st.none() | st.integers(1, 4)), draw(st.none() | st.integers(1, 4))
    return history, protected, RetentionPolicy(last if last or every else 1, every)


EMPTY = Path("no such directory")


@given(histories())
def test_for_any_history_and_policy_what_is_needed_stays(drawn):
    history, protected, policy = drawn
    verdicts = plan_pruning(history, policy, protected)
    present = [ref for ref in history if not ref.is_pruned]
    kept = [verdict.checkpoint for verdict in verdicts if verdict.keep]
    assert [verdict.checkpoint for verdict in verdicts] == present
    assert bool(present) == bool(kept)
    ancestors = {one.prefix for ref in present for one in line_to(ref, history)[:-1]}
    for verdict in verdicts:
        ref = verdict.checkpoint
        if ref.prefix in protected or ref.prefix not in ancestors:
            assert verdict.keep
        if policy.keep_every and stage_number(ref.manifest.stage) % policy.keep_every == 0:
            assert verdict.keep
        following = [end for end in present if ref in line_to(end, history)]
        between = [
            sum(not one.is_pruned for one in line_to(end, history)) - _position(ref, end, history)
            for end in following
            if end.prefix not in ancestors
        ]
        if policy.keep_last and between and min(between) < policy.keep_last:
            assert verdict.keep


def _position(ref: CheckpointRef, end: CheckpointRef, history: list[CheckpointRef]) -> int:
    line = [one.prefix for one in line_to(end, history) if not one.is_pruned]
    return line.index(ref.prefix) + 1


@given(histories())
def test_planning_after_pruning_removes_nothing_more(drawn):
    history, protected, policy = drawn
    gone = {verdict.checkpoint.prefix for verdict in plan_pruning(history, policy, protected) if not verdict.keep}
    after = [CheckpointRef(**{**vars(ref), "is_pruned": ref.is_pruned or ref.prefix in gone}) for ref in history]
    assert all(verdict.keep for verdict in plan_pruning(after, policy, protected))


def test_a_stage_counts_as_the_cycles_done_at_its_end():
    numbers = {name: stage_number(name) for name in ("warm-start", "lora", "cycle-1", "cycle-12", "full-3")}
    assert numbers == {"warm-start": 0, "lora": 1, "cycle-1": 1, "cycle-12": 12, "full-3": 3}


def test_a_policy_without_a_rule_is_none():
    for last, every in ((None, None), (0, None), (None, 0), (-1, 2)):
        with pytest.raises(ConfigError, match="no retention policy"):
            RetentionPolicy(last, every)


# --- the whole, on stores ---


def test_every_so_many_cycles_may_be_the_only_rule(memory, files):
    refs = straight_run(memory, files)
    report = prune_run(memory, "run", RetentionPolicy(keep_every=3))
    assert report.removed == [refs[1], refs[2], refs[4]]
    assert report.verdicts[0].reasons == report.verdicts[3].reasons == ("every 3 cycles",)


def test_the_policy_is_applied_and_what_stays_is_whole(store, files):
    refs = straight_run(store, files)
    report = prune_run(store, "run", RetentionPolicy(keep_last=2, keep_every=3), dry_run=True)
    assert stages(store) == [ref.manifest.stage for ref in refs]
    done = prune_run(store, "run", RetentionPolicy(keep_last=2, keep_every=3))
    assert done.removed == report.removed == [refs[1], refs[2]]
    assert done.removed_bytes == 2 * sum(FILES.values())
    assert stages(store) == ["warm-start", "cycle-3", "cycle-4", "cycle-5"]
    assert [keys_at(store, ref) for ref in refs[1:3]] == [["deleted.json"]] * 2
    assert verify_run(store, "run").findings == []
    before = list(store.list("runs/run/checkpoints/"))
    again = prune_run(store, "run", RetentionPolicy(keep_last=2, keep_every=3))
    assert (again.removed, again.leftovers, list(store.list("runs/run/checkpoints/"))) == ([], (), before)


def test_a_line_with_removed_checkpoints_is_still_one_line(memory, files):
    refs = straight_run(memory, files)
    prune_run(memory, "run", RetentionPolicy(keep_last=1, keep_every=2))
    run = CheckpointStore(memory, "run")
    assert run.latest() == refs[5]
    assert list(run.ancestry(refs[5])) == [refs[0], refs[2], refs[4], refs[5]]
    assert run.set_head(refs[2]) == refs[5]  # repeating old work does not send the run back
    assert resolve_checkpoint("run@cycle-2", memory) == refs[2]
    found = run.find_pruned(refs[1].fingerprint)
    assert found is not None and found.is_pruned and found.prefix == refs[1].prefix
    for name in ("run@cycle-1", refs[1].uri):
        with pytest.raises(CheckpointNotFoundError, match="was removed by `relora prune`"):
            resolve_checkpoint(name, memory)


def test_a_removed_checkpoint_is_not_committed_again_until_its_tombstone_is_deleted(store, files):
    refs = straight_run(store, files, cycles=2)
    prune_run(store, "run", LAST)
    with pytest.raises(PreconditionFailedError, match=r"another run id, or delete .*deleted\.json"):
        add(store, files, 1, refs[0])
    assert keys_at(store, refs[1]) == ["deleted.json"]
    store.delete(f"{refs[1].prefix}/deleted.json")
    assert add(store, files, 1, refs[0]).prefix == refs[1].prefix
    assert verify_run(store, "run").findings == []


def test_a_removed_end_of_which_nothing_is_left_is_not_taken_for_done(memory, files):
    refs = straight_run(memory, files, cycles=2)
    prune_run(memory, "run", LAST)
    for info in list(memory.list(refs[2].prefix)):
        memory.delete(info.key)
    with pytest.raises(CheckpointNotFoundError, match="was removed by"):
        CheckpointStore(memory, "run").find_pruned(refs[1].fingerprint)


def snapshot(store: ObjectStore, parent: CheckpointRef, stage: str = "ab" * 6) -> str:
    prefix = f"runs/{parent.manifest.run_id}/snapshots/{stage}/step-00000350"
    store.put_bytes(f"{prefix}/state.safetensors", b"x")
    record = {"kind": "snapshot", "files": [], "attempt": "1", "parent": {"uri": parent.uri, "step": 1}}
    store.put_bytes(f"{prefix}/manifest.json", json.dumps(record).encode())
    return prefix


def test_everything_that_depends_on_a_checkpoint_keeps_it_across_runs(store, files):
    refs = straight_run(store, files, cycles=7)
    branch = add(store, files, 1, refs[0], variant="branch")
    add(store, files, 4, refs[3], run_id="other")
    snapshot(store, refs[2])
    pin(store, refs[1], "best")
    record_export(store, refs[4], "/exports/x")
    store.put_bytes("runs/run/refs/head.json", json.dumps({"checkpoint": refs[6].prefix}).encode())
    with hold_run(store, "third", depends_on=[refs[5].uri]):
        report = prune_run(store, "run", LAST)
    reasons = {verdict.checkpoint.prefix: ", ".join(verdict.reasons) for verdict in report.verdicts}
    assert reasons == {
        refs[0].prefix: "", refs[1].prefix: "pinned as best", branch.prefix: "the end of a line",
        refs[2].prefix: "a snapshot of run run started from it", refs[3].prefix: "run other branches from it",
        refs[4].prefix: "exported", refs[5].prefix: "run third started from it",
        refs[6].prefix: "the head of run run", refs[7].prefix: "the end of a line",
    }  # fmt: skip
    assert verify_run(store, "run").findings == []


def test_a_snapshot_that_does_not_say_what_it_started_from_keeps_all_that_it_may_have(memory, files):
    straight_run(memory, files, cycles=4)
    record = {"kind": "snapshot", "files": [], "attempt": "1", "step": 350}  # between cycle-2 and cycle-3
    memory.put_bytes(f"runs/run/snapshots/{'ab' * 6}/s/manifest.json", json.dumps(record).encode())
    assert [ref.manifest.stage for ref in prune_run(memory, "run", LAST).removed] == ["cycle-3"]


def test_a_pin_goes_by_its_name_and_holds_one_checkpoint(memory, files):
    refs = straight_run(memory, files, cycles=2)
    assert pin(memory, refs[0], "best") == pin(memory, refs[0], "best") == "best"
    with pytest.raises(ConfigError, match="already holds"):
        pin(memory, refs[1], "best")
    for bad in ("head", "A", "../x", ""):
        with pytest.raises(ConfigError) if bad else pytest.MonkeyPatch.context():
            pin(memory, refs[0], bad)
    assert list(pins_in(memory, "run").values()).count(refs[0].prefix) == 2
    assert find_pinned(memory, "run", "best") == refs[0] and find_pinned(memory, "run", "head") is None
    with pytest.raises(ConfigError, match=f"{re.escape(refs[0].uri)} is pinned as 'best'"):
        unpin(memory, refs[1], "best")
    unpin(memory, refs[0], "best")
    unpin(memory, refs[0])
    with pytest.raises(ConfigError, match="no pin"):
        unpin(memory, refs[0])
    assert prune_run(memory, "run", LAST).removed == refs[:2]
    with pytest.raises(CheckpointNotFoundError, match="was removed"):
        pin(memory, refs[0])
    assert refs[0].prefix not in pins_in(memory, "run").values()


def test_what_cannot_be_read_may_protect_anything(memory, files):
    straight_run(memory, files)
    for key in ("runs/x/refs/head.json", "runs/x/lease.json", "runs/x/snapshots/abababababab/1/manifest.json"):
        memory.put_bytes(key, b"not json")
        with pytest.raises(CheckpointCorruptError, match="nothing is removed"):
            prune_run(memory, "run", LAST)
        memory.delete(key)
    assert len(stages(memory)) == 6


class Interfering:
    """A store in which something happens right after a tombstone is written."""

    def __init__(self, store: ObjectStore, action: Any, tombstone: str = "deleted.json") -> None:
        self._store, self._action, self._tombstone = store, action, tombstone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_bytes(self, key: str, data: bytes, **conditions: Any) -> str:
        etag = self._store.put_bytes(key, data, **conditions)
        if key.endswith(self._tombstone):
            self._action()
        return etag


def test_who_begins_to_depend_on_a_checkpoint_while_it_is_being_removed_keeps_it_or_is_told(memory, files):
    refs = straight_run(memory, files, cycles=1)
    record = json.dumps({"checkpoint": refs[0].prefix}).encode()
    late = Interfering(memory, lambda: memory.put_bytes("runs/run/refs/late.json", record))
    report = prune_run(late, "run", LAST)
    assert report.verdicts[0].reasons == ("pinned as late",)
    assert verify_run(memory, "run").findings == []
    memory.delete("runs/run/refs/late.json")

    def refused() -> None:
        for attempt in (
            lambda: pin(memory, refs[0]),
            lambda: hold_run(memory, "b", depends_on=[refs[0].uri]).__enter__(),
        ):
            with pytest.raises(CheckpointNotFoundError, match="was removed"):
                attempt()
        memory.delete(lease_key("b"))

    assert prune_run(Interfering(memory, refused), "run", LAST).removed == [refs[0]]


def test_two_prunes_of_a_run_do_not_run_at_once(memory, files):
    straight_run(memory, files)
    other = take_lease(memory, "runs/run/prune.json", "x", purpose="prune")
    with pytest.raises(RunInUseError, match="Pruning of run 'run' is in use"):
        prune_run(memory, "run", LAST)
    other.release()
    assert prune_run(memory, "run", LAST).removed


@pytest.mark.parametrize("linked", ["runs", "runs/run", "runs/run/checkpoints", "runs/run/snapshots"])
def test_a_link_out_of_the_store_is_not_followed(linked, tmp_path, files):
    inside, outside = tmp_path / "store", tmp_path / "outside"
    store = open_store(inside)
    straight_run(store, files, cycles=2)
    store.put_bytes("runs/run/snapshots/0123456789ab/step-850/state.safetensors", b"x")
    (inside / linked).rename(outside)
    (inside / linked).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(StorageError, match=r"symbolic link leads to .*outside.*Nothing was removed"):
            prune_run(store, "run", LAST, grace=NOW, dry_run=dry_run)
    assert sorted(outside.rglob("*")) == before


def test_a_link_below_a_run_is_no_checkpoint_and_a_linked_store_is_its_own(tmp_path, files):
    store = open_store(tmp_path / "store")
    refs = straight_run(store, files, cycles=2)
    place, outside = tmp_path / "store" / refs[0].prefix, tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "store")
    prune_run(open_store(tmp_path / "link"), "run", LAST, grace=NOW)
    assert sorted(outside.rglob("*")) == before
    assert [ref.stage for ref in (known.manifest for known in CheckpointStore(store, "run").list())] == ["cycle-2"]


# --- leftovers ---


def litter(store: ObjectStore, refs: list[CheckpointRef]) -> list[str]:
    """An upload that never got its manifest, a file beside a manifest, snapshots of a committed stage."""
    keys = [
        "runs/run/checkpoints/step-00000900-0123456789ab/claim.json",
        "runs/run/checkpoints/step-00000900-0123456789ab/model.safetensors",
        f"{refs[1].prefix}/variant-0123456789abcdef/model.safetensors",
        f"runs/run/snapshots/{'cd' * 6}/step-1/state.safetensors",
    ]
    for key in keys:
        store.put_bytes(key, b"left over")
    finished = snapshot(store, refs[0], refs[1].fingerprint[:12])
    return [*keys, f"{finished}/manifest.json", f"{finished}/state.safetensors"]


def test_leftovers_go_when_they_are_old_and_not_before(store, files):
    refs = straight_run(store, files, cycles=2)
    keys = litter(store, refs)
    assert len(verify_run(store, "run").findings) == 4
    assert prune_run(store, "run", None).leftovers == ()
    assert all(store.head(key) for key in keys)
    sizes = sum(store.head(key).size_bytes for key in keys)
    before = list(store.list())
    planned = prune_run(store, "run", None, grace=NOW, dry_run=True)
    assert list(store.list()) == before
    done = prune_run(store, "run", None, grace=NOW)
    assert done.leftovers == planned.leftovers and sum(left.object_count for left in done.leftovers) == len(keys)
    places = {f"{store.uri}/{key.rpartition('/')[0]}" for key in keys}
    assert all(any(place.startswith(left.uri) for place in places) for left in done.leftovers)
    assert done.removed_bytes == sum(left.size_bytes for left in done.leftovers) == sizes
    assert not any(store.head(key) for key in keys)
    assert stages(store) == ["warm-start", "cycle-1", "cycle-2"]
    assert verify_run(store, "run").findings == []


def test_the_claim_of_an_upload_goes_last_and_the_manifest_of_a_snapshot_first(files):
    """Killed in between, nothing is left that promises files which are gone."""

    class Recording(MemoryStore):
        deleted: tuple[str, ...] = ()

        def delete(self, key: str) -> None:
            self.deleted += (key,)
            super().delete(key)

    store = Recording("recording")
    keys = litter(store, straight_run(store, files, cycles=2))
    prune_run(store, "run", None, grace=NOW)
    order = [store.deleted.index(key) for key in keys]
    assert order[0] > order[1], "claim, file"
    assert order[4] < order[5], "manifest, file"


def test_what_a_flow_could_still_finish_stays_while_it_is_under_way(memory, files, monkeypatch):
    keys = litter(memory, straight_run(memory, files, cycles=2))
    with hold_run(memory, "run"):
        planned = prune_run(memory, "run", None, grace=NOW, dry_run=True)
        assert planned.notes == ("2 unfinished uploads stay while a flow of the run is under way",)
        assert len(planned.leftovers) == 2
        for alive in (True, None):
            monkeypatch.setattr(Holder, "is_alive", lambda self, alive=alive: alive)
            report = prune_run(memory, "run", None, grace=timedelta(0) if alive is None else NOW)
            assert "while a flow of the run is under way" in " ".join(report.notes) or alive is None
            if alive:
                assert memory.head(keys[0]) and memory.head(keys[3]) and not memory.head(keys[2])


def test_an_upload_goes_whose_flow_was_not_heard_of_for_the_grace_period(memory, files, monkeypatch):
    keys = litter(memory, straight_run(memory, files, cycles=2))
    with hold_run(memory, "run"):
        monkeypatch.setattr(Holder, "is_alive", lambda self: None)
        report = prune_run(memory, "run", None, grace=NOW)
    assert report.notes == () and not any(memory.head(key) for key in keys)


def test_half_uploads_go_when_they_are_old(store, tmp_path, seaweed, files):
    straight_run(store, files, cycles=1)
    if store.uri.startswith("s3"):
        bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
        client = seaweed.client()
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/runs/run/checkpoints/x/y")
        client.close()
    elif store.uri.startswith("file"):
        (tmp_path / "store/runs/run/checkpoints/x").mkdir()
        (tmp_path / "store/runs/run/checkpoints/x/.tmp-0123456789abcdef").touch()
    else:
        return
    assert prune_run(store, "run", None).leftovers == ()
    (found,) = prune_run(store, "run", None, grace=timedelta(seconds=-5)).leftovers
    assert "runs/run/checkpoints/x/" in found.uri and found.why == "half an upload"
    assert (found.size_bytes, found.object_count) == (0, 1)
    assert prune_run(store, "run", None, grace=timedelta(seconds=-5)).leftovers == ()
    assert not store.abort_stale_uploads(datetime.now(UTC) + timedelta(hours=1))
