"""One process for many requests: the same bits as a process each, and no request after one that did not end well."""

import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from stage_runs import manifest_of, stage_request, tiny_profile
from test_launch import is_running, wait_until_gone
from test_ranks import TWO, ranks_below
from tiny_data import write_tiny_dataset

from relora_train.distributed import SLOW, Ranks
from relora_train.errors import CorpusTooSmallError, TrainerCrashedError
from relora_train.events import Event
from relora_train.process import NO_MORE, SERVED, TAKEN
from relora_train.runs.workers import Worker, run_worker
from relora_train.settings.profile import Profile
from relora_train.training import kept_ranks
from relora_train.training.requests import EvaluationRequest, RanksRequest
from relora_train.training.torch_settings import release_memory
from relora_train.training.trainer import run_stage

STAGES = ("warm-start", "cycle-1", "cycle-2")


@pytest.fixture
def worker() -> Iterator[Worker]:
    with closing(Worker(keeps=True)) as worker:
        yield worker


class Course:
    """The processes that stages ran in."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def __call__(self, event: Event) -> None:
        if event["event"] == "stage_started":
            self.pids.append(event["pid"])


def train(worker: Worker, profile: Profile, stage: str, dataset: Path, root: Path, course: Course) -> Path:
    """Train a stage from the one before it."""
    before = STAGES.index(stage) - 1
    request = stage_request(profile, stage, dataset, root / stage, root / STAGES[before] if before >= 0 else None)
    path, launch = root / f"{stage}.json", profile.launch
    worker.run("relora_train.training.trainer", request, path, on_event=course, launch=launch)
    return root / stage


def files_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by name of everything but what tells the time."""
    files = manifest_of(checkpoint)["files"]
    return {file["path"]: file["sha256"] for file in files if file["path"] != "metrics.jsonl"}


def evaluation_of(checkpoint: Path, profile: Profile, dataset: Path, result: Path) -> EvaluationRequest:
    return EvaluationRequest(
        profile=profile,
        checkpoint_directory=checkpoint,
        dataset_directory=dataset,
        result_path=result,
        sequences=16,
    )


def test_stages_in_one_process_give_the_bits_of_a_process_each(worker: Worker, dataset: Path, tmp_path: Path):
    """With dropout, whose draws would show any state that one stage leaves to the next."""
    profile, course = tiny_profile(relora={"dropout": 0.2}, batch={"micro_sequences": 4}), Course()
    worker.start(profile)
    started = worker._worker
    for stage in STAGES:
        train(worker, profile, stage, dataset, tmp_path / "kept", course)
    assert worker._worker is started
    (pid,) = set(course.pids)
    for parent, stage in itertools.pairwise(STAGES):  # the first had its process to itself, as it were
        alone = tmp_path / "alone" / stage
        request = stage_request(profile, stage, dataset, alone, tmp_path / "kept" / parent)
        run_worker("relora_train.training.trainer", request, tmp_path / "request.json", on_event=course)
        assert files_of(tmp_path / "kept" / stage) == files_of(alone)
    assert len(set(course.pids)) == 3
    scores = []
    for work, name in ((worker.run, "kept"), (run_worker, "alone")):
        request = evaluation_of(tmp_path / "kept" / "cycle-2", profile, dataset, tmp_path / f"{name}.json")
        work("relora_train.training.evaluate", request, tmp_path / "request.json", on_event=course)
        scores.append(request.result_path.read_bytes())
    assert scores[0] == scores[1]
    assert is_running(pid)
    worker.close()
    assert not is_running(pid)


def test_no_request_follows_in_a_process_on_one_that_did_not_end_well(worker: Worker, dataset: Path, tmp_path: Path):
    class Kills(Course):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if event["event"] == "stage_started" and event["stage"] == "cycle-2":
                os.kill(event["pid"], signal.SIGKILL)

    profile, course = tiny_profile(), Course()
    train(worker, profile, "warm-start", dataset, tmp_path, course)
    train(worker, profile, "cycle-1", dataset, tmp_path, course)
    with pytest.raises(TrainerCrashedError, match="killed by SIGKILL"):
        train(worker, profile, "cycle-2", dataset, tmp_path, Kills())
    small = write_tiny_dataset(tmp_path / "small", train_tokens=100)
    with pytest.raises(CorpusTooSmallError, match="100 tokens"):
        train(worker, profile, "cycle-2", small, tmp_path, course)
    train(worker, profile, "cycle-2", dataset, tmp_path, course)
    assert course.pids[0] == course.pids[1] != course.pids[2]


def test_a_process_that_dies_idle_costs_nothing_and_other_settings_of_a_process_have_one_of_their_own(
    worker: Worker, dataset: Path, tmp_path: Path
):
    class Interrupts(Course):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if event["event"] == "stage_started":
                raise KeyboardInterrupt

    one, two, course, last = (
        tiny_profile(launch={"threads": 1}),
        tiny_profile(launch={"threads": 2}),
        Course(),
        Interrupts(),
    )
    train(worker, one, "warm-start", dataset, tmp_path, course)
    os.kill(course.pids[0], signal.SIGKILL)
    train(worker, one, "cycle-1", dataset, tmp_path, course)  # its end may not even have been noticed yet
    with pytest.raises(KeyboardInterrupt):
        train(worker, two, "cycle-2", dataset, tmp_path, last)
    assert len({*course.pids, *last.pids}) == 3
    assert not any(map(is_running, (*course.pids, *last.pids)))  # whatever ends the caller ends the process


def test_a_finished_stage_leaves_no_weights_behind(dataset: Path, tmp_path: Path):
    """Layers, hooks and optimizer hold one another: without a collection the next stage would need the memory twice."""

    def parameters() -> int:
        return sum(type(thing) is torch.nn.Parameter for thing in gc.get_objects())

    release_memory()
    before = parameters()
    for stage, parent in (("warm-start", None), ("cycle-1", tmp_path / "warm-start")):
        run_stage(stage_request(tiny_profile(), stage, dataset, tmp_path / stage, parent), lambda event, **fields: None)
        release_memory()
        assert parameters() == before


# --- ranks


class KillsTheSecondRank(Course):
    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if event["event"] == "stage_started":
            kill_the_second_rank(event["pid"])


def kill_the_second_rank(first: int) -> None:
    (second,) = set(ranks_below(first)) - {first}
    os.kill(second, signal.SIGKILL)


def test_ranks_are_kept_for_all_stages_to_the_same_bits_and_started_anew_after_one_is_lost(
    worker: Worker, dataset: Path, tmp_path: Path
):
    """Lost in a stage, it is an error, to be retried; lost between two, it costs nothing."""
    profile, course, last = tiny_profile(relora={"dropout": 0.2}, launch=TWO), Course(), KillsTheSecondRank()
    train(worker, profile, "warm-start", dataset, tmp_path, course)
    with pytest.raises(TrainerCrashedError):
        train(worker, profile, "cycle-1", dataset, tmp_path, last)
    train(worker, profile, "cycle-1", dataset, tmp_path, course)
    train(worker, profile, "cycle-2", dataset, tmp_path, course)
    assert [course.pids[0]] == last.pids and course.pids[0] != course.pids[1] == course.pids[2]

    request = stage_request(profile, "cycle-2", dataset, tmp_path / "alone", tmp_path / "cycle-1")
    path, launch = tmp_path / "request.json", profile.launch
    run_worker("relora_train.training.trainer", request, path, on_event=lambda event: None, launch=launch)
    assert files_of(tmp_path / "cycle-2") == files_of(tmp_path / "alone")

    kill_the_second_rank(course.pids[2])
    again = request.model_copy(update={"output_directory": tmp_path / "again"})
    worker.run("relora_train.training.trainer", again, path, on_event=course, launch=launch)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "alone")
    assert not any(map(is_running, course.pids[:3]))

    ranks = ranks_below(course.pids[3])
    evaluation = evaluation_of(tmp_path / "again", profile, dataset, tmp_path / "scores.json")
    worker.run("relora_train.training.evaluate", evaluation, path, on_event=lambda event: None)
    assert evaluation.result_path.exists() and len(ranks) == 2
    for rank in ranks:  # a device's memory is the evaluation's alone
        wait_until_gone(rank)


def test_idle_ranks_hear_from_the_first_until_there_is_no_more(monkeypatch: pytest.MonkeyPatch):
    """A flow may take hours between two stages; a silent rank is lost after SLOW. Without its flow one ends at once."""
    shared: list[str | None] = []
    listeners: list[Callable[[], None] | None] = []
    exits: list[int] = []
    lines = iter(["", "", NO_MORE])

    class Pipe:
        def next_line(self, seconds: float) -> str:
            assert 2 * seconds < SLOW.total_seconds() and listeners[-1] is not None
            return next(lines)

        def on_end(self, listener: Callable[[], None] | None) -> None:
            listeners.append(listener)

    def shares(self: Ranks, text: str | None) -> str:
        shared.append(text)
        return text or ""

    monkeypatch.setattr(kept_ranks, "parent_pipe", Pipe)
    monkeypatch.setattr(Ranks, "share_text", shares)
    told: list[str] = []
    kept_ranks.serve_as_rank(RanksRequest(device="cpu"), lambda event, **fields: told.append(event))
    assert shared == ["", "", NO_MORE] and told == [TAKEN, SERVED]
    monkeypatch.setattr(kept_ranks.os, "_exit", exits.append)
    idle, after = listeners
    assert idle is not None and after is None
    idle()
    assert exits == [1]
