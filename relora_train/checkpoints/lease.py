"""One writer a run: a lease in the store, by conditional writes. Light: imports no torch, boto3 or prefect.

`runs/<run_id>/lease.json` names its holder, who renews it three times a TTL. Guarantees:
1. Of any number of flows with one run id at most one holds the lease; the others stop with RunInUseError.
2. A lease outlives its holder by 1.25 TTL at most, and not at all where its death can be seen: same machine, same boot,
   same PID namespace, and that process (PID and start time, so that a reused PID deceives nobody) is gone, or is the
   one that asks and holds nothing of the kind.
3. Nobody compares two machines' clocks. A waiter takes over when it saw the same etag for 1.25 TTL on its own monotonic
   clock; a renewal seen meanwhile proves the holder alive. The holder counts its TTL from before it asked.
4. Who could not renew for a TTL is told by `check()`: it renews on the spot, or raises. `check()` before every write.
Not covered: a write already sent when its sender is stopped. Commits stay safe without any lease: see bundle.py.
A released lease stays as an object that says so: deleting it could hit a successor's.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_train.checkpoints.layout import check_run_id, split_checkpoint_uri
from relora_train.checkpoints.series_record import series_key
from relora_train.checkpoints.tombstone import read_tombstone, removed_message
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    PreconditionFailedError,
    RunInUseError,
    StorageError,
)
from relora_train.storage.base import ObjectStore, find_bytes
from relora_train.storage.opening import open_store

DEFAULT_TTL_SECONDS = 60.0
_RENEWALS_PER_TTL = 3
_OBSERVED_TTLS = 1.25
"""Clocks of two machines may run at slightly different speed; no more than that is assumed of them."""

_held_here: set[str] = set()
"""Nonces of the leases that this process holds or has asked for."""

_log = logging.getLogger("relora_train.checkpoints.lease")


class Holder(BaseModel):
    """A process, told apart from every other one that had or will have its PID."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    boot: str | None = None
    """Machine's boot, PID namespace and the process's start: None where the system does not tell."""
    process_started: str | None = None
    nonce: str

    @classmethod
    def this_process(cls) -> Self:
        """This process for one lease; until `let_go`, which is for who did not get it or has released it."""
        nonce = secrets.token_hex(8)
        _held_here.add(nonce)
        return cls(
            host=socket.gethostname(), pid=os.getpid(), boot=_boot(), process_started=_process_started(os.getpid()),
            nonce=nonce,
        )  # fmt: skip

    def let_go(self) -> None:
        _held_here.discard(self.nonce)

    def is_alive(self) -> bool | None:
        """Whether the process lives and, if it is this one, still holds or asks for it; None: cannot be told here."""
        if self.boot is None or self.process_started is None or self.boot != _boot():
            return None
        if self.host != socket.gethostname():
            return None
        if self.pid == os.getpid() and self.nonce not in _held_here:
            return False  # such as one that was granted by an answer that never came
        return _process_started(self.pid) == self.process_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LeaseRecord(BaseModel):
    """What lease.json holds."""

    model_config = ConfigDict(frozen=True)

    holder: Holder
    purpose: Literal["train", "prune"] = "train"
    since: datetime
    """By the holder's clock, for people."""
    renewed: datetime
    ttl_seconds: float = Field(gt=0)
    renewals: int = 0
    released: bool = False
    depends_on: tuple[str, ...] = ()
    """URIs of checkpoints that the holder started from: never pruned, see protections.py."""

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


class Lease:
    """A held lease, renewed by a thread of its own until it is released."""

    def __init__(self, store: ObjectStore, key: str, record: LeaseRecord, etag: str, asked_at: float) -> None:
        self._store, self._key = store, key
        self._record, self._etag = record, etag
        self._valid_until = asked_at + record.ttl_seconds
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew_regularly, name=f"lease {key}", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another process is known to hold it now; what was not heard of for a while is not lost yet."""
        return self._lost is not None

    def check(self) -> None:
        """Return only if this process holds the lease now, renewing it first if a TTL has passed unheard.

        Raises RunInUseError when another process took it over, StoreUnavailableError when that cannot be found out.
        """
        with self._lock:
            if self._lost is None and _seconds() < self._valid_until:
                return
            self._renew()

    def raise_if_lost(self) -> None:
        """As check(), without asking the store: an outage of the store is no reason to stop computing."""
        if self._lost is not None:
            raise RunInUseError(self._lost)

    def release(self) -> None:
        """Let the next flow begin at once. Best effort: what cannot be told to the store expires."""
        self._ended.set()
        self._thread.join()
        with self._lock:
            try:
                if self._lost is None:
                    self._put(released=True)
            except StorageError as error:
                _log.warning("%s could not be released and will expire: %s", self._uri, error)
            finally:
                self._record.holder.let_go()

    @property
    def _uri(self) -> str:
        return f"{self._store.uri}/{self._key}"

    def _renew_regularly(self) -> None:
        while not self._ended.wait(self._record.ttl_seconds / _RENEWALS_PER_TTL):
            with self._lock:
                try:
                    self._renew()
                except RunInUseError as error:
                    _log.warning("%s", error)
                    return
                except Exception as error:
                    _log.info("%s is not renewed yet: %s", self._uri, error)

    def _renew(self) -> None:
        if self._lost is not None:
            raise RunInUseError(self._lost)
        try:
            self._put()
        except PreconditionFailedError:
            self._adopt_or_lose()

    def _adopt_or_lose(self) -> None:
        """The etag is not ours: after a lost answer the content still is, after a takeover it is not."""
        found = read_lease(self._store, self._key)
        if found is not None and found[0].holder.nonce == self._record.holder.nonce and not found[0].released:
            self._etag = found[1]
            try:
                return self._put()
            except PreconditionFailedError:
                found = read_lease(self._store, self._key)
        taker = f"{found[0].holder} holds it since {_when(found[0].since)}" if found else "it was deleted"
        self._lost = (
            f"This process lost {self._uri}: it was not renewed for {self._record.ttl_seconds:g} s, and {taker}. "
            "Nothing more is written by this process. See to the other one, or run again once it has ended."
        )
        raise RunInUseError(self._lost)

    def _put(self, *, released: bool = False) -> None:
        asked_at = _seconds()
        renewed = {"renewed": datetime.now(UTC), "renewals": self._record.renewals + 1, "released": released}
        record = self._record.model_copy(update=renewed)
        self._etag = self._store.put_bytes(self._key, record.to_bytes(), if_match=self._etag)
        self._record, self._valid_until = record, asked_at + record.ttl_seconds


def lease_key(run_id: str) -> str:
    return f"runs/{check_run_id(run_id)}/lease.json"


@contextmanager
def hold_run(
    store: ObjectStore,
    run_id: str,
    *,
    ttl_seconds: float = DEFAULT_TTL_SECONDS,
    depends_on: Sequence[str] = (),
) -> Iterator[Lease]:
    """Be the only flow of this run for the length of the block.

    Raises RunInUseError at once or within a third of a TTL while another flow lives; takes over at once from one that
    was killed on this machine, and after 1.25 TTL from one that vanished elsewhere. A prune is waited for.
    depends_on: checkpoints to start from, by URI: safe from pruning from here on, or a CheckpointNotFoundError.
    """
    lease = take_lease(store, lease_key(run_id), f"Run {run_id!r}", ttl_seconds=ttl_seconds, depends_on=depends_on)
    try:
        for uri in depends_on:
            _refuse_removed(uri)  # after it was written down: a prune reads leases after its tombstone
        yield lease
    finally:
        lease.release()


@contextmanager
def hold_series(store: ObjectStore, name: str, *, ttl_seconds: float = DEFAULT_TTL_SECONDS) -> Iterator[Lease]:
    """Be the only retrain of this series for the length of the block; waits and errors as for hold_run."""
    lease = take_lease(store, series_key(name, "lease.json"), f"Series {name!r}", ttl_seconds=ttl_seconds)
    try:
        yield lease
    finally:
        lease.release()


def take_lease(
    store: ObjectStore,
    key: str,
    what: str,
    *,
    ttl_seconds: float = DEFAULT_TTL_SECONDS,
    depends_on: Sequence[str] = (),
    purpose: Literal["train", "prune"] = "train",
) -> Lease:
    """Take a lease, waiting only as long as its holder may still turn out to be dead. See hold_run for the errors."""
    now = datetime.now(UTC)
    record = LeaseRecord(
        holder=Holder.this_process(), purpose=purpose, since=now, renewed=now, ttl_seconds=ttl_seconds,
        depends_on=tuple(depends_on),
    )  # fmt: skip
    try:
        return _taken(store, key, what, record)
    except BaseException:
        record.holder.let_go()
        raise


def _taken(store: ObjectStore, key: str, what: str, record: LeaseRecord) -> Lease:
    watched: tuple[str, float] | None = None
    while True:
        asked_at = _seconds()
        try:
            found = read_lease(store, key)
            if found is None:
                return Lease(store, key, record, store.put_bytes(key, record.to_bytes(), if_absent=True), asked_at)
            holder, etag = found
            if holder.released or holder.holder.is_alive() is False or _unchanged_for_long(watched, etag, holder):
                if not holder.released:
                    _log.warning("%s was left by %s, which is gone; it is taken over.", what, holder.holder)
                return Lease(store, key, record, store.put_bytes(key, record.to_bytes(), if_match=etag), asked_at)
        except PreconditionFailedError:
            continue  # another process was faster: look again whom it belongs to
        was_renewed = watched is not None and watched[0] != etag
        if holder.purpose == record.purpose and (was_renewed or holder.holder.is_alive()):
            raise _in_use(store, key, what, holder)
        if watched is None:
            _log.warning(
                "%s is held by %s since %s; waiting up to %.0f s to see whether it is alive.",
                what, holder.holder, _when(holder.since), holder.ttl_seconds * _OBSERVED_TTLS,
            )  # fmt: skip
        if watched is None or was_renewed:
            watched = etag, time.monotonic()
        time.sleep(min(1.0, holder.ttl_seconds / 10))


def try_lease(store: ObjectStore, key: str, *, unheard_of: Callable[[], bool], ttl_seconds: float) -> Lease | None:
    """Take a lease for pruning if nobody can be using it, without waiting; None otherwise.

    unheard_of: asked about a holder whose death cannot be seen from here; the caller has a clock to judge it by.
    """
    now = datetime.now(UTC)
    record = LeaseRecord(holder=Holder.this_process(), purpose="prune", since=now, renewed=now, ttl_seconds=ttl_seconds)
    lease, asked_at = None, _seconds()
    try:
        found = read_lease(store, key)
        if found is None:
            lease = Lease(store, key, record, store.put_bytes(key, record.to_bytes(), if_absent=True), asked_at)
            return lease
        held, etag = found
        lives = held.holder.is_alive()
        if not held.released and (lives or (lives is None and not unheard_of())):
            return None
        # What its runs started from stays known: see protections.py.
        record = record.model_copy(update={"depends_on": held.depends_on})
        lease = Lease(store, key, record, store.put_bytes(key, record.to_bytes(), if_match=etag), asked_at)
        return lease
    except PreconditionFailedError:
        return None
    finally:
        if lease is None:
            record.holder.let_go()


def read_lease(store: ObjectStore, key: str) -> tuple[LeaseRecord, str] | None:
    """A lease's record and etag, or None. A damaged one is refused: nobody can say whose it is."""
    found = find_bytes(store, key)
    if found is None:
        return None
    data, etag = found
    try:
        return LeaseRecord.model_validate_json(data), etag
    except ValidationError:
        raise CheckpointCorruptError(
            f"{store.uri}/{key} is damaged: it does not say who holds it. Make sure that no flow of this run is "
            "running, delete it, and run again."
        ) from None


def _refuse_removed(uri: str) -> None:
    store_uri, prefix = split_checkpoint_uri(uri)
    tombstone = read_tombstone(open_store(store_uri), prefix)
    if tombstone is not None:
        raise CheckpointNotFoundError(removed_message(uri, tombstone))


def _unchanged_for_long(watched: tuple[str, float] | None, etag: str, record: LeaseRecord) -> bool:
    return (
        watched is not None
        and watched[0] == etag
        and time.monotonic() - watched[1] > record.ttl_seconds * _OBSERVED_TTLS
    )


def _in_use(store: ObjectStore, key: str, what: str, record: LeaseRecord) -> RunInUseError:
    other = "use another run id" if key.startswith("runs/") else "use another name"
    return RunInUseError(
        f"{what} is in use by {record.holder} since {_when(record.since)} ({store.uri}/{key}), renewed at "
        f"{_when(record.renewed)} by that machine's clock; without a renewal it is free after "
        f"{record.ttl_seconds * _OBSERVED_TTLS:.0f} s. Wait for it or stop it, then run again, or {other}."
    )


def _when(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="seconds")


def _seconds() -> float:
    """Seconds of a clock that also counts the time for which this machine slept, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _boot() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _process_started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; None for one that is gone, waited for or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
