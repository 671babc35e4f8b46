"""On a store beyond this machine a checkpoint is stored while the next cycle trains, and nothing is lost by it.

Real flows on a real S3 server, through a proxy that holds up or refuses what belongs to one checkpoint. One of them is
behind a marker: `python -m pytest -m slow tests/test_flow_publishing.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Faults, answer_instead, faulty_way_to, held_until
from prefect_operator import wait_for
from prefect_server import PREFECT_WARNS, running_prefect
from seaweed import ChangingKeys
from test_flow_pretrain import listening, model_bytes, run_smoke, trained

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.manifest import CheckpointManifest, describe_files
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import AccessDeniedError, PreconditionFailedError
from relora_train.events import Event
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

pytestmark = PREFECT_WARNS

STAGES = ["warm-start", "cycle-1"]
SHORT = {"schedule.cycles": 1, "evaluation.sample_prompts": []}
OFTEN = {**SHORT, "snapshots.every_steps": 4}
WARM_START = "/checkpoints/step-00000020-"


@pytest.fixture(scope="module", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")):
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The weights of every stage, each stored before the next one began."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return model_bytes(run_smoke(tmp_path_factory.mktemp("store"), run_id="run", overrides=SHORT)[0])


@pytest.fixture
def faults(seaweed: Any, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The way to the S3 server leads through a proxy."""
    with faulty_way_to(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The same store on the direct way; to be asked for before `faults`."""
    store = open_store(s3_store_uri)
    list(store.list())
    return store


def committed(store: ObjectStore) -> list[str]:
    return [ref.manifest.stage for ref in CheckpointStore(store, "run").list()]


def snapshots_of_cycles(store: ObjectStore) -> list[str]:
    names = [info.key.split("/")[4] for info in store.list("runs/run/snapshots/")]
    return [name for name in names if int(name.split("-")[1]) > 20]  # the warm start's are kept until it is stored


def index_of(seen: list[Event], name: str, stage: str) -> int:
    return next(i for i, event in enumerate(seen) if event["event"] == name and event["stage"] == stage)


def test_a_cycle_trains_while_the_checkpoint_before_it_is_stored(
    store: ObjectStore, faults: Faults, expected: list[bytes]
):
    gate, early = threading.Event(), list[str]()
    faults.standing = [("PUT", WARM_START, held_until(gate))]

    def open_late(event: Event) -> None:
        if event["event"] == "merge" and event["stage"] == "cycle-1" and not gate.is_set():
            early.extend(snapshots_of_cycles(store))
            assert committed(store) == []
            gate.set()

    with listening(open_late):
        summary, seen = run_smoke(store.uri, run_id="run", overrides=OFTEN)
    assert trained(seen) == STAGES
    snapshots = [event for event in seen if event["event"] == "snapshot_committed" and event["stage"] == "cycle-1"]
    assert snapshots and early == []
    merged, stored = index_of(seen, "merge", "cycle-1"), index_of(seen, "checkpoint_stored", "warm-start")
    assert merged < stored < index_of(seen, "checkpoint_stored", "cycle-1")
    finished = [event["uri"] for event in seen if event["event"] == "stage_finished"]
    assert finished == [None, None]  # nothing claims to be stored that is not
    told = [event["uri"] for event in seen if event["event"] == "checkpoint_stored"]
    assert told == [stage.uri for stage in summary.stages]
    assert model_bytes(summary) == expected
    assert not [info.key for info in store.list("runs/run/snapshots/")]


def flow_process(store: str, log: Path) -> subprocess.Popen[bytes]:
    sets = [part for key, value in {**OFTEN, "launch.threads": 1}.items() for part in ("--set", f"{key}={value}")]
    command = ["run", "smoke", "--store", store, "--run-id", "run", *sets]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", "from relora_train.cli.app import main; main()", *command],
            stdout=output, stderr=output, env={**os.environ, "PREFECT_HOME": str(log.parent / "prefect")},
        )  # fmt: skip


def test_a_flow_killed_while_it_trains_and_stores_loses_neither(
    store: ObjectStore, faults: Faults, expected: list[bytes], cache: Path, tmp_path: Path
):
    gate = threading.Event()
    faults.standing = [("PUT", WARM_START, held_until(gate))]
    killed = flow_process(store.uri, tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not list(cache.glob("work/run/cycle-1-*/snapshots/*/manifest.json")):
            assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.wait()
        gate.set()
    assert committed(store) == []
    faults.standing = []
    summary, seen = run_smoke(store.uri, run_id="run", overrides=OFTEN)
    assert trained(seen) == ["cycle-1"]  # the warm start waited on this machine
    assert [event["stage"] for event in seen if event["event"] == "resumed"] == ["cycle-1"]
    assert model_bytes(summary) == expected
    assert not list(cache.glob("work/run/*/*"))


def test_what_cannot_be_stored_keeps_no_cycle_from_its_end_and_is_stored_later_untrained(
    store: ObjectStore, faults: Faults, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.runs.publishing._DENIED_SECONDS", 0.0)
    faults.standing = [("PUT", WARM_START, answer_instead(403, "AccessDenied"))]
    seen: list[Event] = []
    with listening(seen.append), pytest.raises(AccessDeniedError, match="step-00000020"):
        run_smoke(store.uri, run_id="run", overrides=SHORT)
    assert trained(seen) == ["warm-start", "cycle-1"]
    assert index_of(seen, "stage_finished", "cycle-1") and committed(store) == []
    faults.standing = []
    summary, seen = run_smoke(store.uri, run_id="run", overrides=SHORT)
    assert trained(seen) == []
    assert model_bytes(summary) == expected


def test_keys_that_are_withdrawn_before_the_end_of_a_stage_keep_no_other_from_training_and_are_awaited(
    s3_store_uri: str, keys: ChangingKeys, expected: list[bytes], caplog: pytest.LogCaptureFixture
):
    """The next stage can then not ask the store for itself, or for what is known of its divergence."""

    def withdraw_and_renew(event: Event) -> None:
        if event["event"] == "stage_started" and event["stage"] == "warm-start":
            keys.revoke()
        if event["event"] == "merge":
            try:  # the advice comes from another thread, which may have been slower than twenty steps
                wait_for(lambda: "Renew the credentials" in caplog.text, 60, lambda: caplog.text)
            finally:
                keys.issue()

    with listening(withdraw_and_renew):
        overrides = {**SHORT, "divergence.on_divergence": "lower_lr"}
        summary, seen = run_smoke(s3_store_uri, run_id="run", overrides=overrides)
    assert trained(seen) == STAGES
    assert model_bytes(summary) == expected


def test_an_access_that_is_denied_at_the_start_ends_a_flow_at_once(s3_store_uri: str, keys: ChangingKeys):
    keys.revoke()
    with pytest.raises(AccessDeniedError):
        run_smoke(s3_store_uri, run_id="run", overrides=SHORT)


def other_result(made: Path, scratch: Path) -> tuple[Path, CheckpointManifest]:
    """The checkpoint as a machine that rounds otherwise would have made it."""
    directory = Path(shutil.copytree(made, scratch))
    manifest = CheckpointManifest.model_validate_json((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").unlink()
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-4] ^= 1  # of the last weight's mantissa
    (directory / "model.safetensors").write_bytes(weights)
    return directory, manifest.model_copy(update={"files": describe_files(directory), "attempt": "other"})


def test_what_began_from_a_result_that_did_not_win_is_dropped_and_never_stored(
    store: ObjectStore, faults: Faults, expected: list[bytes], cache: Path, tmp_path: Path
):
    gate = threading.Event()
    faults.standing = [("PUT", WARM_START, held_until(gate))]
    seen: list[Event] = []

    def overtake(event: Event) -> None:
        seen.append(event)
        if event["event"] == "snapshot_committed" and event["stage"] == "cycle-1" and not gate.is_set():
            (made,) = cache.glob("work/run/warm-start-*/checkpoint")
            directory, manifest = other_result(made, tmp_path / "other")
            place = CheckpointStore(store, "run").place_of(manifest)
            commit_bundle(store, place.prefix, directory, manifest)
            gate.set()

    with listening(overtake), pytest.raises(PreconditionFailedError, match="Run the same command again"):
        run_smoke(store.uri, run_id="run", overrides=OFTEN)
    assert gate.is_set() and trained(seen) == ["warm-start", "cycle-1"]
    assert committed(store) == ["warm-start"]
    cycle = json.loads(store.get_bytes("runs/run/refs/head.json")[0])
    assert cycle["step"] == 20
    assert snapshots_of_cycles(store) == []
    assert list(cache.glob("work/run/cycle-1-*/*"))  # of no use, and known for it
    faults.standing = []
    summary, again = run_smoke(store.uri, run_id="run", overrides=OFTEN)
    assert trained(again) == ["cycle-1"]
    assert not [event for event in again if event["event"] == "resumed"]
    weights = model_bytes(summary)
    assert weights[0] == (tmp_path / "other" / "model.safetensors").read_bytes() != expected[0]
    assert weights[1] != expected[1]


@pytest.mark.slow
def test_ctrl_c_gives_what_is_being_stored_a_bounded_time(
    store: ObjectStore, faults: Faults, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.runs.background.STOP_BUDGET_SECONDS", 3.0)
    gate = threading.Event()
    faults.standing = [("PUT", WARM_START, held_until(gate))]

    def interrupt(event: Event) -> None:
        if event["event"] == "snapshot_committed" and event["stage"] == "cycle-1":
            signal.raise_signal(signal.SIGINT)

    began = time.monotonic()
    with listening(interrupt), pytest.raises(KeyboardInterrupt):
        run_smoke(store.uri, run_id="run", overrides=OFTEN)
    assert time.monotonic() - began < 60
    gate.set()
    time.sleep(1)
    assert committed(store) == []  # the one flow that might have stored it is over
