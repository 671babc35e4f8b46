"""Prefect's server is restarted, or away, while deployments train: no run ends by it, and every slot comes back.

The absence of six minutes is in `python -m pytest -m slow tests/test_server_restarts.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_operator import ROOT, Operator, children_of, running_operator, stop, wait_for

from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.storage.base import find_bytes
from relora_train.storage.opening import open_store

SMOKE = {
    "launch": {"threads": 1},
    "evaluation": {"sample_prompts": [], "sequences": 8, "final_sequences": 8},
    "schedule": {"cycles": 1},
}
MINUTES = {**SMOKE, "schedule": {"cycles": 1, "cycle_length": 150}}
LONG = {**SMOKE, "schedule": {"cycles": 1, "warm_start_steps": 0, "cycle_length": 200_000}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def operator(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with running_operator(tmp_path_factory.mktemp("operator"), RELORA_STORE=store) as made:
        made.prefect("gcl", "create", "gpu", "--limit", "1")
        made.deploy("pretrain/quickstart")
        yield made


@pytest.fixture
def worker(operator: Operator) -> Iterator[subprocess.Popen[bytes]]:
    started = operator.start_worker()
    yield started
    for pid in children_of(started.pid):
        os.kill(pid, signal.SIGKILL)
    stop(started, signal.SIGKILL)


def begin(operator: Operator, run_id: str, overrides: dict[str, Any], **parameters: Any) -> str:
    return operator.run("pretrain/quickstart", profile="smoke", run_id=run_id, overrides=overrides, **parameters)


def flow_process(store: str, run_id: str) -> int:
    """The pid of the flow that writes a run, as its lease says."""
    return int(json.loads(open_store(store).get_bytes(f"runs/{run_id}/lease.json")[0])["holder"]["pid"])


def wait_for_line(operator: Operator, flow_run_id: str, words: str) -> None:
    def said() -> bool:
        assert operator.state(flow_run_id) in ("SCHEDULED", "PENDING", "RUNNING"), operator.logs(flow_run_id)
        return any(words in line for line in operator.logs(flow_run_id))

    wait_for(said, 240, lambda: (operator.flow_run(flow_run_id)["state"], operator.last_words()))


def held_trainers(operator: Operator, store: str, run_id: str) -> list[int]:
    """Let a run wait until we say otherwise, however fast this machine is: its trainer is stopped as we meet it."""
    lease = f"runs/{run_id}/lease.json"
    wait_for(lambda: find_bytes(open_store(store), lease), 240, operator.last_words)
    trainers = wait_for(lambda: children_of(flow_process(store, run_id)), 240, operator.last_words)
    for pid in trainers:
        os.kill(pid, signal.SIGSTOP)
    return trainers


def let_go(trainers: list[int]) -> None:
    for pid in trainers:
        os.kill(pid, signal.SIGCONT)


def slots_taken(operator: Operator) -> int:
    return int(operator.api("GET", "/v2/concurrency_limits/gpu")["active_slots"])


def test_a_server_that_is_restarted_ends_no_training(operator: Operator, worker: subprocess.Popen[bytes], store: str):
    run = begin(operator, "restarted", MINUTES, gpu_limit="gpu")
    wait_for(lambda: slots_taken(operator), 240, operator.last_words)
    trainers = held_trainers(operator, store, "restarted")
    for number, seconds_away in ((signal.SIGTERM, 0), (signal.SIGKILL, 0), (signal.SIGTERM, 15)):
        stop(operator.server, number)
        time.sleep(seconds_away)
        operator.start_server()
        state = operator.flow_run(run)["state"]
        assert state["type"] == "RUNNING" and slots_taken(operator) == 1
        assert state["state_details"]["deployment_concurrency_lease_id"] is None, "Prefect ends a run that loses it"
    let_go(trainers)
    operator.wait_for_state(run, "COMPLETED", seconds=240)
    assert verify_run(open_store(store), "restarted").findings == []
    assert slots_taken(operator) == 0, "the server forgot who held it"
    assert not [line for line in operator.logs(run) if "leases in its memory" in line or "not know any more" in line]


def test_a_run_that_lives_says_so_and_one_that_waits_gets_the_slot_of_one_that_was_killed(
    operator: Operator, worker: subprocess.Popen[bytes], store: str
):
    holder = begin(operator, "holder", LONG, gpu_limit="gpu")
    wait_for_line(operator, holder, ": steps ")
    mistaken = {"state": {"type": "CRASHED", "message": "No sign of life"}, "force": True}
    operator.api("POST", f"/flow_runs/{holder}/set_state", mistaken)
    wait_for(lambda: operator.state(holder) == "RUNNING", 120, operator.last_words)

    waiting = begin(operator, "waiting", SMOKE, gpu_limit="gpu")
    wait_for_line(operator, waiting, "waiting for a slot of gpu")
    assert operator.flow_run(waiting)["state_name"] == "WaitingForSlot"
    assert any("held by 'smoke · holder'" in line for line in operator.logs(waiting))

    stop(operator.server, signal.SIGKILL)
    os.kill(flow_process(store, "holder"), signal.SIGKILL)
    operator.start_server()
    operator.wait_for_state(waiting, "COMPLETED", seconds=300)
    assert operator.state(holder) == "CRASHED"
    assert slots_taken(operator) == 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_server_that_is_away_for_six_minutes_ends_no_training(
    operator: Operator, worker: subprocess.Popen[bytes], store: str
):
    """One run comes to its end meanwhile, and cannot tell; one goes on, and the automation takes it for dead.

    Both end as Completed, and the worker takes the next one.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    install = ["bash", str(ROOT / "deploy" / "automations.sh")]
    subprocess.run(install, env={**operator.environment, "PATH": path}, check=True, timeout=120)
    done = begin(operator, "done-meanwhile", MINUTES, gpu_limit="gpu")
    wait_for(lambda: slots_taken(operator), 240, operator.last_words)
    at_its_end = held_trainers(operator, store, "done-meanwhile")
    going_on = begin(operator, "going-on", SMOKE)
    trainers = held_trainers(operator, store, "going-on")
    stop(operator.server, signal.SIGTERM)
    let_go(at_its_end)
    time.sleep(360)
    operator.start_server()
    let_go(trainers)
    for run in (done, going_on):
        wait_for(lambda run=run: operator.state(run) == "COMPLETED", 600, operator.last_words)
    assert slots_taken(operator) == 0

    after = begin(operator, "after", LONG, gpu_limit="gpu")
    wait_for_line(operator, after, ": steps ")
    operator.prefect("flow-run", "cancel", after)
    operator.wait_for_state(after, "CANCELLED", seconds=90)
    for run_id in ("done-meanwhile", "going-on"):
        assert verify_run(open_store(store), run_id).findings == []
    for run in (done, going_on, after):
        sys.stdout.write(f"{operator.flow_run(run)['name']}: {', '.join(history(operator, run))}\n")
    # SQLite, flooded with the events of six minutes, refuses some, and Prefect drops them: errors of its own.
    for log in operator.directory.glob("server-*.log"):
        log.rename(log.with_name(f"flooded-{log.name}"))
    (operator.directory / "server-0.log").touch()


def history(operator: Operator, flow_run_id: str) -> list[str]:
    """The names of the states that a run was in."""
    return [state["name"] for state in operator.api("GET", f"/flow_run_states/?flow_run_id={flow_run_id}")]
