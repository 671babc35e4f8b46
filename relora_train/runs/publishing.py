"""Store finished checkpoints, one after another, while the stages after them train.

A publisher belongs to one flow, as its lease does. Guarantees:
1. In order: a checkpoint is committed only when all that were handed over before it are. One that cannot be stored
   holds up the later ones, whatever they have come to.
2. Files and lock of its work directory stay until it is stored and `release_files` says that nobody reads them any
   more. A checkpoint that is not stored in the end stays on this machine; the next run here stores it without training
   it again.
3. If the store turns out to hold another result in a checkpoint's place, nothing handed over later is ever stored.
4. After the block nothing becomes visible any more, not even by a transfer that could not be stopped.
While the store is away or denies access, it is tried again now and then, and training goes on. A flow that waits for a
checkpoint tries at once. If access is denied, it waits until half an hour has passed since the first denial.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import result_digest
from relora_train.errors import AccessDeniedError, PreconditionFailedError, ReLoRAError
from relora_train.runs.background import TICK_SECONDS, Background, pause_after

_log = logging.getLogger("relora_train.runs.publishing")

_RETRY_SECONDS = (5.0, 15.0, 60.0)
_DENIED_SECONDS = 1800.0  # for a person to renew a token; a device idles no longer once the next stage is trained


class AbandonedError(Exception):
    """The flow is over and nobody waits any more. A user never sees it."""


@dataclass(eq=False)
class Publication:
    """One finished checkpoint on its way into the store."""

    checkpoint: CheckpointRef
    """The checkpoint as it will be."""

    directory: Path
    """Its files on this machine."""

    store: Callable[[Callable[[], None]], CheckpointRef]
    """Commits it and returns what the store holds. Calls its argument, which may raise, before each write."""

    cancel: Callable[[], None]
    """Ends an attempt that is under way as soon as possible."""

    finish: Callable[[CheckpointRef | None], None]
    """Releases the files, given what the store holds; None if it holds nothing yet."""

    committed: CheckpointRef | None = None
    error: Exception | None = None
    failures: int = 0
    due: float = 0.0
    """The time of the next attempt, by the monotonic clock."""
    denied_until: float = 0.0
    """The end of the wait for access, by the same clock, once it was denied."""
    awaits_access: bool = False
    """The last failure was a denial, and a flow that waits for this checkpoint goes on waiting."""

    @property
    def superseded(self) -> bool:
        """True if the store holds another result in its place."""
        return self.committed is not None and self.error is not None

    @property
    def stored(self) -> bool:
        return self.committed is not None and self.error is None

    @property
    def waits(self) -> str:
        """Say that it is not stored yet, and what stores it."""
        return (
            f"The checkpoint of {self.checkpoint.manifest.stage} is not stored yet ({self.checkpoint.uri}). It waits "
            f"on this machine in {self.directory}: the same command here stores it without training it again."
        )


class Publisher(Background):
    """Stores what it is handed over, for the length of a `with` block.

    The end of the block waits for the transfer that is under way. After a stop (an exception that is no Exception) it
    waits 25 seconds at most, or until 28 seconds after the trainer was told to.
    """

    def __init__(self, *, retry_seconds: tuple[float, ...] = _RETRY_SECONDS) -> None:
        super().__init__("publisher")
        self._retry_seconds = retry_seconds
        self._publications: list[Publication] = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        try:
            self._close(self._seconds_left() if stopped else None)
        finally:
            with self._changed:
                self._abandoned = True
                left, self._publications = self._publications, []
            for publication in left:
                if publication.committed is None:
                    publication.cancel()
                publication.finish(publication.committed)
                if publication.committed is None and publication.error is None:
                    _log.warning("%s", publication.waits)

    def offer(self, publication: Publication) -> None:
        """Store this one after all that were offered before. Returns at once."""
        with self._changed:
            self._publications.append(publication)
            self._changed.notify_all()

    def find(self, fingerprint: str) -> Publication | None:
        """Return the publication of exactly this work, from when it is offered until its files are released."""
        with self._changed:
            return next((one for one in self._publications if one.checkpoint.fingerprint == fingerprint), None)

    @property
    def has_started(self) -> bool:
        """True once the block has begun: the thread takes what is offered."""
        return self._thread.ident is not None

    def is_stored(self, checkpoint: CheckpointRef) -> bool:
        """Return True if the store holds the checkpoint. One that was never offered came from there."""
        publication = self.find(checkpoint.fingerprint)
        return publication is None or publication.stored

    def wait(self, checkpoint: CheckpointRef) -> CheckpointRef:
        """Return the checkpoint as the store holds it, once it does. One that was never offered came from there.

        If an earlier attempt has failed, begin another at once and raise what it fails with: you may call again.
        Raises PreconditionFailedError if the store holds another result in its place.
        """
        with self._changed:
            known = self.find(checkpoint.fingerprint)
            if known is None:
                return checkpoint
            for publication in self._publications[: self._publications.index(known) + 1]:
                failures = publication.failures
                if not publication.superseded:
                    publication.due = 0.0
                    self._changed.notify_all()
                while not publication.stored:
                    over = publication.failures > failures and not publication.awaits_access
                    if publication.error is not None and (over or publication.superseded):
                        raise publication.error
                    if not self._thread.is_alive():
                        raise AbandonedError(f"{publication.checkpoint.uri} is not stored any more: its flow is over.")
                    self._changed.wait(TICK_SECONDS)
        return known.committed or checkpoint

    def release_files(self, checkpoint: CheckpointRef) -> None:
        """Release the local files of a stored checkpoint, which nobody reads any more."""
        with self._changed:
            publication = self.find(checkpoint.fingerprint)
            if publication is None or not publication.stored:
                return
            self._publications.remove(publication)
        publication.finish(publication.committed)

    def raise_if_superseded(self) -> None:
        """Raise PreconditionFailedError if the result of later work could never be committed."""
        with self._changed:
            for publication in self._publications:
                if publication.superseded and publication.error is not None:
                    raise publication.error

    def _run(self) -> None:
        while (publication := self._next()) is not None:
            committed: CheckpointRef | None = None
            error: Exception | None = None
            try:
                committed = publication.store(self._raise_if_abandoned)
            except Exception as failure:
                error = failure
            else:
                theirs = committed.manifest
                if result_digest(theirs) != result_digest(publication.checkpoint.manifest):
                    error = PreconditionFailedError(
                        f"{committed.uri} was committed by another attempt ({theirs.attempt}, at "
                        f"{theirs.created_at.isoformat(timespec='seconds')}) with another result than this machine's. "
                        f"What was trained here after {theirs.stage} began from bytes that are not the run's, and "
                        "nothing of it is committed. Run the same command again: it goes on from the stored checkpoint."
                    )
            with self._changed:
                publication.committed, publication.error = committed, error
                if error is not None:
                    self._plan_next_attempt(publication, error)
                self._changed.notify_all()

    def _raise_if_abandoned(self) -> None:
        if self._abandoned:
            raise AbandonedError

    def _next(self) -> Publication | None:
        """Wait until the first that is not stored is due, and return it; None when there will be no more."""
        with self._changed:
            while not self._abandoned:
                first = next((one for one in self._publications if not one.stored), None)
                left = math.inf if first is None else first.due - time.monotonic()
                if left <= 0:
                    return first
                if self._closing:
                    return None
                self._changed.wait(None if math.isinf(left) else left)
            return None

    def _plan_next_attempt(self, publication: Publication, error: Exception) -> None:
        publication.failures += 1
        now, denied, advice = time.monotonic(), isinstance(error, AccessDeniedError), ""
        if denied and not publication.denied_until:
            publication.denied_until = now + _DENIED_SECONDS
            until = datetime.now().astimezone() + timedelta(seconds=_DENIED_SECONDS)
            advice = (
                "Renew the credentials in the file or service that they come from: they are read again for each "
                "attempt, for as long as the next stage trains, and until "
                f"{until.isoformat(sep=' ', timespec='seconds')} in any case. "
            )
        publication.awaits_access = denied and now < publication.denied_until
        pause = pause_after(publication.failures, self._retry_seconds)
        if publication.awaits_access:
            pause = min(pause, publication.denied_until - now)
        may_help = denied or (isinstance(error, ReLoRAError) and error.retryable)
        publication.due = now + pause if may_help else math.inf
        if (publication.failures == 1 or advice) and not self._abandoned:
            _log.warning("%s Training goes on meanwhile. %s(%s)", publication.waits, advice, error)
