"""The tree across runs comes from manifests alone, whole or with parts missing, and loses no checkpoint."""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import tiny_profile
from stored_runs import Workshop

from relora_train.checkpoints.lineage import (
    CheckpointRef,
    Line,
    descendants,
    draw_lineage,
    find_parents,
    is_left_behind,
    result_for,
)
from relora_train.checkpoints.manifest import CheckpointManifest, ParentRef
from relora_train.checkpoints.names import read_checkpoints
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.runs import lineage_view


def checkpoint(
    work: str, *, run_id: str = "run", step: int, parent: CheckpointRef | None = None, store: str = "memory://a",
    **changes: Any,
) -> CheckpointRef:  # fmt: skip
    fingerprint = hashlib.sha256(work.encode()).hexdigest()
    manifest = CheckpointManifest(
        files=(), attempt="a", run_id=run_id, profile="p", stage=work, step=step, cycle=0, tokens_seen=0,
        fingerprint=fingerprint, dataset_id="d", dataset_uri="memory://a/datasets/d",
        parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
        **{"fingerprint_settings": {}, **changes},
    )  # fmt: skip
    prefix = f"runs/{run_id}/checkpoints/step-{step:08d}-{fingerprint[:12]}"
    return CheckpointRef(f"{store}/{prefix}", store, prefix, manifest)


@st.composite
def histories(draw: st.DrawFn) -> list[CheckpointRef]:
    """Checkpoints of a few runs in two stores, each from an earlier one or from nothing."""
    refs: list[CheckpointRef] = []
    for number in range(draw(st.integers(1, 14))):
        parent = draw(st.sampled_from([None, *refs]))
        refs.append(
            checkpoint(
                f"work {number}",
                run_id=draw(st.sampled_from(["a", "b", parent.manifest.run_id if parent else "c"])),
                step=(parent.step if parent else 0) + draw(st.integers(1, 5)),
                parent=parent,
                store=draw(st.sampled_from(["memory://a", "memory://b"])),
            )
        )
    return refs


def all_of(lines: Collection[Line]) -> list[CheckpointRef]:
    return [ref for line in lines for part in line.all_lines() for ref in part.checkpoints]


@given(histories(), st.data())
def test_every_checkpoint_is_in_the_tree_once_whatever_was_deleted(refs: list[CheckpointRef], data: st.DataObject):
    left = data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.uri))
    heads = {ref.uri for ref in data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.uri))}
    assert sorted(ref.uri for ref in all_of(draw_lineage(left, heads))) == sorted(ref.uri for ref in left)


@given(histories(), st.data())
def test_whoever_stands_below_another_was_trained_from_it(refs: list[CheckpointRef], data: st.DataObject):
    left = data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.uri))
    heads = {ref.uri for ref in data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.uri))}
    uris = {ref.uri for ref in left}

    def parent_uri(ref: CheckpointRef) -> str | None:
        return ref.manifest.parent.uri if ref.manifest.parent else None

    for root in draw_lineage(left, heads):
        assert parent_uri(root.checkpoints[0]) not in uris  # a line begins where its parent is missing
        for line in root.all_lines():
            chain = line.checkpoints
            assert {ref.manifest.run_id for ref in chain} == {line.run_id}
            assert [parent_uri(ref) for ref in chain[1:]] == [ref.uri for ref in chain[:-1]]
            places = [ref.uri for ref in chain]
            leaving = [places.index(parent_uri(branch.checkpoints[0])) for branch in line.branches]
            assert leaving == sorted(leaving)


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_a_listing_does_not_matter(refs: list[CheckpointRef], random: Any):
    shuffled = random.sample(refs, len(refs))
    assert draw_lineage(shuffled) == draw_lineage(refs) == draw_lineage([*refs, *shuffled])


@given(histories(), st.data())
def test_the_way_to_a_head_is_never_a_branch_of_its_own_run(refs: list[CheckpointRef], data: st.DataObject):
    head = data.draw(st.sampled_from(refs))
    for root in draw_lineage(refs, {head.uri}):
        for line in root.all_lines():
            if head not in all_of([line]) or head in line.checkpoints:
                continue
            branch = next(branch for branch in line.branches if head in all_of([branch]))
            assert branch.run_id != line.run_id


@given(histories(), st.data())
def test_descendants_are_what_would_be_lost_ground_without_it(refs: list[CheckpointRef], data: st.DataObject):
    chosen = data.draw(st.sampled_from(refs))
    parents = find_parents(refs)

    def led_by(ref: CheckpointRef | None) -> bool:
        return ref is not None and (ref.uri == chosen.uri or led_by(parents.get(ref.uri)))

    expected = {ref.uri for ref in refs if led_by(parents.get(ref.uri))}
    assert {ref.uri for ref in descendants(chosen, refs)} == expected


def test_manifests_that_name_each_other_make_no_circle():
    one, two = checkpoint("one", step=1), checkpoint("two", step=2)
    circle = [checkpoint("one", step=1, parent=two), checkpoint("two", step=2, parent=one)]
    assert len(all_of(draw_lineage(circle))) == 2


def test_a_store_that_was_moved_keeps_its_tree():
    """Parents are found by fingerprint where their old URI leads nowhere; a copy in the own run comes first."""
    first = checkpoint("warm-start", step=1, store="memory://old")
    second = checkpoint("cycle-1", step=2, parent=first, store="memory://new")
    moved = checkpoint("warm-start", step=1, store="memory://new")
    elsewhere = checkpoint("warm-start", step=1, run_id="another", store="memory://new")
    lines = draw_lineage([elsewhere, moved, second])
    assert [line.checkpoints for line in lines] == [(elsewhere,), (moved, second)]


# --- which result is the run's ---


def variants() -> tuple[list[CheckpointRef], list[CheckpointRef]]:
    """A plain line of three, and a second cycle-1 made in place of the first, with a cycle-2 of its own."""
    warm = checkpoint("warm-start", step=1)
    plain = [checkpoint("cycle-1", step=2, parent=warm)]
    plain.append(checkpoint("cycle-2", step=3, parent=plain[0]))
    other = [checkpoint("cycle-1 again", step=2, parent=warm, variant_of=plain[0].fingerprint)]
    other.append(checkpoint("cycle-2 again", step=3, parent=other[0]))
    return [warm, *plain], [warm, *other]


def test_the_heads_line_says_which_of_two_results_counts():
    plain, other = variants()
    refs, stage = [*plain, *other[1:]], plain[1].fingerprint
    assert result_for(stage, refs, None) == plain[1]
    assert result_for(stage, refs, plain[2]) == plain[1]
    assert result_for(stage, refs, other[2]) == other[1]
    assert result_for(stage, [*other], None) == other[1]
    assert result_for("0" * 64, refs, other[2]) is None


def test_what_followed_a_replaced_stage_is_set_aside_and_nothing_else():
    plain, other = variants()
    refs = [*plain, *other[1:]]
    assert is_left_behind(plain[2], other[1], refs) and is_left_behind(other[2], plain[1], refs)
    assert not is_left_behind(plain[2], plain[1], refs) and not is_left_behind(plain[1], plain[0], refs)
    assert not is_left_behind(plain[2], None, refs)


# --- shown ---


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """'base' of two cycles; 'small' from its cycle-1 with another rank; 'base' itself extended by a third cycle."""
    root = tmp_path_factory.mktemp("family") / "store"
    with pytest.MonkeyPatch.context() as patch:
        workshop = Workshop(root, patch)
        _, first, last = workshop.train(tiny_profile(), "base")
        workshop.train(tiny_profile(relora={"rank": 2, "alpha": 2}), "small", first)
        workshop.train(tiny_profile(schedule={"cycles": 3}), "base", last)
    return workshop


def shown(workshop: Workshop) -> str:
    refs = read_checkpoints(workshop.store)
    return "\n".join(str(part) for part in lineage_view(draw_lineage(refs)))


def test_the_tree_names_runs_stages_and_what_changed(family: Workshop):
    text = shown(family)
    assert "base  warm-start → cycle-1 → cycle-2 → cycle-3  step 30" in text
    assert "└─ after cycle-1: small  cycle-2  step 22" in text
    assert "relora.rank: 4 -> 2" in text


def test_an_extended_run_stays_one_line_and_its_head_is_its_end(family: Workshop):
    run = CheckpointStore(family.store, "base")
    assert run.latest().manifest.stage == run.head().manifest.stage == "cycle-3"
    assert len(run.ancestry(run.latest())) == 4


def test_nothing_is_left_of_an_extended_run(family: Workshop):
    end = CheckpointStore(family.store, "base").latest()
    assert family.train(tiny_profile(schedule={"cycles": 3}), "base", end) == []


def test_the_commands_draw_the_tree(family: Workshop, relora):
    text = relora("runs", "--tree", "--store", family.store_uri).out
    assert "●cycle-3" in text and "└─ after cycle-1: small" in text
    (root,) = json.loads(relora("runs", "--tree", "--json", "--store", family.store_uri).out)
    assert [branch["run_id"] for branch in root["branches"]] == ["small"]
    text = relora("show", "small@cycle-2", "--store", family.store_uri).out
    assert "▶cycle-2" in text and "base  warm-start" in text


@pytest.fixture
def copy(family: Workshop, tmp_path: Path) -> Path:
    return shutil.copytree(family.store_uri.removeprefix("file://"), tmp_path / "store")


def test_ancestors_that_are_gone_are_named(family: Workshop, copy: Path, relora):
    shutil.rmtree(copy / "runs" / "base")
    text = relora("runs", "--tree", "--store", str(copy)).out
    assert "small  ●cycle-2" in text and "which is not here" in text
    assert f"from {family.store_uri}/runs/base/checkpoints/step-00000014-" in text


def test_a_damaged_manifest_hides_no_other(copy: Path, relora):
    next((copy / "runs" / "base" / "checkpoints").glob("step-00000014-*/manifest.json")).write_text("{")
    text = relora("runs", "--tree", "--store", str(copy)).out
    assert "base  cycle-2 → ●cycle-3" in text and "small  ●cycle-2" in text and "base  warm-start" in text
