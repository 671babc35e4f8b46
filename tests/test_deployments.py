"""Deployments as an operator has them: a real server, pool, worker and S3 store; runs are killed, cancelled, retried.

The automation that finds dead runs needs minutes: `python -m pytest -m slow tests/test_deployments.py`.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_operator import (
    POOL,
    ROOT,
    Operator,
    children_of,
    install_automations,
    is_alive,
    receiver_of_alarms,
    running_operator,
    wait_for,
)
from seaweed import Seaweed

from relora_train.checkpoints.layout import parse_snapshot_name
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.storage.opening import open_store

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


def test_credentials_in_an_address_are_refused_before_the_server_records_them(operator: Operator):
    canary = f"canary{secrets.token_hex(12)}"
    address = f"s3://KEY:{canary}@deployments/prefix"
    for parameters in (
        {"store": address},
        {"resume_from": address},
        {"overrides": {"data": {"source": "text", "paths": ["a.txt", address]}}},
        {"overrides": {"tokenizer": {"path": address}}},
    ):
        given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
        said = operator.prefect("deployment", "run", "pretrain/quickstart", *given, expect=1)
        assert "never recorded" in " ".join(said.split()), said
        assert canary not in said
    assert operator.api("POST", "/flow_runs/filter", {}) == []
    written = [path for path in operator.directory.rglob("*") if path.is_file()]
    assert {"prefect.db", "server-0.log"} <= {path.name for path in written}
    assert [path for path in written if canary.encode() in path.read_bytes()] == []


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
        return any(line.startswith("cycle-1: steps ") for line in operator.logs(flow_run_id))

    wait_for(started, 240, lambda: (operator.flow_run(flow_run_id)["state"], operator.last_words()))


def wait_until_gone(pids: list[int], seconds: float) -> None:
    wait_for(lambda: not any(map(is_alive, pids)), seconds, lambda: f"still there: {list(filter(is_alive, pids))}")


def trained(operator: Operator, flow_run_id: str) -> list[str]:
    lines = operator.logs(flow_run_id)
    return [line.partition(":")[0] for line in lines if ": steps " in line]


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


def registered(operator: Operator) -> dict[str, Any]:
    """All that the server holds of pretrain/quickstart, without what it notes about its use."""
    found = operator.api("GET", "/deployments/name/pretrain/quickstart")
    of_its_use = {"updated", "status", "last_polled", "global_concurrency_limit"}
    return {key: value for key, value in found.items() if key not in of_its_use}


def test_a_deployment_of_a_work_pool_is_not_served_unasked(operator: Operator):
    before = registered(operator)
    told = operator.output("relora_train.cli.app", "serve", "pretrain/quickstart", "prune/weekly", expect=2)
    assert f"pretrain/quickstart (pool {POOL}): served, their runs would" in told and "--take-over" in told
    assert "Serving at" not in told and registered(operator) == before
    assert "prune/weekly" not in operator.prefect("deployment", "ls"), "nothing was registered on the way"


def test_served_deployments_run_without_a_worker_and_go_back_to_their_pool(operator: Operator, bucket: str):
    operator.prefect("deployment", "schedule", "create", "pretrain/quickstart", "--cron", "0 0 1 1 *", "--no-active")
    before = registered(operator)
    command = operator.command("relora_train.cli.app", "serve", "pretrain/quickstart", "--poll", "1", "--take-over")
    server = operator.start("serve", command)
    wait_for(lambda: registered(operator)["work_pool_name"] is None, 180, operator.last_words)
    flow_run = operator.run("pretrain/quickstart", profile="smoke", run_id="served", overrides=LONG)
    wait_until_cycle_1(operator, flow_run)
    waiting = operator.run("pretrain/quickstart", profile="smoke", run_id="waiting", overrides=LONG)
    processes = children_of(server.pid)
    assert flow_process(bucket, "served") in processes
    server.send_signal(signal.SIGTERM)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=120) == 0, operator.last_words()
    wait_until_gone(processes, 40)
    assert snapshots(bucket, "served")
    assert operator.state(flow_run) in ("CANCELLED", "CRASHED")
    assert operator.state(waiting) == "CANCELLED" and "ended before" in operator.flow_run(waiting)["state"]["message"]
    assert registered(operator) == before and before["work_pool_name"] == POOL and not before["paused"]


def test_serving_that_is_told_to_stop_before_it_began_gives_back_what_is_still_its_own(operator: Operator):
    program = """
import contextlib, os, signal, sys, time, urllib.error, urllib.request
from flows.serving import serve_deployments
from relora_train.cli.serve import choose_deployments

def deploy_again(pool_and_queue):
    url, headers = f"{os.environ['PREFECT_API_URL']}/deployments/{sys.argv[1]}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, pool_and_queue.encode(), headers, method="PATCH")
    for pause in (1, 5, 20):  # a server on SQLite answers 503 while its file is locked
        with contextlib.suppress(urllib.error.HTTPError):
            return urllib.request.urlopen(request)
        time.sleep(pause)
    urllib.request.urlopen(request)

def on_start():
    for change in sys.argv[2:]:
        deploy_again(change)
    os.kill(os.getpid(), signal.SIGTERM)

chosen = choose_deployments(["pretrain/quickstart"])
serve_deployments(chosen, limit=1, poll_seconds=1, take_over=True, on_start=on_start)
"""
    before = registered(operator)

    def serve_for_a_moment(*changes: str) -> dict[str, Any]:
        command = [sys.executable, "-c", program, before["id"], *changes]
        subprocess.run(command, env=operator.environment, cwd=operator.directory, check=True, timeout=300)
        return registered(operator)

    assert serve_for_a_moment() == before
    deployed_again = {"work_pool_name": POOL, "work_queue_name": "another"}
    assert serve_for_a_moment(json.dumps(deployed_again))["work_queue_name"] == "another"
    as_before = {key: before[key] for key in ("work_pool_name", "work_queue_name", "entrypoint")}
    operator.api("PATCH", f"/deployments/{before['id']}", as_before)


def test_schedules_make_runs_and_a_series_deployed_in_five_steps_trains(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str, tmp_path: Path
):
    smoke = (ROOT / "profiles" / "smoke.toml").read_text()
    (tmp_path / "mine.toml").write_text(smoke)
    sets = ["schedule.cycles=1", "launch.threads=1", "evaluation.sequences=8", "evaluation.final_sequences=8"]
    asked = ["deploy", "mine.toml", "--cron", "* * * * *", *(part for one in sets for part in ("--set", one))]
    command = operator.command("relora_train.cli.app", *asked)
    subprocess.run(command, env=operator.environment, cwd=tmp_path, check=True, timeout=120)
    operator.prefect("--no-prompt", "deploy", "-n", "prune/weekly", "--prefect-file", "deploy/prefect.yaml")
    operator.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "mine.prefect.yaml"))
    mine, weekly = (operator.api("GET", f"/deployments/name/{name}") for name in ("retrain/mine", "prune/weekly"))
    assert mine["parameters"]["profile"] == str(tmp_path / "mine.toml")

    def scheduled(deployment: dict[str, Any]) -> list[str]:
        """The names of the states of the runs that its schedule made."""
        made_by = [schedule["id"] for schedule in deployment["schedules"]]
        runs = operator.api("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}})
        return [run["state_name"] for run in runs if run["created_by"]["id"] in made_by]

    def ended() -> bool:
        assert not {"Failed", "Crashed"} & set(scheduled(mine)), operator.last_words()
        return "Promoted" in scheduled(mine)

    wait_for(lambda: "Scheduled" in scheduled(weekly), 180, operator.last_words)
    wait_for(ended, 300, operator.last_words)
    champion = resolve_checkpoint("series:mine", open_store(bucket))
    assert champion.manifest.stage == "cycle-1", "what --set gave is of the deployment"
    for deployment in (mine, weekly):
        operator.api("DELETE", f"/deployments/{deployment['id']}")


def test_no_night_is_scheduled_unasked_and_a_schedule_outlives_later_deploys(operator: Operator):
    def deploy() -> list[tuple[str, bool]]:
        operator.prefect("--no-prompt", "deploy", "-n", "retrain/nightly", "--prefect-file", "deploy/prefect.yaml")
        schedules = operator.api("GET", "/deployments/name/retrain/nightly")["schedules"]
        return [(each["schedule"]["cron"], each["active"]) for each in schedules]

    assert deploy() == []
    operator.prefect("deployment", "schedule", "create", "retrain/nightly", "--cron", "15 2 * * *")
    assert deploy() == [("15 2 * * *", True)]
    operator.prefect("deployment", "schedule", "clear", "-y", "retrain/nightly")


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


LOW_DISK = """
from pathlib import Path
from prefect import flow
from tasks.observe import tell_low_disk

@flow
def fills() -> None:
    for checkpoint_bytes in (1, 10**18):
        tell_low_disk("full", [Path("/"), Path("/"), Path("/no/such/place")], checkpoint_bytes)

fills()
"""
"""A flow whose second checkpoint is larger than any disk."""


def installed_automations(operator: Operator) -> list[dict[str, Any]]:
    found = operator.api("POST", "/automations/filter", {})
    return [each for each in found if each["name"].startswith("relora-")]


def test_dead_runs_are_found_one_that_has_ended_stays_so_and_each_alarm_reaches_its_receiver(
    operator: Operator, tmp_path: Path
):
    """The automations as they are installed, but for a patience of ten seconds, Prefect's shortest."""
    shipped = yaml.safe_load((ROOT / "deploy" / "automations.yaml").read_text())["automations"]
    for given in shipped:
        given["trigger"]["within"] = min(given["trigger"]["within"], 10)
    (tmp_path / "hasty.yaml").write_text(yaml.safe_dump({"automations": shipped}))
    with ExitStack() as stack:
        told = stack.enter_context(receiver_of_alarms(operator))
        install_automations(operator, str(tmp_path / "hasty.yaml"), RELORA_ALARM_BLOCK="custom-webhook/alarms")
        assert len(installed_automations(operator)) == len(shipped) == 8
        watch_what_automations_do(operator, told)


def watch_what_automations_do(operator: Operator, told: list[dict[str, str]]) -> None:
    def run(*states: str | dict[str, str]) -> str:
        flow_run = operator.run("pretrain/quickstart", run_id="never")
        for state in states:  # as a worker that takes it
            named = {"type": state} if isinstance(state, str) else state
            operator.api("POST", f"/flow_runs/{flow_run}/set_state", {"state": named, "force": True})
        return flow_run

    ended, dead = run("PENDING", "RUNNING", "FAILED"), run("PENDING")
    late = run({"type": "SCHEDULED", "name": "Late"})
    run("PENDING", "RUNNING", {"type": "COMPLETED", "name": "Refused"})
    subprocess.run([sys.executable, "-c", LOW_DISK], env=operator.environment, check=True, timeout=180)
    at_the_pool = {"prefect.resource.id": "prefect.tag.relora", "prefect.resource.role": "tag"}

    def heartbeat() -> None:
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "prefect.flow-run.heartbeat",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{ended}"},
            "related": [at_the_pool],
        }
        operator.api("POST", "/events", [event])

    heartbeat()
    operator.wait_for_state(dead, "CRASHED", seconds=180)
    assert "the worker that took it is gone" in operator.flow_run(dead)["state"]["message"]

    def fired() -> bool:
        """For the run that has ended too, or its state would be no wonder."""
        about = {"resource": {"id": [f"prefect.flow-run.{ended}"]}}
        asked = {"filter": {"event": {"name": ["prefect.automation.action.failed"]}, "any_resource": about["resource"]}}
        return operator.api("POST", "/events/filter", asked)["total"] > 0

    try:
        wait_for(fired, 60, operator.last_words)
    except AssertionError:  # a server on SQLite drops an event when its file is locked; a real heart beats again
        heartbeat()
        wait_for(fired, 120, operator.last_words)
    assert operator.state(ended) == "FAILED"
    alarms = {"relora-failed", "relora-crashed", "relora-late", "relora-refused", "relora-disk-low"}
    wait_for(lambda: alarms <= {each["subject"] for each in told}, 120, lambda: (told, operator.last_words()))
    bodies = {each["subject"]: each["body"] for each in told}
    assert f"/runs/flow-run/{ended}" in bodies["relora-failed"] and f"/runs/flow-run/{late}" in bodies["relora-late"]
    assert "has room for fewer than three" in bodies["relora-disk-low"] and " free, and a" in bodies["relora-disk-low"]
    for automation in installed_automations(operator):
        operator.api("DELETE", f"/automations/{automation['id']}")


@pytest.mark.slow
def test_a_worker_that_is_terminated_leaves_a_dead_run_that_the_automation_finds(
    operator: Operator, worker: subprocess.Popen[bytes], bucket: str
):
    for _ in range(2):
        install_automations(operator)
    assert len(installed_automations(operator)) == 8

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
