"""Kill anything, at any moment, as often as you like: the result is the one you would have had.

The flow, the trainer and the S3 server are killed with SIGKILL at moments drawn from a seed, and the same command is
given again until it ends well. The long storm is behind a marker: `python -m pytest -m slow tests/test_kill_storm.py`.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from seaweed import Seaweed, running_seaweed

from relora_train.checkpoints.run import CheckpointStore
from relora_train.runs.run import fetch_parent
from relora_train.storage.opening import open_store

SETTINGS = ("snapshots.every_steps=4", "launch.threads=1", "evaluation.sample_prompts=[]")
GIVE_UP_SECONDS = 600  # of one flow; machines are slow when they are shared


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", "from relora_train.cli.app import main; main()", verb, *arguments]


def run_command(store: str, run_id: str) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return command("run", "smoke", "--store", store, "--run-id", run_id, "--json", *sets)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        **os.environ,
        "RELORA_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "RELORA_S3_MAX_ATTEMPTS": "4",
    }


def finish(store: str, run_id: str, environment: dict[str, str], log: Path) -> None:
    with log.open("ab") as output:
        subprocess.run(run_command(store, run_id), env=environment, stdout=output, stderr=output, check=True)


def weights_of(store: str, run_id: str) -> dict[str, str]:
    """SHA-256 of every stage's weights and optimizer state, verified on the way."""
    digests = {}
    for checkpoint in CheckpointStore(open_store(store), run_id).list():
        directory = fetch_parent(checkpoint)
        for name in ("model.safetensors", "optimizer.safetensors"):
            content = (directory / name).read_bytes()
            digests[f"{checkpoint.manifest.stage}/{name}"] = hashlib.sha256(content).hexdigest()
    return digests


def trainers_below(pid: int) -> list[int]:
    """Pids of the trainer processes that a flow process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == pid and b"relora_train.training.trainer" in words:
                found.append(int(entry.name))
    return found


def attempts_of(store: str, run_id: str) -> dict[str, str]:
    """Which attempt committed each stage so far."""
    return {ref.prefix: ref.manifest.attempt for ref in CheckpointStore(open_store(store), run_id).list()}


def storm(
    store: str,
    run_id: str,
    environment: dict[str, str],
    log: Path,
    *,
    kills: int,
    seed: int,
    server: Seaweed | None = None,
) -> int:
    """Run to the end under SIGKILLs of flow, trainer and server; the number of kills that met a live process."""
    dice, made, committed = random.Random(seed), 0, {}
    while True:
        with (
            log.open("ab") as output,
            subprocess.Popen(
                run_command(store, run_id), env=environment, stdout=output, stderr=output, start_new_session=True
            ) as flow,
        ):
            # Prefect needs some seconds to start; half of the moments fall behind that, where the work is.
            deadline = time.monotonic() + (dice.uniform(2, 16) if made < kills else GIVE_UP_SECONDS)
            target = dice.choice(["flow", "trainer", *(["server"] if server else [])])
            while flow.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
                if target == "trainer" and made < kills and (trainers := trainers_below(flow.pid)):
                    time.sleep(dice.uniform(0, 6))
                    for pid in trainers:
                        made += kill(pid)
                    target = "flow"
            if flow.poll() is None and target == "server" and server is not None:
                server.kill()
                made += 1
                time.sleep(dice.uniform(0, 5))
                server.start()
                flow.wait(timeout=GIVE_UP_SECONDS)
            if flow.poll() is None:
                made += kill(flow.pid)
        now = attempts_of(store, run_id)
        assert committed.items() <= now.items(), "a committed stage was done again"
        committed = now
        if flow.returncode == 0:
            return made


def storms(
    store: str, environment: dict[str, str], log: Path, *, kills: int, server: Seaweed | None = None
) -> list[str]:
    """Storms over run after run until so many kills met a live process: a run may get through between two."""
    runs: list[str] = []
    made = 0
    while made < kills:
        assert len(runs) < 25, "the kills hardly ever meet a live process"
        runs.append(f"storm-{len(runs)}")
        left = min(7, kills - made)
        made += storm(store, runs[-1], environment, log, kills=left, seed=len(runs), server=server)
    return runs


def kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def check_nothing_was_lost(store: str, environment: dict[str, str], log: Path, run_ids: list[str]) -> None:
    undisturbed = weights_of(store, "undisturbed")
    assert len(undisturbed) == 6
    for run_id in run_ids:
        assert weights_of(store, run_id) == undisturbed, run_id
        with log.open("ab") as output:
            subprocess.run(
                command("verify", run_id, "--store", store), env=environment, stdout=output, stderr=output, check=True
            )


def test_a_short_storm_changes_nothing(environment: dict[str, str], tmp_path: Path):
    store, log = str(tmp_path / "store"), tmp_path / "log"
    finish(store, "undisturbed", environment, log)
    runs = storms(store, environment, log, kills=3)
    check_nothing_was_lost(store, environment, log, runs)


@pytest.fixture
def own_seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running_seaweed(tmp_path_factory.mktemp("storm-seaweed")) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_long_storm_over_s3_changes_nothing(
    environment: dict[str, str], own_seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in own_seaweed.environment.items():
        monkeypatch.setenv(name, value)
    environment = {**environment, **own_seaweed.environment}
    own_seaweed.create_bucket("storm")
    store, log = "s3://storm/prefix", tmp_path / "log"
    finish(store, "undisturbed", environment, log)
    runs = storms(store, environment, log, kills=30, server=own_seaweed)
    check_nothing_was_lost(store, environment, log, runs)
