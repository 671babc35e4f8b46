"""Prunes and commits that crash anywhere, and random lives of runs: nothing protected is lost."""

import json
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from bundles import FILES, write_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pruning import LAST, NOW, add, keys_at, litter, stages, straight_run, with_dataset

from relora_train.checkpoints.fetch import verify_bundle
from relora_train.checkpoints.holder import Holder
from relora_train.checkpoints.lease import read_lease
from relora_train.checkpoints.lineage import Tombstone
from relora_train.checkpoints.pins import pin, unpin
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy, stage_number
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import PreconditionFailedError, RunInUseError, StoreUnavailableError
from relora_train.storage.base import ObjectStore
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store


class Crash(BaseException):
    pass


class CrashingStore:
    """Passes everything on; dies before or after its n-th write or delete, and for good."""

    def __init__(self, store: ObjectStore, crash_at: int, *, after: bool) -> None:
        self._store, self._crash_at, self._after = store, crash_at, after
        self.operations: list[str] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("put_bytes", "put_file", "delete", "abort_stale_uploads"):
            return method

        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return method(*args, **kwargs)
            with self._lock:
                self.operations.append(f"{name} {args[0]}")
                number = len(self.operations) - 1
            if number > self._crash_at or (number == self._crash_at and not self._after):
                raise Crash
            result = method(*args, **kwargs)
            if number == self._crash_at:
                raise Crash
            return result

        return counted


def copied(template: ObjectStore, fresh: Any) -> ObjectStore:
    """A new store with the same objects, made faster than by committing them again."""
    store = fresh()
    if store.uri.startswith("file"):
        shutil.copytree(template.uri.removeprefix("file://"), store.uri.removeprefix("file://"))
        return store
    for info in template.list():
        store.put_bytes(info.key, template.get_bytes(info.key)[0])
    return store


def crash_everywhere(work: Any, fresh: Any, check: Any, *, step: int = 1) -> int:
    """Run `work` on fresh stores with a crash before and after every step-th write and delete, then `check`."""
    number = 0
    while True:
        for after in (False, True):
            store = fresh()
            crashing = CrashingStore(store, number, after=after)
            try:
                work(crashing)
            except Crash:
                check(store, crashing.operations)
            else:
                return number
        number += step


@pytest.fixture(params=("local", "memory", "s3"))
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    base = request.getfixturevalue("s3_store_uri") if request.param == "s3" else str(tmp_path / "stores")
    if request.param == "memory":
        base = f"memory://{uuid.uuid4().hex}"
    return lambda: open_store(f"{base}/{uuid.uuid4().hex[:8]}")


def dead_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in these tests leaves this process alive; let its leases look as those of the dead do."""
    monkeypatch.setattr(Holder, "is_alive", lambda self: False)


@pytest.mark.parametrize("rival", [False, True], ids=["alone", "beside another's leftovers"])
def test_a_commit_that_crashed_anywhere_is_completed_by_the_next(fresh, files, tmp_path, rival):
    other = write_files(tmp_path / "other", "other")

    def prepared() -> ObjectStore:
        store = fresh()
        with_dataset(store, files)
        if rival:
            with pytest.raises(Crash):
                add(CrashingStore(store, 3, after=False), other, 0, None)
        return store

    def check(store: ObjectStore, operations: list[str]) -> None:
        for ref in CheckpointStore(store, "run").list():
            verify_bundle(store, ref.prefix, ref.manifest)
        add(store, files, 0, None)
        assert stages(store) == ["warm-start"], operations
        prune_run(store, "run", LAST, grace=NOW)
        assert verify_run(store, "run").findings == [], operations

    tried = crash_everywhere(lambda store: add(store, files, 0, None), prepared, check, step=_step(fresh))
    assert tried >= len(FILES) + 2


def test_a_prune_that_crashed_anywhere_is_completed_by_the_next(fresh, files, monkeypatch):
    dead_holders(monkeypatch)
    template = fresh()
    refs = straight_run(template, files, cycles=1)
    litter(template, refs)

    def prepared() -> ObjectStore:
        return copied(template, fresh)

    def check(store: ObjectStore, operations: list[str]) -> None:
        run = CheckpointStore(store, "run")
        left = {info.key.removeprefix(f"{refs[0].prefix}/") for info in store.list(f"{refs[0].prefix}/")}
        assert "claim.json" in left or left == {"deleted.json"}, "a name was free while files lay under it"
        assert run.latest().manifest.stage == "cycle-1"
        for ref in run.list():
            verify_bundle(run.store, ref.prefix, ref.manifest)
        prune_run(store, "run", LAST, grace=NOW)
        assert stages(store) == ["cycle-1"], operations
        assert [ref.manifest.stage for ref in run.history()] == ["warm-start", "cycle-1"]
        assert verify_run(store, "run").findings == [], operations
        assert list(store.list("preflight/")) == [] or "preflight" in " ".join(operations)

    tried = crash_everywhere(lambda store: prune_run(store, "run", LAST, grace=NOW), prepared, check, step=_step(fresh))
    assert tried >= len(FILES) + 3


def test_a_removal_that_crashed_at_its_tombstone_is_taken_back_for_who_needs_it_now(fresh, files, monkeypatch):
    dead_holders(monkeypatch)
    store = fresh()
    refs = straight_run(store, files, cycles=1)
    crashing = CrashingStore(store, 1, after=True)  # lease, tombstone
    with pytest.raises(Crash):
        prune_run(crashing, "run", LAST)
    assert crashing.operations[1].endswith("deleted.json")
    store.put_bytes("runs/run/refs/late.json", json.dumps({"checkpoint": refs[0].prefix}).encode())
    assert prune_run(store, "run", LAST).removed == []
    assert verify_run(store, "run").findings == []


def test_a_removal_that_was_killed_is_finished_wherever_in_the_run_it_was(memory, files):
    refs = straight_run(memory, files, cycles=3)
    for ref in refs[1:3]:
        memory.put_bytes(f"{ref.prefix}/deleted.json", Tombstone(reason="x", manifest=ref.manifest).to_bytes())
        memory.delete(f"{ref.prefix}/manifest.json")
    prune_run(memory, "run", None)
    assert [keys_at(memory, ref) for ref in refs[1:3]] == [["deleted.json"]] * 2
    assert stages(memory) == ["warm-start", "cycle-3"]


def test_a_removal_is_taken_back_also_where_the_files_lie_beside_the_manifest(memory, files):
    refs = straight_run(memory, files, cycles=1)
    for name in ("manifest.json", "claim.json"):
        memory.delete(f"{refs[0].prefix}/{name}")
    memory.put_bytes(f"{refs[0].prefix}/claim.json", b'{"content": "of another attempt"}')
    variant = add(memory, files, 0, None)
    assert variant.manifest.files_prefix
    tombstone = Tombstone(reason="x", manifest=variant.manifest)
    memory.put_bytes(f"{variant.prefix}/deleted.json", tombstone.to_bytes())
    memory.put_bytes("runs/run/refs/late.json", json.dumps({"checkpoint": variant.prefix}).encode())
    assert prune_run(memory, "run", LAST).removed == []
    verify_bundle(memory, variant.prefix, variant.manifest)
    assert "deleted.json" not in keys_at(memory, variant)


def test_a_commit_overtaken_by_a_prune_is_taken_back(memory, files):
    """The one order in which a manifest could come to list files that a prune deleted."""
    refs = straight_run(memory, files, cycles=1)
    manifest = memory.get_bytes(f"{refs[0].prefix}/manifest.json")[0]
    memory.delete(f"{refs[0].prefix}/manifest.json")

    class Overtaken(CrashingStore):
        def put_bytes(self, key: str, data: bytes, **conditions: Any) -> str:
            if key.endswith("manifest.json"):
                memory.put_bytes(key, manifest)
                prune_run(memory, "run", LAST)
            return memory.put_bytes(key, data, **conditions)

    with pytest.raises(PreconditionFailedError, match="was removed by"):
        add(Overtaken(memory, 10**6, after=False), files, 0, None)
    assert stages(memory) == ["cycle-1"]
    prune_run(memory, "run", LAST)
    assert verify_run(memory, "run").findings == []


def _step(fresh: Any) -> int:
    return 6 if fresh().uri.startswith("s3") else 1


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_in_random_lives_of_runs_nothing_protected_is_lost_and_verify_finds_nothing(files, monkeypatch, data):
    dead_holders(monkeypatch)
    store = open_store(f"memory://{uuid.uuid4().hex}")
    with_dataset(store, files)
    pinned: set[str] = set()
    for number in range(data.draw(st.integers(1, 12))):
        runs = ("a", "b")
        everything = [ref for run_id in runs for ref in CheckpointStore(store, run_id).list()]
        run_id = data.draw(st.sampled_from(runs))
        match data.draw(st.sampled_from(("train", "train", "train", "pin", "unpin", "prune", "crash"))):
            case "train":
                parent = data.draw(st.sampled_from([None, *everything]))
                cycle = stage_number(parent.manifest.stage) + 1 if parent else 0
                add(store, files, cycle, parent, run_id, variant=str(number))
            case "pin" if everything:
                ref = data.draw(st.sampled_from(everything))
                pin(store, ref)
                pinned.add(ref.prefix)
            case "unpin" if pinned:
                prefix = data.draw(st.sampled_from(sorted(pinned)))
                unpin(store, next(ref for ref in everything if ref.prefix == prefix))
                pinned.discard(prefix)
            case "prune" | "crash" as act if list(store.list(f"runs/{run_id}/checkpoints/")):
                policy = RetentionPolicy(data.draw(st.integers(1, 3)), data.draw(st.none() | st.integers(1, 3)))
                crash_at = data.draw(st.integers(0, 20)) if act == "crash" else 10**6
                try:
                    prune_run(CrashingStore(store, crash_at, after=data.draw(st.booleans())), run_id, policy)
                except Crash:
                    prune_run(store, run_id, policy)
                after = {ref.prefix for each in runs for ref in CheckpointStore(store, each).list()}
                parents = {ref.manifest.parent.uri for ref in everything if ref.manifest.parent}
                for ref in everything:
                    others = [
                        child for child in everything
                        if child.manifest.parent and child.manifest.parent.uri == ref.uri
                        and child.manifest.run_id != ref.manifest.run_id
                    ]  # fmt: skip
                    if ref.prefix in pinned or ref.uri not in parents or others or ref.manifest.run_id != run_id:
                        assert ref.prefix in after
    for run_id in ("a", "b"):
        if list(store.list(f"runs/{run_id}/")):
            assert verify_run(store, run_id).findings == []


@pytest.mark.parametrize(("lease", "first", "next_one"), [("prune.json", 4, 5), ("lease.json", 1, 0)])
def test_a_prune_that_lost_its_lease_stops_inside_a_group_of_leftovers(files, monkeypatch, lease, first, next_one):
    now = [0.0]
    monkeypatch.setattr("relora_train.checkpoints.lease._seconds", lambda: now[0])

    class Overtaken(MemoryStore):
        def delete(self, key: str) -> None:
            super().delete(key)
            if key == keys[first]:
                now[0] += 3600
                held, _ = read_lease(self, f"runs/run/{lease}")
                rival = held.model_copy(update={"holder": held.holder.model_copy(update={"nonce": "a rival's"})})
                self.put_bytes(f"runs/run/{lease}", rival.to_bytes())

    store = Overtaken("overtaken")
    keys = litter(store, straight_run(store, files, cycles=2))
    with pytest.raises(RunInUseError, match="This process lost"):
        prune_run(store, "run", None, grace=NOW)
    assert not store.head(keys[first]) and store.head(keys[next_one])


def test_an_outage_during_a_prune_is_an_error_that_may_be_retried(memory, files):
    straight_run(memory, files)

    class Out(CrashingStore):
        def delete(self, key: str) -> None:
            raise StoreUnavailableError("out")

    with pytest.raises(StoreUnavailableError):
        prune_run(Out(memory, 10**6, after=False), "run", LAST)
    prune_run(memory, "run", LAST)
    assert verify_run(memory, "run").findings == []
