"""Deployments as an operator has them: a real server, pool, worker and S3 store; runs are killed, cancelled, retried.

The automation that finds dead runs needs minutes: `python -m pytest -m slow tests/test_deployments.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_operator import ROOT, Operator, children_of, is_alive, running_operator, wait_for
from seaweed import Seaweed

from relora_train.checkpoint_layout import parse_snapshot_name
from relora_train.checkpoint_resolve import resolve_checkpoint
from relora_train.storage.opening import open_store
from relora_train.upkeep.verify import verify_run

SMOKE = {
    "launch": {"threads": 1},
    "evaluation": {"sample_prompts": [], "sequences": 8, "final_sequences": 8},
    "schedule": {"cycles": 1},
}
"""The smoke profile, with nothing that takes time and is shown elsewhere."""

LONG = {**SMOKE, "schedule": {"cycles": 1, "warm_start_steps": 0, "cycle_length": 200_000}}
"""A cycle that is still going on whenever somebody kills or cancels it."""


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> Iterator[str]:
    seaweed.create_bucket("deployments")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.environment.items():
            patch.setenv(name, value)
        yield "s3://deployments/prefix"
    seaweed.delete_bucket("deployments")


@pytest.fixture(scope="module")
def operator(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with running_operator(tmp_path_factory.mktemp("operator"), RELORA_STORE=bucket) as made:
        made.deploy("pretrain/quickstart")
        yield made


@pytest.fixture
def worker(operator: Operator) -> Iterator[subprocess.Popen[bytes]]:
    started = operator.start_worker()
    yield started
    started.kill()
    started.wait()


def snapshots(store: str, run_id: str) -> list[int]:
    """Steps of the complete snapshots in the store."""
    keys = [info.key.split("/") for info in open_store(store).list(f"runs/{run_id}/snapshots/")]
    names = {parts[-2] for parts in keys if parts[-1] == "manifest.json"}
    return sorted(step for step in map(parse_snapshot_name, names) if step is not None)


def flow_process(store: str, run_id: str) -> int:
    """The pid of the flow that writes a run, as its lease says."""
    return int(json.loads(open_store(store).get_bytes(f"runs/{run_id}/lease.json")[0])["holder"]["pid"])


def wait_until_cycle_1(operator: Operator, flow_run_id: str) -> None:
    def started() -> bool:
        assert operator.state(flow_run_id) in ("SCHEDULED", "PENDING", "RUNNING"), operator.logs(flow_run_id)
        return any(line.startswith("stage cycle-1") for line in operator.logs(flow_run_id))

    wait_for(started, 240, lambda: (operator.flow_run(flow_run_id)["state"], operator.last_words()))


def wait_until_gone(pids: list[int], seconds: float) -> None:
    wait_for(lambda: not any(map(is_alive, pids)), seconds, lambda: f"still there: {list(filter(is_alive, pids))}")


def trained(operator: Operator, flow_run_id: str) -> list[str]:
    lines = operator.logs(flow_run_id)
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("stage ") and "steps" in line]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"run_id": 123}, "'run_id'"),
    ({"run_id": "../escape"}, "'run_id'"),
    ({"profile": "quikstart"}, "'profile'"),
    ({"store": "ftp://somewhere"}, "'store'"),
    ({"resume_from": "no name"}, "'resume_from'"),
    ({"overrides": {"relora": {"rank": 0}}}, "'overrides.relora.rank'"),
    ({"overrides": {"relora": {"rnak": 8}}}, "'rnak' was unexpected"),
]


def test_a_wrong_parameter_is_refused_when_the_run_is_created(operator: Operator):
    deployment = operator.api("GET", "/deployments/name/pretrain/quickstart")
    for parameters, words in WRONG:
        with pytest.raises(urllib.error.HTTPError) as refused:
            operator.api("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
        assert refused.value.code == 409 and words in refused.value.read().decode(), parameters
    told = operator.prefect("deployment", "run", "pretrain/quickstart", "-p", "store=ftp://somewhere", expect=1)
    assert "Validation failed for field 'store'" in told
    told = operator.prefect("deployment", "run", "pretrain/quickstart", "-p", "nope=1", expect=1)
    assert "not found on the deployment: 'nope'" in told
    assert operator.api("POST", "/flow_runs/count", {}) == 0


def test_a_run_whose_worker_and_flow_are_killed_is_retried_from_its_snapshot(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str
):
    overrides = {**SMOKE, "schedule": {"cycles": 1, "cycle_length": 600}, "snapshots": {"every_steps": 20}}
    flow_run = operator.run("pretrain/quickstart", profile="smoke", run_id="killed", overrides=overrides)
    wait_until_cycle_1(operator, flow_run)
    wait_for(lambda: snapshots(bucket, "killed"), 60, operator.last_words)
    flow = flow_process(bucket, "killed")
    trainers = children_of(flow)
    assert flow in children_of(worker.pid) and trainers
    worker.kill()
    os.kill(flow, signal.SIGKILL)
    wait_until_gone([flow, *trainers], 40)  # they notice that nobody is there any more
    saved = snapshots(bucket, "killed")
    assert operator.state(flow_run) == "RUNNING", "nobody was left to say otherwise"
    operator.api("POST", f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CRASHED"}, "force": True})

    again = operator.start_worker()
    operator.prefect("flow-run", "retry", flow_run)
    operator.wait_for_state(flow_run, "COMPLETED", seconds=240)
    lines = operator.logs(flow_run)
    resumed = [int(line.rpartition(" ")[2]) for line in lines if "going on from the snapshot" in line]
    assert len(resumed) == 1 and 20 < saved[0] <= resumed[0]
    assert trained(operator, flow_run) == ["warm-start", "cycle-1", "cycle-1"]
    assert operator.flow_run(flow_run)["run_count"] == 2
    assert verify_run(open_store(bucket), "killed").findings == []
    again.kill()


def test_a_cancelled_run_commits_a_snapshot_and_leaves_no_process(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str
):
    overrides = {**LONG, "snapshots": {"every_seconds": 1e9}}
    flow_run = operator.run("pretrain/quickstart", profile="smoke", run_id="cancelled", overrides=overrides)
    wait_until_cycle_1(operator, flow_run)
    processes = children_of(worker.pid)
    assert flow_process(bucket, "cancelled") in processes and snapshots(bucket, "cancelled") == []
    operator.prefect("flow-run", "cancel", flow_run)
    operator.wait_for_state(flow_run, "CANCELLED", seconds=90)
    wait_until_gone([pid for pid in processes if pid != worker.pid], 30)
    assert snapshots(bucket, "cancelled"), "the only reason for a snapshot was the stop"
    assert json.loads(open_store(bucket).get_bytes("runs/cancelled/lease.json")[0])["released"]
    assert worker.poll() is None


def test_served_deployments_run_without_a_worker_and_stop_in_order(operator: Operator, bucket: str):
    command = operator.command("relora_train.cli", "serve", "pretrain/quickstart", "--poll", "1")
    server = operator.start("serve", command)

    def is_served() -> bool:
        return operator.api("GET", "/deployments/name/pretrain/quickstart")["work_pool_name"] is None

    wait_for(is_served, 60, operator.last_words)
    flow_run = operator.run("pretrain/quickstart", profile="smoke", run_id="served", overrides=LONG)
    wait_until_cycle_1(operator, flow_run)
    processes = children_of(server.pid)
    assert flow_process(bucket, "served") in processes
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=60)
    wait_until_gone(processes, 40)
    assert snapshots(bucket, "served")
    assert operator.state(flow_run) in ("CANCELLED", "CRASHED")


def test_nightly_retrains_promote_what_is_better_and_refuse_the_rest(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str, tmp_path: Path
):
    operator.prefect("--no-prompt", "deploy", "-n", "retrain/nightly", "--prefect-file", "deploy/prefect.yaml")
    data = {"source": "jsonl", "paths": [str(tmp_path)], "name": "nights"}
    overrides = {**SMOKE, "schedule": {"cycles": 1, "min_lr_ratio": 1.0}, "data": data}

    def arrive(night: int) -> None:
        modules = sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py"))[night::2]
        lines = (json.dumps({"text": path.read_text(errors="replace")[:8000]}) for path in modules)
        (tmp_path / f"night-{night}.jsonl").write_text("\n".join(lines))

    def night(**parameters: Any) -> str:
        given = {"series": "nightly", "profile": "smoke", "overrides": overrides, **parameters}
        flow_run = operator.run("retrain/nightly", **given)
        operator.wait_for_state(flow_run, "COMPLETED", seconds=240)
        return str(operator.flow_run(flow_run)["state_name"])

    arrive(0)
    assert night() == "Promoted"
    champion = resolve_checkpoint("series:nightly", open_store(bucket)).uri
    assert night() == "NoNewData"
    arrive(1)
    assert night(margin=0.9) == "Refused"
    assert resolve_checkpoint("series:nightly", open_store(bucket)).uri == champion
    assert night() == "NoNewData"


def installed_automations(operator: Operator) -> list[dict[str, Any]]:
    found = operator.api("POST", "/automations/filter", {})
    return [each for each in found if each["name"].startswith("relora-")]


@pytest.mark.slow
def test_a_worker_that_is_terminated_leaves_a_dead_run_that_the_automation_finds(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str
):
    for _ in range(2):
        subprocess.run(
            ["bash", str(Path(ROOT, "deploy", "automations.sh"))], env=with_venv(operator), check=True, timeout=120
        )
    assert len(installed_automations(operator)) == 1

    flow_run = operator.run("pretrain/quickstart", profile="smoke", run_id="terminated", overrides=LONG)
    wait_until_cycle_1(operator, flow_run)
    flow = flow_process(bucket, "terminated")
    processes = [flow, *children_of(flow)]
    worker.send_signal(signal.SIGTERM)
    worker.wait(timeout=60)
    wait_until_gone(processes, 60)
    assert operator.state(flow_run) == "RUNNING", "the flow was killed and could not say a word"
    operator.wait_for_state(flow_run, "CRASHED", seconds=180)
    assert "No sign of life" in operator.flow_run(flow_run)["state"]["message"]

    again = operator.start_worker()
    operator.prefect("flow-run", "retry", flow_run)

    def resumed() -> bool:  # from the snapshot that the orphaned trainer left on this machine, its only one
        return any("going on from the snapshot" in line for line in operator.logs(flow_run))

    wait_for(resumed, 180, operator.last_words)
    operator.prefect("flow-run", "cancel", flow_run)
    operator.wait_for_state(flow_run, "CANCELLED", seconds=90)
    again.kill()


def with_venv(operator: Operator) -> dict[str, str]:
    """`prefect` is found on PATH, as in an activated environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**operator.environment, "PATH": path}
