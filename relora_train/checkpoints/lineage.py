"""The descent of checkpoints, across runs, from their manifests alone; and the tombstones of those that were pruned.

A manifest names its parent by URI, fingerprint and step. The tree can thus be drawn when ancestors were deleted or lie
in stores that cannot be reached: they are named, never opened. Functions without a store are pure.

A tombstone is `<prefix>/deleted.json`, which retention writes before it deletes anything of a checkpoint. It holds the
manifest. The lineage stays known, and a stage whose checkpoint was pruned is not trained again. While the tombstone
exists, nothing can be committed under its prefix, so a delayed delete cannot remove new files. To train such a stage
again, use another run id, or delete the tombstone by hand.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field

from relora_train.checkpoints.layout import checkpoint_prefix, join_key
from relora_train.checkpoints.manifest import CheckpointManifest, StoredRecord, read_manifest
from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError
from relora_train.storage.base import ObjectStore

TOMBSTONE_NAME = "deleted.json"


@dataclass(frozen=True)
class CheckpointRef:
    """One committed checkpoint, found in some store."""

    uri: str
    """Names it everywhere: store URI and prefix."""
    store_uri: str
    prefix: str
    manifest: CheckpointManifest
    is_pruned: bool = False
    """Known from its tombstone only: it has a place in the lineage and no files."""

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def result_of(self) -> str:
        """The fingerprint of the stage whose result this is: its own, or that of the stage it replaced."""
        return self.manifest.variant_of or self.fingerprint


@dataclass(frozen=True)
class Line:
    """Checkpoints of one run, each the parent of the next, and the lines that leave it."""

    checkpoints: tuple[CheckpointRef, ...]
    """At least one, oldest first."""

    branches: tuple["Line", ...]
    """Lines whose first checkpoint was trained from one of these, in the order of these."""

    @property
    def run_id(self) -> str:
        return self.checkpoints[0].manifest.run_id

    def all_lines(self) -> Iterable["Line"]:
        """Yield this line and every line that descends from it."""
        yield self
        for branch in self.branches:
            yield from branch.all_lines()


def draw_lineage(refs: Iterable[CheckpointRef], heads: Collection[str] = ()) -> tuple[Line, ...]:
    """Return the tree of checkpoints: a line for each that has no parent among them, with all that descends from it.

    Every checkpoint is in it exactly once, whatever is missing and in whatever order they come. If a run parts, the way
    to one of `heads` (URIs) goes on and the others branch off; without a head there, all of them do.
    """
    by_uri = {ref.uri: ref for ref in refs}
    known = sorted(by_uri.values(), key=_order)
    children: dict[str, list[CheckpointRef]] = {}
    roots: list[CheckpointRef] = []
    parents = find_parents(known)
    for ref in known:
        (children.setdefault(parents[ref.uri].uri, []) if ref.uri in parents else roots).append(ref)
    on_line: set[str] = set()  # the heads, and every checkpoint that led to one
    for uri in heads:
        current = by_uri.get(uri)
        while current is not None and current.uri not in on_line:
            on_line.add(current.uri)
            current = parents.get(current.uri)
    return tuple(_line_from(root, children, on_line) for root in roots)


def find_parents(refs: Sequence[CheckpointRef]) -> Mapping[str, CheckpointRef]:
    """Map a checkpoint's URI to its parent among `refs`: the one its manifest names, else the same work elsewhere.

    A parent has done fewer steps, so damaged manifests can make no circle.
    """
    by_uri = {ref.uri: ref for ref in refs}
    same_work: dict[str, list[CheckpointRef]] = {}
    for ref in sorted(refs, key=_order):
        same_work.setdefault(ref.fingerprint, []).append(ref)
    found = {}
    for ref in refs:
        if (named := ref.manifest.parent) is None:
            continue
        copies = same_work.get(named.fingerprint, [])  # a store that was moved, or a run that was copied
        own_run = [copy for copy in copies if copy.manifest.run_id == ref.manifest.run_id]
        for candidate in (by_uri.get(named.uri), *own_run, *copies):
            if candidate and candidate.fingerprint == named.fingerprint and candidate.step < ref.step:
                found[ref.uri] = candidate
                break
    return found


def result_for(fingerprint: str, refs: Sequence[CheckpointRef], head: CheckpointRef | None) -> CheckpointRef | None:
    """Return the checkpoint of a run that is the result of the stage with this fingerprint, or None.

    Among several, the one on the head's line wins, then the stage's own, then the first one made.
    """
    line = {ref.fingerprint for ref in line_to(head, refs)} if head else set()
    candidates = [ref for ref in refs if fingerprint in (ref.fingerprint, ref.manifest.variant_of)]
    return min(
        candidates,
        key=lambda ref: (ref.fingerprint not in line, ref.fingerprint != fingerprint, ref.manifest.created_at, ref.uri),
        default=None,
    )


def is_left_behind(ref: CheckpointRef, parent: CheckpointRef | None, refs: Sequence[CheckpointRef]) -> bool:
    """Return True if `ref` lies on a line that the one to `parent` left when a variant replaced a stage."""
    ours = line_to(parent, refs) if parent else ()
    fingerprints, stages = {one.fingerprint for one in ours}, {one.result_of for one in ours}
    earlier = line_to(ref, refs)[:-1]
    return any(one.result_of in stages and one.fingerprint not in fingerprints for one in earlier)


def descendants(ref: CheckpointRef, refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Return those of `refs` that were trained from `ref`, directly or not, by step."""
    parents, below = find_parents([ref, *refs]), {ref.uri}
    found = []
    for one in sorted(refs, key=_order):  # a parent has done fewer steps, so it is met first
        if one.uri in parents and parents[one.uri].uri in below and one.uri != ref.uri:
            below.add(one.uri)
            found.append(one)
    return found


def line_to(ref: CheckpointRef, refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Return `ref` and those of `refs` that led to it, oldest first. A parent in another run ends the line."""
    by_fingerprint = {known.fingerprint: known for known in refs}
    line, seen = [ref], {ref.fingerprint}
    while (parent := line[0].manifest.parent) and parent.fingerprint in by_fingerprint.keys() - seen:
        line.insert(0, by_fingerprint[parent.fingerprint])
        seen.add(parent.fingerprint)
    return line


def without_pruned_ends(refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Leave out the removed checkpoints from which nothing came that is still there."""
    needed = {known.prefix for ref in refs if not ref.is_pruned for known in line_to(ref, refs)}
    return [ref for ref in refs if ref.prefix in needed]


def end_of_line(refs: Sequence[CheckpointRef], head: CheckpointRef | None, *, run_id: str) -> CheckpointRef | None:
    """Return the end of a run's line; see CheckpointStore.latest."""
    children: dict[str, list[CheckpointRef]] = {}
    for ref in refs:
        if ref.manifest.parent:
            children.setdefault(ref.manifest.parent.fingerprint, []).append(ref)
    if head is None:
        where, following = f"Run {run_id!r} has no head and", [ref for ref in refs if ref.fingerprint not in children]
    else:
        where, following = f"Run {run_id!r} stands at {head.uri}, after which", children.get(head.fingerprint, [])
    while following:
        if len(following) > 1:
            names = "".join(f"\n  {ref.uri}" for ref in following)
            raise CheckpointAmbiguousError(f"{where} there are {len(following)} lines. Name one by its URI:{names}")
        head = following[0]
        where, following = f"Run {run_id!r} stands at {head.uri}, after which", children.get(head.fingerprint, [])
    return head


def read_checkpoint(store: ObjectStore, prefix: str) -> CheckpointRef | None:
    """Return the checkpoint committed at a prefix, or None. A manifest that belongs elsewhere is refused."""
    manifest = read_manifest(store, prefix, CheckpointManifest)
    if manifest is None:
        return None
    ref = make_ref(store, prefix, manifest)
    if prefix and prefix != checkpoint_prefix(manifest.run_id, manifest.step, manifest.fingerprint):
        raise CheckpointCorruptError(
            f"{ref.uri} holds the manifest of run {manifest.run_id!r}, step {manifest.step}, fingerprint "
            f"{manifest.fingerprint[:12]}: it was copied or renamed. Move it back or delete it."
        )
    return ref


def make_ref(store: ObjectStore, prefix: str, manifest: CheckpointManifest) -> CheckpointRef:
    return CheckpointRef(f"{store.uri}/{prefix}".rstrip("/"), store.uri, prefix, manifest)


def in_order(refs: Iterable[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Return the checkpoints of a run by step."""
    return sorted(refs, key=lambda ref: (ref.step, ref.fingerprint))


def _order(ref: CheckpointRef) -> tuple[int, str, str]:
    return ref.step, ref.manifest.run_id, ref.uri


def _line_from(root: CheckpointRef, children: Mapping[str, list[CheckpointRef]], on_line: set[str]) -> Line:
    checkpoints, leaving = [root], []
    while following := children.get(checkpoints[-1].uri, []):
        own_run = [ref for ref in following if ref.manifest.run_id == root.manifest.run_id]
        going_on = own_run if len(own_run) == 1 else [ref for ref in own_run if ref.uri in on_line]
        chosen = going_on[0] if len(going_on) == 1 else None
        leaving += [ref for ref in following if ref is not chosen]
        if chosen is None:
            break
        checkpoints.append(chosen)
    return Line(tuple(checkpoints), tuple(_line_from(ref, children, on_line) for ref in leaving))


class Tombstone(StoredRecord):
    """Which checkpoint was here, when it was removed and why."""

    removed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """By the clock of the machine that removed it, for people."""
    reason: str
    manifest: CheckpointManifest


def read_tombstone(store: ObjectStore, prefix: str) -> Tombstone | None:
    """Return the tombstone at a prefix, or None."""
    advice = "It does not say which checkpoint was removed here. Delete it; the stage is then trained again on demand."
    found = Tombstone.find(store, join_key(prefix, TOMBSTONE_NAME), advice=advice)
    return found and found[0]


def removal_at(store: ObjectStore, prefix: str) -> str | None:
    """Return what to tell a reader of the checkpoint that was pruned at a prefix, or None if none was."""
    tombstone, uri = read_tombstone(store, prefix), join_key(store.uri, prefix)
    if tombstone is None:
        return None
    return (
        f"{uri} was removed by `relora prune` at {tombstone.removed_at.isoformat(sep=' ', timespec='seconds')} "
        f"({tombstone.reason}). Use another checkpoint of the run, train it again under another run id, or delete "
        f"{uri}/{TOMBSTONE_NAME} so that the same run id may train it again."
    )
