"""Fixtures shared by many tests. What they need to know of servers is in seaweed.py."""

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bundles import write_files
from fault_proxy import Faults, faulty_way_to
from hypothesis import settings
from observed import Observed, observed_flows
from seaweed import ChangingKeys, Seaweed, running_seaweed

from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

# Here and in every process the tests start: matrices this small gain nothing from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files whose tests wait longest for processes of their own: begun first, so that none of them is left alone at the end.
LONGEST = (
    "test_flow_pretrain", "test_deployments", "test_server_restarts", "test_flow_compare", "test_launch",
    "test_run_snapshots", "test_flow_publishing", "test_ranks", "test_kill_storm", "test_artifacts", "test_security",
    "test_flow_retrain", "test_hostile_directory", "test_kept_worker", "test_sharding", "test_bench",
    "test_chat", "test_slurm", "test_gpu_acceptance", "test_compiled", "test_tasks", "test_gpu_estimate", "test_step",
    "test_dask",
)  # fmt: skip

# A table is as wide whatever runs the tests: rich asks for the terminal, and there may be none.
os.environ["COLUMNS"] = "140"

# No test depends on speed: a shared machine may pause in mid-example.
settings.register_profile("any speed", settings(deadline=None))
settings.load_profile("any speed")

# A shell starts its background jobs with Ctrl-C ignored, and every process of theirs inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def relora(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process."""
    from relora_train.cli.app import main

    def call(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One real S3 server for the session, started by the first test that needs it."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3_store_uri(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh bucket, and the environment that leads to it. Removed afterwards: the server has room for some dozens."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    seaweed.create_bucket(bucket)
    yield f"s3://{bucket}/some/prefix"
    monkeypatch.delenv("AWS_PROFILE", raising=False)  # a test may have named one that does not exist
    seaweed.delete_bucket(bucket)


@pytest.fixture
def keys(
    seaweed: Seaweed, s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ChangingKeys]:
    """Credentials in a file, as people have them, instead of the environment; they can change."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with seaweed.changing_keys(tmp_path / "credentials") as keys:
        yield keys


@pytest.fixture
def faults(seaweed, s3_store_uri, monkeypatch) -> Iterator[Faults]:
    """The way to the S3 server leads through a proxy."""
    with faulty_way_to(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


@pytest.fixture(params=("local", "memory", "s3"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_store_uri"))
    return open_store(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def memory() -> ObjectStore:
    """An empty store of this process."""
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a bundle holds it; not to be changed."""
    return write_files(tmp_path_factory.mktemp("files"), "a")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tokenized dataset; not to be changed."""
    from tiny_data import write_tiny_dataset

    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def warm_start(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory that is the parent of a tiny run's first cycle; not to be changed."""
    from stage_runs import ignore, run_stage, stage_request, tiny_profile

    output = tmp_path_factory.mktemp("run") / "warm-start"
    run_stage(stage_request(tiny_profile(), "warm-start", dataset, output), ignore)
    return output


@pytest.fixture(scope="session")
def observed(seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """One real run with all that it left behind, for the tests of what an operator sees and of what nobody may see."""
    with observed_flows(seaweed, tmp_path_factory.mktemp("observed")) as seen:
        yield seen
