"""A stage that diverges is tried again at a lower rate, is known for it, and nobody has to try it twice."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_runs import tiny_profile
from stored_runs import Workshop

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.manifest import result_digest
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import DivergedError, RunSettingsChangedError, TrainerCrashedError
from relora_train.method.stages import plan_stages
from relora_train.reports.collect import collect_run_data
from relora_train.reports.report import render_page
from relora_train.runs.divergence import divergence_text, lower_learning_rate, train_by_policy
from relora_train.runs.publishing import Publisher
from relora_train.runs.run import Run, StageOutcome, fetch_parent
from relora_train.settings.profile import Profile, default_run_id
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store

EXPLODES = 1e3
"""At this rate a cycle of the tiny model diverges in a few steps, at EXPLODES * FACTOR it learns."""
FACTOR = 1e-5


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path / "store", patch)


def explosive(*, learning_rate: float = EXPLODES, **divergence: Any) -> Profile:
    return tiny_profile(
        optimizer={"learning_rate": learning_rate, "warm_start_learning_rate": 1e-2, "max_grad_norm": None},
        divergence=divergence,
    )


LOWER = {"on_divergence": "lower_lr", "factor": FACTOR, "max_retries": 2}


def test_without_a_policy_a_diverged_cycle_fails_and_leaves_no_trace(workshop: Workshop):
    with pytest.raises(DivergedError, match="on_divergence = 'lower_lr'"):
        workshop.train(explosive())
    assert workshop.names() == ["warm-start", "cycle-1"]
    assert not list(workshop.store.list("runs/tiny/diverged/"))
    with pytest.raises(DivergedError):
        workshop.train(explosive())
    assert workshop.names() == ["cycle-1"]  # tried again: nothing was asked to be remembered


def test_each_cycle_that_diverges_is_trained_at_a_lower_rate_from_its_own_parent(workshop: Workshop):
    warm, first, second = workshop.train(explosive(**LOWER))
    assert workshop.trained == [
        ("warm-start", EXPLODES),
        ("cycle-1", EXPLODES),
        ("cycle-1", EXPLODES * FACTOR),
        ("cycle-2", EXPLODES),  # every cycle begins at the profile's own rate
        ("cycle-2", EXPLODES * FACTOR),
    ]
    assert (warm.manifest.divergence, warm.manifest.variant_of) == ({}, None)
    for ref, parent in ((first, warm), (second, first)):
        record = ref.manifest.divergence
        assert (record["attempts"], record["profile_learning_rate"]) == (1, EXPLODES)
        assert record["learning_rate"] == record["learning_rate_factor"] * EXPLODES == EXPLODES * FACTOR
        assert "diverged" in record["failures"][0]
        assert ref.manifest.parent.fingerprint == parent.fingerprint
        assert ref.manifest.variant_of not in (None, ref.fingerprint)
    assert CheckpointStore(workshop.store, "tiny").latest() == second
    assert [event["stage"] for event in workshop.events if event["event"] == "diverged"] == ["cycle-1", "cycle-2"]
    assert verify_run(workshop.store, "tiny").is_clean


def test_a_variant_is_what_its_lower_rate_gives_by_itself(workshop: Workshop):
    """Same fingerprint and same bytes as a run that had the lower rate from the start."""
    lowered = workshop.train(explosive(**LOWER))[1]
    plain = workshop.train(explosive(learning_rate=EXPLODES * FACTOR), run_id="plain")[1]
    assert lowered.fingerprint == plain.fingerprint
    assert fetch_parent(lowered).joinpath("model.safetensors").read_bytes() == (
        fetch_parent(plain).joinpath("model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("policy", [LOWER, {}, {**LOWER, "factor": 0.5}])
def test_a_rerun_finds_the_variants_whatever_the_policy_is_by_then(policy: dict[str, Any], workshop: Workshop):
    line = workshop.train(explosive(**LOWER))
    workshop.names()
    assert workshop.train(explosive(**policy)) == line
    assert workshop.names() == []


def test_other_settings_are_still_refused_beside_a_variant(workshop: Workshop):
    workshop.train(explosive(**LOWER))
    with pytest.raises(RunSettingsChangedError, match=r"optimizer\.learning_rate"):
        workshop.train(explosive(**LOWER, learning_rate=2 * EXPLODES))


def test_an_attempt_that_diverged_is_not_made_again_after_a_crash(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """The next attempt crashes once; what a task's retry does then is train_by_policy again."""
    from relora_train.runs import divergence

    crashes: list[str] = []

    def crash_first(run: Any, stage: Any, *rest: Any, **options: Any) -> StageOutcome:
        if run.profile.optimizer.learning_rate < EXPLODES and not crashes:
            crashes.append(stage.name)
            raise TrainerCrashedError("killed")
        return train_stage(run, stage, *rest, **options)

    train_stage = divergence.train_stage
    monkeypatch.setattr(divergence, "train_stage", crash_first)
    with pytest.raises(TrainerCrashedError):
        workshop.train(explosive(**LOWER))
    assert workshop.names() == ["warm-start", "cycle-1"]
    workshop.train(explosive(**LOWER))
    assert workshop.names() == ["cycle-1", "cycle-2", "cycle-2"]


def test_after_the_last_attempt_the_error_names_every_rate_and_nothing_is_tried_again(workshop: Workshop):
    hopeless = explosive(on_divergence="lower_lr", factor=0.9, max_retries=2)
    with pytest.raises(DivergedError, match=r"\(1e\+03, 900, 810\).*runs/tiny/diverged"):
        workshop.train(hopeless)
    assert workshop.names() == ["warm-start", "cycle-1", "cycle-1", "cycle-1"]
    with pytest.raises(DivergedError, match="every learning rate tried"):
        workshop.train(hopeless)
    assert workshop.names() == []
    line = workshop.train(explosive(**LOWER))  # another factor: only its own rates are new
    assert workshop.names() == ["cycle-1", "cycle-2", "cycle-2"]
    assert line[1].manifest.divergence["attempts"] == 1


def test_the_folder_that_the_error_names_holds_what_blocks_another_try(workshop: Workshop):
    hopeless = explosive(on_divergence="lower_lr", factor=0.9, max_retries=1)
    with pytest.raises(DivergedError, match=f"delete {workshop.store.uri}/runs/tiny/diverged"):
        workshop.train(hopeless)
    for info in workshop.store.list("runs/tiny/diverged/"):
        workshop.store.delete(info.key)
    workshop.names()
    with pytest.raises(DivergedError):
        workshop.train(hopeless)
    assert workshop.names() == ["cycle-1", "cycle-1"]


def test_a_damaged_record_costs_one_attempt(workshop: Workshop):
    with pytest.raises(DivergedError):
        workshop.train(explosive(on_divergence="lower_lr", factor=0.9, max_retries=1))
    for info in workshop.store.list("runs/tiny/diverged/"):
        workshop.store.put_bytes(info.key, b"{")
    assert len(workshop.train(explosive(**LOWER))) == 3


@pytest.mark.parametrize("method", ["relora", "full"])
def test_lowering_changes_one_rate_of_one_stage(method: str):
    profile = explosive(**LOWER).model_copy(update={"method": method})
    for stage in plan_stages(profile):
        assert lower_learning_rate(profile, stage, 0) == profile
        lowered = lower_learning_rate(profile, stage, 2).optimizer
        warm = stage.kind == "warm_start"
        assert lowered.learning_rate == (EXPLODES if warm else EXPLODES * FACTOR**2)
        assert lowered.warm_start_learning_rate == (1e-2 * FACTOR**2 if warm else 1e-2)


def test_the_policy_makes_no_other_run():
    assert default_run_id(explosive(**LOWER)) == default_run_id(explosive())


def test_the_report_says_which_cycle_was_lowered(workshop: Workshop, tmp_path: Path):
    line = workshop.train(explosive(**LOWER))
    data = collect_run_data(line, files_in_stores(tmp_path / "cache"), spectra=False)
    said = "diverged once at learning rate 1e+03, trained at 0.01 (x 1e-05)"
    assert [divergence_text(row.divergence) for row in data.stages if row.divergence] == [said, said]
    page = render_page(data, {})
    assert f"cycle-1 {said}." in page
    assert json.loads((fetch_parent(line[1]) / "profile.json").read_text())["optimizer"]["learning_rate"] == (
        EXPLODES * FACTOR
    )


class Slow(MemoryStore):
    """Takes its time with files, and remembers in which order what was written."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.written: list[str] = []

    def put_file(self, key: str, path: Path) -> None:
        time.sleep(0.3)
        super().put_file(key, path)

    def put_bytes(self, key: str, *arguments: Any, **options: Any) -> str:
        self.written.append(key)
        return super().put_bytes(key, *arguments, **options)


def test_a_cycle_is_lowered_also_from_a_parent_that_is_still_being_stored(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    expected = workshop.train(explosive(**LOWER))
    slow, parent, waited = Slow(), None, []
    monkeypatch.setattr("relora_train.runs.run.open_store", lambda uri: slow if uri == slow.uri else open_store(uri))
    with Publisher() as publisher:
        run = Run("tiny", slow.uri, explosive(**LOWER), publisher=publisher)
        for stage in plan_stages(run.profile):
            outcome = train_by_policy(run, stage, workshop.dataset, parent, on_event=lambda event: None, provenance={})
            assert not outcome.stored
            waited += [not publisher.is_stored(outcome.checkpoint)]
            parent = outcome.checkpoint
        publisher.wait(parent)
    assert all(waited)
    line = CheckpointStore(slow, "tiny").list()
    assert [ref.fingerprint for ref in line] == [ref.fingerprint for ref in expected]
    assert [result_digest(ref.manifest) for ref in line] == [result_digest(ref.manifest) for ref in expected]
    order = [key.split("/")[2] for key in slow.written if key.endswith("manifest.json") or "/diverged/" in key]
    assert order == ["checkpoints", "diverged", "checkpoints", "diverged", "checkpoints"]  # never against a guess
