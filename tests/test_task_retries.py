"""Which ends of a cycle its task tries again, and how often: every kind with a real process that ends that way."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from failing_worker import FailingRequest
from prefect_server import PREFECT_WARNS, running_prefect

from relora_train.errors import (
    DeviceError,
    DeviceMemoryError,
    DiskFullError,
    DivergedError,
    ReLoRAError,
    StoreUnavailableError,
    TrainerCrashedError,
    TrainerFaultError,
)
from relora_train.runs.workers import run_worker

pytestmark = PREFECT_WARNS


@pytest.fixture(scope="module", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")):
        yield


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parent.parent}")


def attempts_of(work: Callable[[], None]) -> int:
    """How often a task under the policy of training calls `work`, which always fails, before the flow fails."""
    from prefect import flow, task

    from tasks.policies import TRAINING

    calls: list[int] = []

    @task(**{**TRAINING, "retry_delay_seconds": 0})
    def train() -> None:
        calls.append(1)
        work()

    @flow
    def training() -> None:
        train()

    with pytest.raises(ReLoRAError):
        training()
    return len(calls)


KINDS = [
    ("exception", TrainerCrashedError, 3),
    ("Python error", TrainerFaultError, 1),  # follows from what is given: it would come again
    ("missing package", TrainerFaultError, 1),
    ("shared memory", DeviceError, 1),
    ("disk", DiskFullError, 1),
    ("exit status", TrainerCrashedError, 3),
    ("SIGKILL", TrainerCrashedError, 3),
    ("SIGSEGV", TrainerCrashedError, 3),
    ("CUDA fault", TrainerCrashedError, 3),
    ("out of device memory", DeviceMemoryError, 2),  # once more: another process may have held the memory
    ("driver out of memory", DeviceMemoryError, 2),
    ("cublas out of memory", DeviceMemoryError, 2),
    ("no device", DeviceError, 1),
    ("diverged", DivergedError, 1),  # what follows is the profile's [divergence], not the task's policy
]


@pytest.mark.parametrize(("kind", "error", "attempts"), KINDS)
def test_a_cycle_is_tried_again_as_often_as_it_may_help(
    kind: str, error: type[ReLoRAError], attempts: int, environment: None, tmp_path: Path
):
    seen: list[type[BaseException]] = []

    def work() -> None:
        try:
            request = FailingRequest(kind=kind)
            run_worker("failing_worker", request, tmp_path / "request.json", on_event=lambda event: None)
        except ReLoRAError as raised:
            seen.append(type(raised))
            raise

    assert attempts_of(work) == attempts
    assert set(seen) == {error}


def test_an_outage_of_the_store_is_waited_out(environment: None):
    def work() -> None:
        raise StoreUnavailableError("http://127.0.0.1:9 does not answer")

    assert attempts_of(work) == 3
