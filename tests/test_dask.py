"""Tokenizing on a Dask cluster: the bytes of one machine, whatever becomes of a worker, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from made_up_corpus import made_up_text
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_server import PREFECT_WARNS, running_prefect
from stage_runs import tiny_profile

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.manifest import DatasetManifest, content_digest
from relora_train.data import remote_shards
from relora_train.data.remote_shards import Encoding, encode_range
from relora_train.data.shards import ShardPlan
from relora_train.data.tokenizer import DocumentTokenizer
from relora_train.errors import CheckpointCorruptError, ClusterUnavailableError, ConfigError
from relora_train.process import NO_SERVER
from relora_train.runs.datasets import prepare_or_reuse
from relora_train.runs.run import Run
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from tasks.dask_ranges import ranges_on

pytestmark = PREFECT_WARNS
TESTS = Path(__file__).parent


@contextmanager
def process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One part of a Dask cluster; the store's credentials are in its environment."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        started = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def cluster(directory: Path, *, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler on loopback and its workers, of one thread each."""
    at = ("--scheduler-file", str(directory / "scheduler.json"))
    with ExitStack() as stack:
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", *at)
        stack.enter_context(process("scheduler", *options, log=directory / "scheduler.log"))
        options = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", *at)
        while not (directory / "scheduler.json").is_file():
            time.sleep(0.1)
        made = [
            stack.enter_context(process("worker", *options, log=directory / f"worker-{n}.log")) for n in range(workers)
        ]
        yield json.loads((directory / "scheduler.json").read_text())["address"], made


def profile(folder: Path, **data: object) -> Profile:
    source = {"source": "jsonl", "paths": [str(folder / "corpus.jsonl")]}
    return tiny_profile(
        data={**source, "shard_tokens": 12_000, "validation_fraction": 0.2, **data}, tokenizer={"vocab_size": 300}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": "\n".join(made_up_text(20 * n + part) for part in range(20))}) for n in range(25)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> DatasetManifest:
    """The dataset that one machine makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(folder / "cache"))
        run = Run("run", str(folder / "store"), profile(folder, workers=1))
        return prepare_or_reuse(run, on_event=lambda event: None).dataset.manifest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))


def test_a_cluster_of_which_a_worker_is_killed_makes_the_dataset_of_one_machine(folder, alone, tmp_path, s3_store_uri):
    from dask_flow import tokenize_only

    store = open_store(s3_store_uri)
    seen: list[str] = []

    def kill_when_the_first_shard_is_there(worker: subprocess.Popen[bytes]) -> None:
        while not seen and worker.poll() is None:
            seen.extend(info.key for info in store.list("preparing/") if info.key.endswith(".bin"))
            time.sleep(0.02)
        worker.send_signal(signal.SIGKILL)

    with running_prefect(tmp_path / "prefect"), cluster(tmp_path, workers=2) as (address, workers):
        killer = threading.Thread(target=kill_when_the_first_shard_is_there, args=(workers[0],))
        killer.start()
        spread = tokenize_only(s3_store_uri, profile(folder, dask=address))
        killer.join()
        assert seen and workers[0].wait() == -signal.SIGKILL and workers[1].poll() is None
    made = spread.dataset.manifest
    assert len([entry for entry in made.files if entry.path.endswith(".bin")]) > 15
    assert (made.dataset_id, content_digest(made)) == (alone.dataset_id, content_digest(alone))
    assert not list(store.list("preparing/")), "what passed through the store is gone"


def test_a_lost_attempt_goes_on_with_the_ranges_that_came_back_and_leaves_nothing(folder, alone, s3_store_uri):
    """Without a cluster: ranges are encoded here, in another order. Two attempts end early, the second by a shard that
    was damaged on its way.
    """
    store, encoded, prefixes, told = open_store(s3_store_uri), [], [], []

    def encode_here(jobs, limit=None, damages=False):
        for number, job in enumerate(reversed(list(jobs))):
            if number == limit:
                raise ClusterUnavailableError("as if the cluster had gone")
            assert "relora-test-secret" not in job.model_dump_json()
            record = encode_range(job)
            prefixes.append(job.prefix)
            if damages:
                key = f"{job.prefix}/{record.files[0].path}"
                store.put_bytes(key, b"\xff" + store.get_bytes(key)[0][1:])
            else:
                encoded.append(job.staged.name)
            yield job, record

    run = Run("run", s3_store_uri, profile(folder))
    with pytest.raises(ClusterUnavailableError):
        prepare_or_reuse(run, on_event=lambda event: None, map_ranges=lambda jobs: encode_here(jobs, limit=4))
    assert len(encoded) == 4 and not [*store.list("preparing/"), *store.list("datasets/")]
    store.put_bytes(f"{prefixes[-1]}/left", b"by a process that was killed")
    with pytest.raises(CheckpointCorruptError, match="is damaged"):
        prepare_or_reuse(run, on_event=told.append, map_ranges=lambda jobs: encode_here(jobs, damages=True))
    spread = prepare_or_reuse(run, on_event=told.append, map_ranges=encode_here)
    far = [event["done_bytes"] / event["total_bytes"] for event in told if event.get("phase") == "tokenize"]
    assert far == sorted(far) and far[-2:] == [1, 1], "told by what collects the shards, then by what commits them"
    assert len(encoded) == len(set(encoded)) > 15, "no range is encoded twice"
    assert content_digest(spread.dataset.manifest) == content_digest(alone)
    assert not list(store.list("preparing/"))
    assert prepare_or_reuse(run, on_event=lambda event: None, map_ranges=encode_here).reused


def test_a_worker_is_told_all_that_the_flow_encodes_by(tmp_path):
    tokenizer = DocumentTokenizer("{}", "", "<e>", 3, 9, (1, 2))
    examples = ExampleFormat(kind="labels", before=(1,), between=(4,), after=(2,), pairs=True, classes=("no", "yes"))
    plan = ShardPlan(tokenizer, "tiktoken", tmp_path, tmp_path, tmp_path, examples)
    sent = Encoding.model_validate_json(Encoding.of(plan).model_dump_json()).plan(tmp_path)
    assert (sent.tokenizer, sent.engine, sent.examples) == (tokenizer, "tiktoken", examples)


def test_a_worker_with_other_libraries_and_a_store_that_workers_do_not_see_are_refused(folder, tmp_path, s3_store_uri):
    def encode_here(jobs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote_shards, "version", lambda name: "0.0.1")
            for job in jobs:
                yield job, encode_range(job)

    with pytest.raises(ConfigError, match=r"This worker encodes with .*0\.0\.1.*Install the same versions"):
        prepare_or_reuse(Run("run", s3_store_uri, profile(folder)), on_event=lambda event: None, map_ranges=encode_here)
    with pytest.raises(ConfigError, match=r"is a directory of this machine.*s3://bucket/prefix, or leave data\.dask"):
        local = Run("run", str(tmp_path / "store"), profile(folder))
        prepare_or_reuse(local, on_event=lambda event: None, map_ranges=encode_here)


def test_a_cluster_is_refused_where_no_prefect_server_is_for_its_workers_to_reach():
    with temporary_settings({PREFECT_API_URL: NO_SERVER}), pytest.raises(ConfigError, match="needs a Prefect server"):
        ranges_on("tcp://127.0.0.1:9")


def test_a_cluster_that_does_not_answer_is_an_error_that_may_pass(monkeypatch):
    monkeypatch.setattr("tasks.dask_ranges._WAIT_SECONDS", 1)
    map_ranges = ranges_on("tcp://127.0.0.1:9")
    assert map_ranges is not None and ranges_on(None) is None
    with pytest.raises(ClusterUnavailableError, match=r"tcp://127\.0\.0\.1:9") as error:
        list(map_ranges([]))
    assert error.value.retryable
