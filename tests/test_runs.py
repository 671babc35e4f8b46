"""`relora runs` and `relora delete`: what a store tells of its runs, and how one of them goes."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import commit_run, synthetic_profile

from relora_train import events
from relora_train.checkpoints.lease import hold_run, lease_key, read_lease
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.pins import pin, unpin
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import promote
from relora_train.checkpoints.status import RunStatus, read_status, status_key
from relora_train.checkpoints.upkeep.deletion import delete_run, survey_run
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.cli.app import _RENAMED, command_line
from relora_train.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DivergedError,
    RunInUseError,
    StoreUnavailableError,
    TrainerInterruptedError,
)
from relora_train.method.stages import plan_stages
from relora_train.runs.reporting import MAX_RECORDS, RunReporter, add_record
from relora_train.runs.survey import state_of, survey_runs
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

STAGES = plan_stages(synthetic_profile())


def progress(step: int, loss: float, stage: str = "warm-start") -> dict[str, Any]:
    numbers = {"learning_rate": 1e-3, "tokens_per_second": 1e3, "data_wait_share": 0.0, "eta_seconds": 9.0}
    place = {"stage": stage, "step": step, "start_step": 0, "end_step": 40}
    return {"event": "progress", **place, "loss": loss, **numbers}


def reported(store: ObjectStore, *told: dict[str, Any], error: BaseException | None = None) -> RunStatus:
    """The status that is stored after a flow of run 'tale' whose events were these."""
    reporter = RunReporter(store, "tale", "synthetic", STAGES)
    reporter.__enter__()
    for event in told:
        events.emit(**event)
    reporter.__exit__(type(error) if error else None, error, None)
    status = read_status(store, "tale")
    assert status is not None
    return status


SCORED = {"event": "evaluation", "val_loss": 1.0}  # of a checkpoint, by the evaluation task
STARTED = {"event": "stage_started", "stage": "warm-start"}


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "done", ""),
        (KeyboardInterrupt(), "interrupted", ""),
        (TrainerInterruptedError("Stopped."), "interrupted", ""),
        (DivergedError("The loss is nan.\nMore."), "diverged", "The loss is nan."),
        (ConfigError("No s3://name:secret@host/x."), "failed", "No s3://host/x."),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)
def test_a_status_says_how_a_flow_ended_without_secrets(
    memory: ObjectStore, error: BaseException | None, state: str, message: str
):
    status = reported(memory, STARTED, progress(7, 5.0), error=error)
    assert (status.state, status.message, status.stage, status.progress["step"]) == (state, message, "warm-start", 7)
    assert status.stages == {"warm-start": 40, "cycle-1": 80, "cycle-2": 120, "cycle-3": 160}


def test_the_records_of_a_stage_are_kept_until_it_is_stored_and_a_resumed_one_goes_on_with_them(memory: ObjectStore):
    merge = {"event": "merge", "stage": "warm-start", "step": 40, "cycle": 0}
    finished = {"event": "stage_finished", "stage": "warm-start", "step": 40, "uri": None}
    first = reported(memory, STARTED, progress(5, 5.0), progress(6, 5.0), progress(10, 4.0), merge, SCORED, finished)
    assert [(one["kind"], one["step"]) for one in first.records] == [("train", 5), ("train", 10), ("merge", 40)]
    again = reported(memory, STARTED, {"event": "resumed", "stage": "warm-start", "step": 5}, progress(9, 4.5))
    assert [one["step"] for one in again.records] == [5, 9]
    anew = reported(memory, STARTED, progress(3, 6.0))
    assert [one["step"] for one in anew.records] == [3]
    stored = {"event": "checkpoint_stored", "stage": "warm-start", "step": 40, "uri": "s3://x"}
    assert reported(memory, STARTED, progress(3, 6.0), stored).records == ()


def test_the_records_of_a_long_stage_are_thinned_and_span_all_of_it():
    records: list[dict[str, Any]] = []
    for step in range(1, 5 * MAX_RECORDS):
        add_record(records, progress(step, 1 / step))
        assert len(records) <= MAX_RECORDS
    assert records[0]["step"] < MAX_RECORDS / 2 < 4 * MAX_RECORDS < records[-1]["step"] == 5 * MAX_RECORDS - 1


def test_a_store_that_refuses_a_status_costs_a_run_one_warning(memory: ObjectStore, caplog: pytest.LogCaptureFixture):
    class Full:
        uri = memory.uri

        def get_bytes(self, key: str) -> Any:
            raise StoreUnavailableError("away")

        put_bytes = get_bytes

    with RunReporter(Full(), "tale", "synthetic", STAGES) as reporter:  # type: ignore[arg-type]
        for step in range(3):
            events.emit(**{**STARTED, "stage": str(step)})
    assert not reporter._thread.is_alive() and caplog.text.count("may not show how far this run is") == 1


@pytest.mark.parametrize(
    "damage",
    [b"{", b'{"state": "lost"}', {"progress": {"step": 3}}, {"progress": {**progress(3, 1.0), "loss": "x"}},
     {"records": [{"kind": "train", "stage": "a", "step": "x"}]}],
)  # fmt: skip
def test_a_status_that_makes_no_sense_is_none_and_the_checkpoints_decide(
    memory: ObjectStore, tmp_path: Path, damage: Any
):
    commit_run(memory, "tale", synthetic_profile(), tmp_path / "scratch")
    data = damage if isinstance(damage, bytes) else json.dumps({"state": "running", **damage}).encode()
    memory.put_bytes(status_key("tale"), data)
    assert read_status(memory, "tale") is None and survey_runs(memory)[0].state == "done"


def test_a_flow_that_lost_its_lease_leaves_the_status_to_its_successor(memory: ObjectStore):
    reported(memory, STARTED)

    def lost() -> None:
        raise RunInUseError("taken over")

    with pytest.raises(RunInUseError), RunReporter(memory, "tale", "other", STAGES, still_ours=lost):
        raise RunInUseError("taken over")
    assert (read_status(memory, "tale") or RunStatus(state="failed")).profile == "synthetic"


def test_the_state_of_a_run_follows_from_its_lease_first():
    states = [RunStatus(state=one) for one in ("running", "waiting", "done", "failed", "diverged", "deleting")]
    held = [state_of(one, is_held=True, is_done=False, has_diverged=False) for one in states]
    free = [state_of(one, is_held=False, is_done=False, has_diverged=False) for one in states]
    assert held == ["running", "waiting", "running", "running", "running", "deleting"]
    assert free == ["interrupted", "interrupted", "done", "failed", "diverged", "deleting"]
    before = [
        state_of(None, is_held=False, is_done=done, has_diverged=bad) for done in (True, False) for bad in (True, False)
    ]
    assert before == ["done", "done", "diverged", "interrupted"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ObjectStore, list[CheckpointRef]]:
    """A default store with run 'tale', whole, as an earlier version left it."""
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    store = open_store(tmp_path / "store")
    return store, commit_run(store, "tale", synthetic_profile(), tmp_path / "scratch")


def branch(store: ObjectStore, parent: CheckpointRef, scratch: Path, run_id: str = "child") -> list[CheckpointRef]:
    return commit_run(store, run_id, synthetic_profile(), scratch, parent=parent, stages=STAGES[2:])


def test_runs_tells_state_progress_score_age_holder_and_error(shop: Any, tmp_path: Path, relora: Any):
    store, line = shop
    commit_run(store, "half", synthetic_profile(seed=1), tmp_path / "scratch", stages=STAGES[:2])
    failed = RunStatus(state="failed", profile="p", stages={"warm-start": 40}, message="The disk is [red]full[/red].")
    store.put_bytes(status_key("bad"), failed.to_bytes())
    live = RunStatus(state="running", profile="p", stages={"a": 40, "b": 80}, stage="b", progress=progress(60, 3.0))
    store.put_bytes(status_key("live"), live.to_bytes())
    with hold_run(store, "live") as lease:
        shown = {run["run_id"]: run for run in json.loads(relora("runs", "--json").out)}
        text = relora("runs").out
        holder = f"process {os.getpid()} on "
        assert lease is not None and shown["live"]["holder"].startswith(holder) and holder in text
    facts = {name: (run["state"], run["step"], run["planned_steps"]) for name, run in shown.items()}
    assert facts == {
        "tale": ("done", 160, 160), "half": ("interrupted", 80, 160), "bad": ("failed", 0, 40),
        "live": ("running", 60, 80),
    }  # fmt: skip
    assert shown["tale"]["evaluation"]["val_perplexity"] == line[-1].manifest.evaluation["val_perplexity"]
    assert "bad failed: The disk is [red]full[/red]." in text
    after = json.loads(relora("runs", "--failed", "--json").out)
    assert [(run["run_id"], run["state"]) for run in after] == [
        ("bad", "failed"), ("half", "interrupted"), ("live", "interrupted"),
    ]  # fmt: skip


def test_a_holder_that_cannot_be_seen_lives_as_long_as_it_renews(shop: Any):
    store, _ = shop
    with hold_run(store, "tale"):
        record, _ = read_lease(store, lease_key("tale")) or pytest.fail("no lease")
    elsewhere = record.holder.model_copy(update={"host": "elsewhere", "boot": "other"})
    update = {"holder": elsewhere, "released": False}
    store.put_bytes(lease_key("tale"), record.model_copy(update=update).to_bytes())
    [run] = survey_runs(store)
    assert (run.state, run.holder) == ("running", str(elsewhere))
    path = store.local_path(lease_key("tale"))
    long_ago = (datetime.now(UTC) - timedelta(seconds=80)).timestamp()
    os.utime(path, (long_ago, long_ago))
    assert survey_runs(store)[0].holder is None


def test_a_run_is_removed_whole_and_nothing_else(shop: Any, tmp_path: Path, relora: Any):
    store, line = shop
    reported(store, STARTED)
    child = branch(store, line[1], tmp_path / "scratch")
    assert not [each for each in verify_run(store, "child").findings if each.kind != "missing"]
    refused = relora("delete", "child")
    assert refused.code == 2 and "--yes" in refused.err
    gone = json.loads(relora("delete", "child", "--yes", "--json").out)
    assert gone["checkpoints"] == [ref.uri for ref in child]
    assert [info.key for info in store.list("runs/child")] == []
    assert relora("show", "tale@cycle-3", "--verify").code == 0
    assert relora("delete", "tale", "--yes").code == 0 and [*store.list("runs/")] == []
    assert relora("delete", "tale", "--yes").code == 6


def test_a_run_on_which_something_depends_stays_and_says_what_does(shop: Any, tmp_path: Path, relora: Any):
    store, line = shop
    branch(store, line[1], tmp_path / "scratch")
    pin(store, line[0], "best")
    promote(store, "nightly", line[2], reason="good")
    before = [info.key for info in store.list()]
    refused = relora("delete", "tale", "--yes")
    assert refused.code == 2 and all(
        f"{ref.prefix.rpartition('/')[2]}: {why}" in refused.err
        for ref, why in (
            (line[0], "pinned as best"),
            (line[1], "run child branches"),
            (line[2], "promoted in series nightly"),
        )
    )
    assert [info.key for info in store.list()] == before
    unpin(store, line[0])
    with pytest.raises(ConfigError, match="child branches"):
        delete_run(store, "tale")


def test_a_run_in_use_is_not_removed(shop: Any):
    store, line = shop
    with hold_run(store, "tale"), pytest.raises(RunInUseError):
        delete_run(store, "tale")
    assert CheckpointStore(store, "tale").list() == line


class Dying:
    """A store whose process is killed after so many deletes."""

    def __init__(self, store: ObjectStore, deletes: int) -> None:
        self._store, self._left = store, deletes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, key: str) -> None:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self._store.delete(key)


def test_a_killed_delete_leaves_whole_checkpoints_and_the_next_one_ends_it(memory: ObjectStore, tmp_path: Path):
    whole = commit_run(memory, "tale", synthetic_profile(), tmp_path / "scratch")
    objects = survey_run(memory, "tale").object_count
    left = [len(whole)]
    for deletes in range(0, objects, 3):
        dying: Any = Dying(memory, 3)
        with pytest.raises(KeyboardInterrupt):
            delete_run(dying, "tale")
        [run] = survey_runs(memory)
        kept = CheckpointStore(memory, "tale").list()
        assert run.state == "deleting" and list(kept) == whole[: len(kept)], deletes
        for ref in kept:
            assert {entry.path for entry in ref.manifest.files} <= {
                info.key.removeprefix(f"{ref.prefix}/") for info in memory.list(ref.prefix)
            }
        if kept:
            assert resolve_checkpoint("tale@latest", memory) == kept[-1]
        left.append(len(kept))
        if deletes > objects // 2:
            break
    assert left == sorted(left, reverse=True) and left[1] > left[-1] == 0
    delete_run(memory, "tale")
    assert [*memory.list("runs/")] == []
    with pytest.raises(CheckpointNotFoundError):
        delete_run(memory, "tale")


def test_what_begins_to_depend_on_a_run_while_it_is_removed_keeps_it(memory: ObjectStore, tmp_path: Path):
    line = commit_run(memory, "tale", synthetic_profile(), tmp_path / "scratch")

    class Racing(Dying):
        def put_bytes(self, key: str, data: bytes, **conditions: Any) -> str:
            if key.startswith(line[0].prefix):
                pin(memory, line[1], "late")
            return self._store.put_bytes(key, data, **conditions)

    racing: Any = Racing(memory, -1)
    with pytest.raises(ConfigError, match="pinned as late"):
        delete_run(racing, "tale")
    assert CheckpointStore(memory, "tale").list() == line and survey_runs(memory)[0].state == "done"
    assert not [info.key for info in memory.list() if info.key.endswith("deleted.json")]


@pytest.mark.parametrize("name", _RENAMED)
def test_a_command_of_before_names_the_one_of_now_and_ends_with_2(name: str, relora: Any):
    said = relora(name, "tale", "--json")
    assert (said.code, said.out) == (2, "") and f"`relora {_RENAMED[name]}`" in said.err
    assert name not in command_line().commands and _RENAMED[name].split(" ")[0] in command_line().commands
    assert len(said.err.strip().splitlines()) == 1


def test_ends_of_promote_and_compare_that_contradict_themselves_are_refused(shop: Any, relora: Any):
    for arguments in (
        ["promote", "s"], ["promote", "s", "tale", "--rollback"], ["promote", "s", "tale", "--to", "2"],
        ["promote", "s", "tale", "--data-again"], ["show", "tale", "--verify"], ["compare", "--seeds", "1"],
    ):  # fmt: skip
        assert relora(*arguments).code == 2, arguments
    assert "table2-tiny" in relora("compare").out


def test_a_delete_asks_on_a_terminal(shop: Any, tmp_path: Path):
    store, _ = shop
    command = f"{sys.executable} -m relora_train.cli.app delete tale"
    for typed, code in (("n", 1), ("y", 0)):
        asked = subprocess.run(
            ["script", "-qec", command, "/dev/null"], input=f"{typed}\n", capture_output=True, text=True, cwd=tmp_path
        )
        assert asked.returncode == code and "Remove run tale from" in asked.stdout, asked.stdout
        assert bool([*store.list("runs/")]) is (typed == "n")
