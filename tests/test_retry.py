"""A stage made again on purpose is compared byte for byte; nothing committed is ever overwritten or lost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_runs import tiny_profile
from stored_runs import Workshop

from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.evaluate import retry_view
from relora_train.errors import CheckpointNotFoundError, ConfigError, RunInUseError
from relora_train.events import Event
from relora_train.method.stages import plan_stages, stages_after
from relora_train.runs.retry import RetryOutcome, differing_files, retry_stage, stage_of


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path / "store", patch)


@pytest.fixture
def line(workshop: Workshop) -> list[CheckpointRef]:
    made = workshop.train(tiny_profile())
    workshop.names()
    return made


def ignore(event: Event) -> None:
    """Drop an event."""


def text_of(outcome: RetryOutcome) -> str:
    return "\n".join(map(str, retry_view(outcome)))


def contents(workshop: Workshop) -> dict[str, bytes]:
    keys = [info.key for info in workshop.store.list("runs/") if not info.key.endswith("/lease.json")]
    return {key: workshop.store.get_bytes(key)[0] for key in keys}


@pytest.mark.parametrize("index", [0, 1])
def test_on_a_cpu_every_stage_comes_out_identical_and_nothing_changes(
    index: int, workshop: Workshop, line: list[CheckpointRef]
):
    before = contents(workshop)
    outcome = retry_stage(line[index], on_event=ignore, replace=True)
    assert workshop.names() == [line[index].manifest.stage]
    assert outcome.identical and outcome.replacement is None
    assert outcome.evaluation == line[index].manifest.evaluation
    assert outcome.descendants == tuple(line[index + 1 :])
    assert contents(workshop) == before
    assert "identical, byte for byte: nothing changes" in text_of(outcome)


def test_a_branch_with_another_schedule_is_retried_as_what_it_was(workshop: Workshop, line: list[CheckpointRef]):
    """Its stage is in no plan: it is read back from the settings of its fingerprint."""
    changed = tiny_profile(schedule={"cycle_length": 5, "cycles": 3})
    branch = workshop.train(changed, "branch", line[1])
    for ref, stage in zip(branch, stages_after(changed, line[1].manifest), strict=True):
        assert stage_of(ref.manifest) == stage
    assert retry_stage(branch[-1], on_event=ignore).identical


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stage_is_read_back_from_its_manifest(method: str, workshop: Workshop):
    profile = tiny_profile(method=method)
    made = workshop.train(profile)
    assert [stage_of(ref.manifest) for ref in made] == list(plan_stages(profile))


def test_other_bytes_are_told_and_leave_the_committed_ones_alone(workshop: Workshop, line: list[CheckpointRef]):
    before, workshop.disturbed = contents(workshop), True
    outcome = retry_stage(line[1], on_event=ignore)
    assert "model.safetensors" in outcome.differing_files and outcome.replacement is None
    assert contents(workshop) == before
    text = text_of(outcome)
    assert "The committed checkpoint stays the run's" in text and line[2].uri in text


def test_a_replacement_takes_the_line_and_sets_its_descendants_aside(workshop: Workshop, line: list[CheckpointRef]):
    before, workshop.disturbed = contents(workshop), True
    outcome = retry_stage(line[1], on_event=ignore, replace=True)
    workshop.disturbed = False
    new = outcome.replacement
    assert new is not None and new.fingerprint != line[1].fingerprint
    assert new.manifest.variant_of == line[1].fingerprint and new.manifest.parent == line[1].manifest.parent
    run = CheckpointStore(workshop.store, "tiny")
    assert run.latest() == run.head() == new
    assert resolve_checkpoint("tiny@cycle-1", workshop.store) == new
    after = contents(workshop)
    assert all(after[key] == content for key, content in before.items() if not key.endswith("refs/head.json"))
    assert resolve_checkpoint(line[2].uri, workshop.store) == line[2]  # abandoned, and as good as ever
    text = text_of(outcome)
    assert new.uri in text and line[1].uri in text and line[2].uri in text and "own command" in text

    workshop.names()
    again = workshop.train(tiny_profile())  # the run's own command goes on from the replacement
    assert workshop.names() == ["cycle-2"]
    assert again[:2] == [line[0], new]
    assert again[2].manifest.parent.fingerprint == new.fingerprint
    assert workshop.train(tiny_profile()) == again and workshop.names() == []
    assert run.latest() == again[2]
    assert retry_stage(again[2], on_event=ignore).identical


def test_nothing_is_replaced_under_a_flow_that_runs(workshop: Workshop, line: list[CheckpointRef]):
    before, workshop.disturbed = contents(workshop), True
    with hold_run(workshop.store, "tiny"):
        with pytest.raises(RunInUseError, match="in use by process"):
            retry_stage(line[1], on_event=ignore, replace=True)
        assert workshop.names() == []
        assert not retry_stage(line[1], on_event=ignore).identical  # only compares
    assert contents(workshop) == before


def test_a_replacement_can_be_retried_and_replaced_itself(workshop: Workshop, line: list[CheckpointRef]):
    workshop.disturbed = True
    new = retry_stage(line[2], on_event=ignore, replace=True).replacement
    assert retry_stage(new, on_event=ignore).identical  # disturbed in the same way
    workshop.disturbed = False
    newer = retry_stage(new, on_event=ignore, replace=True).replacement
    assert newer.manifest.variant_of == line[2].fingerprint
    assert differing_files(newer.manifest, line[2].manifest) == ()
    assert workshop.train(tiny_profile()) == [*line[:2], newer]


def test_what_is_off_the_line_is_not_replaced(workshop: Workshop, line: list[CheckpointRef]):
    workshop.disturbed = True
    retry_stage(line[1], on_event=ignore, replace=True)
    workshop.names()
    for ref in line[1:]:
        with pytest.raises(ConfigError, match="not on the line"):
            retry_stage(ref, on_event=ignore, replace=True)
    assert workshop.names() == []


def test_without_its_parent_a_stage_cannot_be_retried(workshop: Workshop, line: list[CheckpointRef]):
    shutil.rmtree(line[0].uri.removeprefix("file://"))
    with pytest.raises(CheckpointNotFoundError, match=f"trained from {line[0].uri}, which is not there"):
        retry_stage(line[1], on_event=ignore)
    assert retry_stage(line[2], on_event=ignore).identical


def test_settings_that_mean_something_else_today_prove_nothing(workshop: Workshop, line: list[CheckpointRef]):
    settings = {**line[1].manifest.fingerprint_settings, "relora.rank": 3}
    other: CheckpointManifest = line[1].manifest.model_copy(update={"fingerprint_settings": settings})
    ref = CheckpointRef(line[1].uri, line[1].store_uri, line[1].prefix, other)
    with pytest.raises(ConfigError, match=r"relora\.rank: 3 -> 4"):
        retry_stage(ref, on_event=ignore)


def test_a_retry_that_was_stopped_proves_nothing_to_the_next(workshop: Workshop, line: list[CheckpointRef]):
    """What it committed on this disk is not taken for a fresh attempt."""
    from relora_train.storage.workspace import cache_root

    left = cache_root() / "work" / "tiny" / f"retry-cycle-1-{line[1].fingerprint[:12]}" / "checkpoint"
    shutil.copytree(line[1].uri.removeprefix("file://"), left)
    workshop.disturbed = True
    assert not retry_stage(line[1], on_event=ignore).identical


def test_the_command_runs_a_process_and_says_what_came_of_it(tmp_path: Path, monkeypatch, relora):
    with pytest.MonkeyPatch.context() as patch:
        workshop = Workshop(tmp_path / "store", patch)
        warm_start = workshop.train(tiny_profile(schedule={"cycles": 1}))[0]
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    done = relora("retry", "tiny@cycle-1", "--store", workshop.store_uri, "--json")
    record = json.loads(done.out)
    assert (
        done.code == 0 and record["identical"] and record["descendant_uris"] == [] and record["replacement_uri"] is None
    )
    (tmp_path / "store" / warm_start.prefix / "manifest.json").unlink()
    refused = relora("retry", "tiny@cycle-1", "--store", workshop.store_uri)
    assert refused.code == 6 and "is not there any more" in refused.err and "once more" not in refused.err
