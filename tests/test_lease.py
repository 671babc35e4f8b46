"""One writer a run: the second flow stops while the first lives, and takes over when it is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fault_proxy import answer_instead, faulty_way_to, lose_the_answer

from relora_train.checkpoints import lease as lease_module
from relora_train.checkpoints.holder import Holder
from relora_train.checkpoints.lease import LeaseRecord, hold_run, lease_key, read_lease, try_lease
from relora_train.errors import CheckpointCorruptError, PreconditionFailedError, RunInUseError, StoreUnavailableError
from relora_train.storage.base import ObjectStore
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

TTL_SECONDS = 1.2

HOLD = """
import sys, time
from relora_train.checkpoints.lease import hold_run
from relora_train.storage.opening import open_store
uri, ttl = sys.argv[1], float(sys.argv[2])
with hold_run(open_store(uri), "run", ttl_seconds=ttl) as lease:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lease.check()
            print("ok", flush=True)
        except Exception as error:
            print(type(error).__name__, str(error).replace("\\n", " "), flush=True)
"""


@pytest.fixture(params=("local", "s3"))
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_store_uri") if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders look as if they were on another machine: nobody can see from here whether they live."""
    monkeypatch.setattr(Holder, "is_alive", lambda self: None)


@contextmanager
def holder(uri: str, ttl_seconds: float = TTL_SECONDS) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri, str(ttl_seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def asked(process: subprocess.Popen[str]) -> str:
    """What the holder's check() says now."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_second_flow_is_refused_at_once_while_the_first_lives_on_this_machine(store_uri):
    with holder(store_uri, ttl_seconds=60) as first:  # for whose end nobody waits
        began = time.monotonic()
        with pytest.raises(RunInUseError) as refused, hold_run(open_store(store_uri), "run", ttl_seconds=TTL_SECONDS):
            pass
        assert time.monotonic() - began < 30
        waits = "free after 75 s"  # 1.25 TTL
        for said in ("'run'", f"process {first.pid} on", "since", waits, "Wait for it or stop it", "another run id"):
            assert said in str(refused.value)
        assert asked(first) == "ok\n"
        with hold_run(open_store(store_uri), "other", ttl_seconds=TTL_SECONDS):
            pass


def test_a_second_flow_is_refused_when_the_first_lives_on_another_machine(store_uri, elsewhere):
    with holder(store_uri) as first:
        with pytest.raises(RunInUseError), hold_run(open_store(store_uri), "run", ttl_seconds=TTL_SECONDS):
            pass
        assert asked(first) == "ok\n"


def test_a_killed_flow_of_this_machine_is_followed_at_once(store_uri, caplog):
    with holder(store_uri, ttl_seconds=600) as first:
        first.send_signal(signal.SIGKILL)  # and not waited for: a zombie is dead too
        while Holder(**_record(store_uri)["holder"]).is_alive():
            time.sleep(0.01)
        began = time.monotonic()
        with hold_run(open_store(store_uri), "run", ttl_seconds=600) as lease:
            lease.check()
        assert time.monotonic() - began < 10
        assert f"was left by process {first.pid} on" in caplog.text


def test_a_killed_flow_of_another_machine_is_followed_when_its_lease_has_run_out(store_uri, elsewhere, caplog):
    with holder(store_uri) as first:
        first.kill()
        began = time.monotonic()
        with hold_run(open_store(store_uri), "run", ttl_seconds=TTL_SECONDS) as lease:
            lease.check()
        assert TTL_SECONDS < time.monotonic() - began < 4 * TTL_SECONDS
    assert caplog.text.count("waiting up to 2 s to see whether it is alive") == 1, "a waiter says so once"


def test_a_flow_that_slept_while_it_was_replaced_notices_on_waking_and_writes_no_more(store_uri, elsewhere):
    with holder(store_uri) as first:
        first.send_signal(signal.SIGSTOP)
        with hold_run(open_store(store_uri), "run", ttl_seconds=TTL_SECONDS) as lease:
            first.send_signal(signal.SIGCONT)
            said = asked(first)
            assert said.startswith("RunInUseError") and f"process {os.getpid()}" in said, said
            assert asked(first) == said
            lease.check()
        first.stdin.close()
        assert first.wait(10) == 0  # and its end does not release what is not its own
        assert _record(store_uri)["holder"]["pid"] == os.getpid()


def test_a_flow_that_slept_and_was_not_replaced_goes_on(store_uri, elsewhere):
    with holder(store_uri) as first:
        first.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * TTL_SECONDS)
        first.send_signal(signal.SIGCONT)
        assert asked(first) == "ok\n"


def test_an_ended_flow_leaves_the_run_free_at_once(store_uri, elsewhere, caplog):
    store = open_store(store_uri)
    for _ in range(3):
        began = time.monotonic()
        with hold_run(store, "run", ttl_seconds=600):
            assert not _record(store_uri)["released"]
        assert time.monotonic() - began < 10
    assert _record(store_uri)["released"] and "taken over" not in caplog.text


def test_of_many_flows_that_start_at_once_one_gets_the_run(store_uri):
    barrier, held, refused = threading.Barrier(6), [], []

    def start() -> None:
        store = open_store(store_uri)
        barrier.wait()
        try:
            with hold_run(store, "run", ttl_seconds=600):
                held.append(1)
                done.wait(30)
        except RunInUseError:
            refused.append(1)

    done = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(held) + len(refused) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_an_outage_longer_than_the_lease_stops_writing_and_not_computing(seaweed, s3_store_uri, monkeypatch):
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "1")
    with faulty_way_to(seaweed.endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", way.endpoint)
        with hold_run(open_store(s3_store_uri), "run", ttl_seconds=0.9) as lease:
            way.plan("PUT", "lease.json", *[answer_instead(503, "SlowDown")] * 10_000)
            time.sleep(1.3)
            with pytest.raises(StoreUnavailableError):
                lease.check()
            lease.raise_if_lost()
            with way.lock:
                way.planned.clear()
            lease.check()


def test_a_lease_that_was_granted_by_a_lost_answer_is_taken_at_once_by_the_same_process(
    seaweed, s3_store_uri, monkeypatch
):
    """A task that is retried in its process meets what its first try was given and never heard of."""
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "1")
    with faulty_way_to(seaweed.endpoint) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", way.endpoint)
        store = open_store(s3_store_uri)
        way.plan("PUT", "lease.json", lose_the_answer)
        with pytest.raises(StoreUnavailableError), hold_run(store, "run", ttl_seconds=600):
            pass
        assert not _record(s3_store_uri)["released"]
        with hold_run(store, "run", ttl_seconds=600) as lease:
            lease.check()
            with pytest.raises(RunInUseError), hold_run(store, "run", ttl_seconds=600):
                pass
            lease.check()
            way.plan("PUT", "lease.json", answer_instead(503, "SlowDown"))
        assert not _record(s3_store_uri)["released"]  # it could not be told, and the process lives on
        prune = try_lease(store, lease_key("run"), unheard_of=lambda: False, ttl_seconds=60)
        assert prune is not None
        prune.release()


class LosesAnAnswer(MemoryStore):
    """A repeated write is refused, for the write whose answer was lost has changed the object."""

    loses = False

    def put_bytes(self, key, data, **condition):
        etag = super().put_bytes(key, data, **condition)
        if self.loses:
            self.loses = False
            raise PreconditionFailedError(key)
        return etag


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The holder's clock, in seconds; it stands until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr("relora_train.checkpoints.lease._seconds", lambda: now[0])
    return now


def test_the_store_is_asked_once_a_ttl_and_not_before_every_write(clock):
    store = LosesAnAnswer()
    with hold_run(store, "run", ttl_seconds=600) as lease:
        renewals = []
        for passed in (0, 599, 2, 0, 598, 3):
            clock[0] += passed
            lease.check()
            renewals.append(read_lease(store, lease_key("run"))[0].renewals)
    assert renewals == [0, 0, 1, 1, 1, 2]


def test_who_was_replaced_is_told_by_whom_and_overwrites_nothing(clock):
    store, key = MemoryStore(), lease_key("run")
    with hold_run(store, "run", ttl_seconds=600) as lease:
        record = read_lease(store, key)[0]
        other = record.holder.model_copy(update={"host": "elsewhere", "nonce": "other"})
        store.put_bytes(key, record.model_copy(update={"holder": other}).to_bytes())
        clock[0] += 601
        with pytest.raises(RunInUseError, match=r"lost memory:.* on elsewhere holds it since"):
            lease.check()
        with pytest.raises(RunInUseError):
            lease.raise_if_lost()
    assert read_lease(store, key)[0].holder == other and not read_lease(store, key)[0].released


def test_a_lease_is_renewed_three_times_a_ttl(monkeypatch):
    waits = []

    class Noted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Noted)
    with hold_run(MemoryStore(), "run", ttl_seconds=600):
        pass
    assert [seconds for seconds in waits if seconds is not None] == [200]


def test_a_renewal_that_fails_is_tried_again_and_said(caplog):
    class Down(MemoryStore):
        refused = 0

        def put_bytes(self, key, data, *, if_match=None, **condition):
            if if_match is not None and self.refused < 2:
                self.refused += 1
                raise StoreUnavailableError("it is down")
            return super().put_bytes(key, data, if_match=if_match, **condition)

    store = Down()
    with caplog.at_level("INFO", "relora_train"), hold_run(store, "run", ttl_seconds=0.06):
        deadline = time.monotonic() + 20
        while not read_lease(store, lease_key("run"))[0].renewals and time.monotonic() < deadline:
            time.sleep(0.01)
    assert read_lease(store, lease_key("run"))[0].renewals and store.refused == 2
    assert caplog.text.count("runs/run/lease.json is not renewed yet: it is down") == 2


def test_the_clock_of_a_holder_counts_the_time_that_its_machine_slept(monkeypatch):
    clocks = {getattr(time, "CLOCK_BOOTTIME", None): 5000.0}
    monkeypatch.setattr(time, "clock_gettime", clocks.get)
    assert lease_module._seconds() == 5000 or None in clocks


@pytest.mark.parametrize("found", [None, "released"])
def test_who_was_overtaken_between_looking_and_writing_looks_again(found):
    """By one that lives: the lease is the other's, whatever was seen of it before."""
    key = lease_key("run")

    class Overtaken(MemoryStore):
        rival: bytes | None = None

        def put_bytes(self, key, data, **condition):
            rival, self.rival = self.rival, None
            if rival is not None:
                super().put_bytes(key, rival)
            return super().put_bytes(key, data, **condition)

    store = Overtaken()
    with hold_run(store, "run", ttl_seconds=600):
        rival = read_lease(store, key)[0]
        if found is None:
            store.delete(key)
        else:
            store.put_bytes(key, rival.model_copy(update={"released": True}).to_bytes())
        store.rival = rival.to_bytes()
        with pytest.raises(RunInUseError), hold_run(store, "run", ttl_seconds=600):
            pass
        assert read_lease(store, key)[0] == rival


def test_a_renewal_whose_answer_was_lost_is_no_loss_in_any_store(clock):
    store = LosesAnAnswer()
    with hold_run(store, "run", ttl_seconds=600) as lease:
        clock[0] += 601
        store.loses = True
        lease.check()
        lease.raise_if_lost()  # it is not
    assert read_lease(store, lease_key("run"))[0].released


def test_a_prune_takes_over_from_the_dead_and_from_those_unheard_of_and_from_no_other():
    store, key = memory(), lease_key("run")

    def is_taken(unheard_of: bool) -> bool:
        taken = try_lease(store, key, unheard_of=lambda: unheard_of, ttl_seconds=60)
        if taken is not None:
            taken.release()
        return taken is not None

    with hold_run(store, "run", ttl_seconds=600):
        assert not is_taken(unheard_of=True), "it lives"
        record = read_lease(store, key)[0]
        dead = record.holder.model_copy(update={"process_started": "1"})
        far = record.holder.model_copy(update={"host": "elsewhere"})
        for holder, unheard_of, expected in ((far, False, False), (far, True, True), (dead, False, True)):
            store.put_bytes(key, record.model_copy(update={"holder": holder}).to_bytes())
            assert is_taken(unheard_of) == expected, holder


def test_a_lease_from_before_its_later_fields_is_that_of_a_flow_at_work():
    written = {
        "holder": {"host": "elsewhere", "pid": 1, "nonce": "0"}, "since": "2026-01-01T00:00:00Z",
        "renewed": "2026-01-01T00:00:00Z", "ttl_seconds": 60,
    }  # fmt: skip
    record = LeaseRecord.model_validate(written)
    assert (record.purpose, record.renewals, record.released, record.depends_on) == ("train", 0, False, ())
    assert record.holder.is_alive() is None


def test_a_reused_pid_is_another_process():
    ours = Holder.this_process()
    assert ours.is_alive()
    assert ours.model_copy(update={"process_started": "1"}).is_alive() is False
    assert ours.model_copy(update={"boot": "another boot or container"}).is_alive() is None
    assert ours.model_copy(update={"host": "elsewhere"}).is_alive() is None


def test_a_holder_counts_from_before_it_asked(monkeypatch):
    """An answer that took longer than the lease grants nothing: a waiter may have taken over meanwhile."""
    now, puts = [0.0], []

    class Slow(MemoryStore):
        def put_bytes(self, key, data, **conditions):
            puts.append(key)
            now[0] += 61
            return super().put_bytes(key, data, **conditions)

    monkeypatch.setattr("relora_train.checkpoints.lease._seconds", lambda: now[0])
    with hold_run(Slow(), "run", ttl_seconds=60) as lease:
        for asked in (2, 3):  # the first answer was late, and so was that of the renewal
            lease.check()
            assert len(puts) == asked


def test_a_damaged_lease_is_nobody_s_and_said_so():
    store = memory()
    store.put_bytes(lease_key("run"), b"{}")
    with pytest.raises(CheckpointCorruptError, match=r"lease\.json is damaged"), hold_run(store, "run"):
        pass


def test_a_flow_waits_for_a_prune_and_a_prune_does_not_wait_for_a_flow():
    store = memory()
    prune = try_lease(store, lease_key("run"), unheard_of=lambda: False, ttl_seconds=60)
    threading.Timer(0.3, prune.release).start()
    with hold_run(store, "run", ttl_seconds=60, depends_on=["memory://x/parent"]):
        assert try_lease(store, lease_key("run"), unheard_of=lambda: False, ttl_seconds=60) is None
    prune = try_lease(store, lease_key("run"), unheard_of=lambda: False, ttl_seconds=60)
    record = read_lease(store, lease_key("run"))[0]
    assert record.depends_on == ("memory://x/parent",) and record.holder.is_alive()
    assert abs((datetime.now(UTC) - record.since).total_seconds()) < 600
    prune.release()


def memory() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def _record(uri: str) -> dict:
    data = open_store(uri).get_bytes(lease_key("run"))[0]
    assert LeaseRecord.model_validate_json(data)
    return json.loads(data)
