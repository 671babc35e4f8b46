"""One writer a run: a lease in the store, by conditional writes.

`runs/<run_id>/lease.json` names its holder, which renews it three times a TTL. Guarantees:
1. At most one of any number of flows with one run id holds the lease. The others stop with RunInUseError.
2. A lease outlives its holder by 1.25 TTL at most, and not at all if its death can be seen: same machine, same boot,
   same PID namespace, and that process (PID and start time, so a reused PID deceives nobody) is gone.
3. Nobody compares two machines' clocks. A waiter takes over when it saw the same etag for 1.25 TTL on its own monotonic
   clock; a renewal seen meanwhile proves the holder alive. The holder counts its TTL from before it asked.
4. If a holder has not renewed within the TTL, `check()` renews the lease immediately or raises. Call it before every
   write.
Not covered: a write already sent when its sender is stopped. Commits stay safe without any lease: see commit.py.
A released lease stays as an object that says so: deleting it could hit a successor's.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import ConfigDict, Field

from relora_train.checkpoints.holder import Holder
from relora_train.checkpoints.layout import check_run_id, split_checkpoint_uri
from relora_train.checkpoints.lineage import removal_at
from relora_train.checkpoints.manifest import StoredRecord
from relora_train.checkpoints.series_record import series_key
from relora_train.errors import CheckpointNotFoundError, PreconditionFailedError, RunInUseError, StorageError
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

DEFAULT_TTL_SECONDS = 60.0
_RENEWALS_PER_TTL = 3
OBSERVED_TTLS = 1.25  # the clocks of two machines may run at slightly different speed; no more is assumed

Purpose = Literal["train", "prune"]
_log = logging.getLogger("relora_train.checkpoints.lease")


class LeaseRecord(StoredRecord):
    """The content of lease.json."""

    model_config = ConfigDict(extra="ignore")

    holder: Holder
    purpose: Purpose = "train"
    since: datetime
    """By the holder's clock, for people."""
    renewed: datetime
    ttl_seconds: float = Field(gt=0)
    renewals: int = 0
    released: bool = False
    depends_on: tuple[str, ...] = ()
    """URIs of checkpoints that the holder started from. They are never pruned: see retention.py."""


class Lease:
    """A held lease. A thread of its own renews it until `release`, or the end of a `with` block."""

    def __init__(self, store: ObjectStore, key: str, record: LeaseRecord, etag: str, asked_at: float) -> None:
        self._store, self._key = store, key
        self._record, self._etag = record, etag
        self._valid_until = asked_at + record.ttl_seconds
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew_regularly, name=f"lease {key}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Return only if this process holds the lease now. If it has not been renewed for a TTL, renew it first.

        Raises RunInUseError when another process took it over, StoreUnavailableError when that cannot be found out.
        """
        with self._lock:
            if self._lost is None and _seconds() < self._valid_until:
                return
            self._renew()

    def raise_if_lost(self) -> None:
        """Raise as check() does, without asking the store: an outage is no reason to stop computing."""
        if self._lost is not None:
            raise RunInUseError(self._lost)

    def release(self) -> None:
        """Let the next flow begin at once. Best effort: a lease that cannot be released expires."""
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
        self.raise_if_lost()
        for _ in range(2):
            try:
                return self._put()
            except PreconditionFailedError:
                # After a lost answer the content is still ours; after a takeover it is not.
                found = read_lease(self._store, self._key)
                if found is None or found[0].holder.nonce != self._record.holder.nonce or found[0].released:
                    break
                self._etag = found[1]
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
    store: ObjectStore, run_id: str, *, ttl_seconds: float = DEFAULT_TTL_SECONDS, depends_on: Sequence[str] = ()
) -> Iterator[Lease]:
    """Be the only flow of this run for the length of the block.

    While another flow lives, RunInUseError comes at once or within a third of a TTL. A flow that was killed on this
    machine loses its lease at once, one that vanished elsewhere after 1.25 TTL. A prune is waited for.

    Args:
        depends_on: URIs of checkpoints to start from; they are safe from pruning from here on

    Raises CheckpointNotFoundError if one of them is already pruned.
    """
    what = f"Run {run_id!r}"
    with take_lease(store, lease_key(run_id), what, ttl_seconds=ttl_seconds, depends_on=depends_on) as lease:
        for uri in depends_on:  # after they were written down: a prune reads leases after its tombstone
            store_uri, prefix = split_checkpoint_uri(uri)
            if removal := removal_at(open_store(store_uri), prefix):
                raise CheckpointNotFoundError(removal)
        yield lease


def hold_series(store: ObjectStore, name: str) -> Lease:
    """Be the only retrain of this series for the length of a `with` block. Waits and raises as hold_run does."""
    return take_lease(store, series_key(name, "lease.json"), f"Series {name!r}")


def take_lease(
    store: ObjectStore,
    key: str,
    what: str,
    *,
    ttl_seconds: float = DEFAULT_TTL_SECONDS,
    depends_on: Sequence[str] = (),
    purpose: Purpose = "train",
    unheard_of: Callable[[], bool] | None = None,
) -> Lease:
    """Take a lease, waiting only as long as its holder may still turn out to be dead. See hold_run for the errors.

    unheard_of: do not wait. It is asked about a holder whose death cannot be seen from here; the caller has a clock.
    """
    now = datetime.now(UTC)
    ours = LeaseRecord(
        holder=Holder.this_process(), purpose=purpose, since=now, renewed=now, ttl_seconds=ttl_seconds,
        depends_on=tuple(depends_on),
    )  # fmt: skip
    watched: tuple[str, float] | None = None  # an etag, and since when it has not changed
    try:
        while True:
            asked_at = _seconds()
            held, etag = read_lease(store, key) or (None, "")
            if held is None or held.released or held.holder.is_alive() is False:
                is_free = True
            elif unheard_of:
                is_free = held.holder.is_alive() is None and unheard_of()
            else:
                unchanged_since = watched[1] if watched and watched[0] == etag else math.inf
                is_free = time.monotonic() - unchanged_since > held.ttl_seconds * OBSERVED_TTLS
            if is_free or held is None:
                # A prune leaves it known what the run's flows started from: see retention.py.
                depends = held.depends_on if held and purpose == "prune" else ours.depends_on
                record = ours.model_copy(update={"depends_on": depends})
                try:
                    written = store.put_bytes(key, record.to_bytes(), if_absent=held is None, if_match=etag or None)
                except PreconditionFailedError:
                    if unheard_of:
                        raise
                    continue  # another process was faster: look again whom it belongs to
                if held is not None and not held.released and not unheard_of:
                    _log.warning("%s was left by %s, which is gone; it is taken over.", what, held.holder)
                return Lease(store, key, record, written, asked_at)

            was_renewed = watched is not None and watched[0] != etag
            if unheard_of or (held.purpose == purpose and (was_renewed or held.holder.is_alive())):
                other = "use another run id" if key.startswith("runs/") else "use another name"
                raise RunInUseError(
                    f"{what} is in use by {held.holder} since {_when(held.since)} ({store.uri}/{key}), renewed at "
                    f"{_when(held.renewed)} by that machine's clock; without a renewal it is free after "
                    f"{held.ttl_seconds * OBSERVED_TTLS:.0f} s. Wait for it or stop it, then run again, or {other}."
                )
            if watched is None:
                _log.warning(
                    "%s is held by %s since %s; waiting up to %.0f s to see whether it is alive.",
                    what, held.holder, _when(held.since), held.ttl_seconds * OBSERVED_TTLS,
                )  # fmt: skip
            if watched is None or was_renewed:
                watched = etag, time.monotonic()
            time.sleep(min(1.0, held.ttl_seconds / 10))
    except BaseException:
        ours.holder.let_go()
        raise


def try_lease(store: ObjectStore, key: str, *, unheard_of: Callable[[], bool], ttl_seconds: float) -> Lease | None:
    """Take a lease for pruning if nobody can be using it, without waiting; return None otherwise. See take_lease."""
    with suppress(PreconditionFailedError, RunInUseError):
        return take_lease(store, key, key, ttl_seconds=ttl_seconds, purpose="prune", unheard_of=unheard_of)
    return None


def read_lease(store: ObjectStore, key: str) -> tuple[LeaseRecord, str] | None:
    """Return a lease's record and etag, or None. A damaged one is refused: nobody can say whose it is."""
    advice = "It does not say who holds it. Make sure that no flow of this run is running, delete it, and run again."
    return LeaseRecord.find(store, key, advice=advice)


def _when(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="seconds")


def _seconds() -> float:
    """Return the seconds of a clock that also counts the time for which this machine slept, if it has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
