"""How checkpoints descend from each other, across runs, from their manifests alone. Pure, but for reading them; light.

A manifest names its parent by URI, fingerprint and step. That is enough to draw the tree when ancestors were deleted or
lie in stores that cannot be reached: they are named, never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from relora_train.checkpoints.layout import parse_checkpoint_prefix
from relora_train.checkpoints.manifest import MANIFEST_NAME
from relora_train.checkpoints.store import CheckpointRef, CheckpointStore, line_to, read_checkpoint
from relora_train.errors import CheckpointError
from relora_train.storage.base import ObjectStore

_log = logging.getLogger("relora_train.checkpoints.lineage")


@dataclass(frozen=True)
class Line:
    """Checkpoints of one run, each the parent of the next, and the lines that leave it."""

    checkpoints: tuple[CheckpointRef, ...]
    """At least one, oldest first."""

    branches: tuple[Line, ...]
    """Lines whose first checkpoint was trained from one of these, in the order of these."""

    @property
    def run_id(self) -> str:
        return self.checkpoints[0].manifest.run_id

    def all_lines(self) -> Iterable[Line]:
        """This line and everything that descends from it."""
        yield self
        for branch in self.branches:
            yield from branch.all_lines()


def draw_lineage(refs: Iterable[CheckpointRef], heads: Collection[str] = ()) -> tuple[Line, ...]:
    """The tree of checkpoints: one line for each that has no parent among them, with all that descends from it. Pure.

    Every checkpoint is in it exactly once, whatever is missing and in whatever order they come. Where a run parts, the
    way to one of `heads` (URIs) goes on and the others branch off; with none all of them do.
    """
    by_uri = {ref.uri: ref for ref in refs}
    known = sorted(by_uri.values(), key=_order)
    children: dict[str, list[CheckpointRef]] = {}
    roots: list[CheckpointRef] = []
    parents = find_parents(known)
    for ref in known:
        (children.setdefault(parents[ref.uri].uri, []) if ref.uri in parents else roots).append(ref)
    on_line = _ways_to(heads, by_uri, parents)
    return tuple(_line_from(root, children, on_line) for root in roots)


def find_parents(refs: Sequence[CheckpointRef]) -> Mapping[str, CheckpointRef]:
    """URI of a checkpoint -> its parent, where that is among `refs`: the one its manifest names, else the same work.

    A parent has done fewer steps, so damaged manifests can make no circle.
    """
    by_uri = {ref.uri: ref for ref in refs}
    same_work: dict[str, list[CheckpointRef]] = {}
    for ref in sorted(refs, key=_order):
        same_work.setdefault(ref.fingerprint, []).append(ref)
    found = {}
    for ref in refs:
        named = ref.manifest.parent
        if named is None:
            continue
        copies = same_work.get(named.fingerprint, [])  # a store that was moved, or a run that was copied
        own_run = [copy for copy in copies if copy.manifest.run_id == ref.manifest.run_id]
        there = by_uri.get(named.uri)
        for candidate in (*([there] if there else []), *own_run, *copies):
            if candidate.fingerprint == named.fingerprint and candidate.step < ref.step:
                found[ref.uri] = candidate
                break
    return found


def choose_result(fingerprint: str, refs: Sequence[CheckpointRef], head: CheckpointRef | None) -> CheckpointRef | None:
    """The checkpoint of a run that is the result of the stage with this fingerprint, or None. Pure.

    Of several, the one that the head's line goes through; else the stage's own; else the first one made.
    """
    line = {ref.fingerprint for ref in line_to(head, refs)} if head else set()
    candidates = [ref for ref in refs if fingerprint in (ref.fingerprint, ref.manifest.variant_of)]
    candidates.sort(
        key=lambda ref: (ref.fingerprint not in line, ref.fingerprint != fingerprint, ref.manifest.created_at, ref.uri)
    )
    return candidates[0] if candidates else None


def set_aside(ref: CheckpointRef, parent: CheckpointRef | None, refs: Sequence[CheckpointRef]) -> bool:
    """Whether `ref` lies on a line that the one to `parent` left where a stage was replaced by a variant. Pure."""
    ours = line_to(parent, refs) if parent else ()
    fingerprints, stages = {one.fingerprint for one in ours}, {one.stands_for for one in ours}
    earlier = line_to(ref, refs)[:-1]
    return any(one.stands_for in stages and one.fingerprint not in fingerprints for one in earlier)


def descendants(ref: CheckpointRef, refs: Sequence[CheckpointRef]) -> Sequence[CheckpointRef]:
    """Those of `refs` that were trained from `ref`, directly or not, by step. Pure."""
    parents = find_parents([ref, *refs])
    below: set[str] = {ref.uri}
    for one in sorted(refs, key=_order):  # a parent has done fewer steps, so it is met first
        if one.uri in parents and parents[one.uri].uri in below:
            below.add(one.uri)
    return [one for one in sorted(refs, key=_order) if one.uri in below and one.uri != ref.uri]


def read_checkpoints(store: ObjectStore) -> list[CheckpointRef]:
    """Every committed checkpoint of every run of a store; a damaged manifest is left out with a warning."""
    refs = []
    for info in store.list("runs/"):
        prefix, _, name = info.key.rpartition("/")
        if name != MANIFEST_NAME or parse_checkpoint_prefix(prefix) is None:
            continue
        try:
            ref = read_checkpoint(store, prefix)
        except CheckpointError as error:
            _log.warning("%s", error)  # a tree is where an operator looks for what is left, so it must still come
            continue
        refs += [ref] if ref else []
    return refs


def read_heads(store: ObjectStore, refs: Iterable[CheckpointRef]) -> set[str]:
    """URIs of the heads of the runs that `refs` belong to; a run whose head is lost has none."""
    heads = set()
    for run_id in {ref.manifest.run_id for ref in refs if ref.store_uri == store.uri}:
        try:
            head = CheckpointStore(store, run_id).head(missing_ok=True)
        except CheckpointError as error:
            _log.warning("%s", error)
            continue
        heads |= {head.uri} if head else set()
    return heads


def _order(ref: CheckpointRef) -> tuple[int, str, str]:
    return ref.step, ref.manifest.run_id, ref.uri


def _ways_to(
    heads: Collection[str], by_uri: Mapping[str, CheckpointRef], parents: Mapping[str, CheckpointRef]
) -> set[str]:
    """URIs of the heads and of every checkpoint that led to one."""
    found = set()
    for uri in heads:
        current = by_uri.get(uri)
        while current is not None and current.uri not in found:
            found.add(current.uri)
            current = parents.get(current.uri)
    return found


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
