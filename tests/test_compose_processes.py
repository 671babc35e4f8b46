"""The Compose file's stack end to end without a container engine: PostgreSQL, SeaweedFS, Prefect server, worker.

python -m pytest -m slow tests/test_compose_processes.py       # about two minutes; needs apt-get install postgresql
"""

import base64
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose_processes import DEPLOY, ROOT, ComposeProcesses, postgres_binaries
from prefect_server import no_server_errors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgres_binaries() is None, reason="no PostgreSQL here: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def stack() -> Iterator[ComposeProcesses]:
    # Not pytest's own directory: the user PostgreSQL runs as could not enter it.
    with tempfile.TemporaryDirectory(prefix="compose-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        names = ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        canaries = {name: f"canary-{secrets.token_hex(12)}" for name in names}
        # A password with what would break a hand-built database URL, and a user in the auth string.
        canaries["POSTGRES_PASSWORD"] += "@:/%"
        canaries["PREFECT_AUTH_STRING"] = f"operator:canary-{secrets.token_hex(12)}"
        running = ComposeProcesses(Path(directory), canaries)
        with no_server_errors(running.directory):
            try:
                running.up()
                yield running
            finally:
                running.down()


GRACE_SECONDS = 120  # the job template's


def start_job(stack: ComposeProcesses, flow_run: str, name: str) -> subprocess.Popen[bytes]:
    environment = {**stack.environment("worker"), "PREFECT__FLOW_RUN_ID": flow_run}
    with stack.log(name).open("ab") as output:
        process = subprocess.Popen(
            ["prefect", "flow-run", "execute"], env=environment, cwd=stack.directory / "app",
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    stack.processes[name] = process
    stack.services[name] = stack.services["worker"]
    return process


def wait_until_said(stack: ComposeProcesses, name: str, pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not re.search(pattern, said := stack.log(name).read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < deadline, said[-3000:]
        time.sleep(0.1)


def psql(stack: ComposeProcesses, query: str, database: str = "prefect") -> str:
    binaries = postgres_binaries()
    assert binaries is not None
    return subprocess.run(
        [str(binaries / "psql"), "-h", "127.0.0.1", "-U", "prefect", "-d", database, "-Atc", query],
        env={**stack.environment("postgres"), "PGPASSWORD": stack.secrets["POSTGRES_PASSWORD"]},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()  # fmt: skip


def test_a_deployment_runs_to_its_end_and_everything_is_where_the_file_says(stack: ComposeProcesses):
    flow = ("prefect", "deployment", "run", "pretrain/quickstart", "-p", "profile=smoke", "-p", "run_id=composed")
    finished = stack.run("worker", *flow, "--watch", "--watch-timeout", "420", timeout_seconds=450)
    assert finished.returncode == 0, finished.stdout + finished.stderr + stack.log("worker").read_text()[-4000:]
    assert psql(stack, "select count(*) from flow_run where state_type = 'COMPLETED'") == "1"
    verified = stack.run("worker", "relora", "verify", "composed", timeout_seconds=120)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "s3://relora/store" in stack.run("worker", "relora", "show", "composed@latest", timeout_seconds=60).stdout


def test_the_api_is_closed_to_who_has_no_password(stack: ComposeProcesses):
    address = f"http://127.0.0.1:{stack.ports['server']}/api/flows/count"
    request = urllib.request.Request(address, data=b"{}", headers={"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    password = base64.b64encode(stack.secrets["PREFECT_AUTH_STRING"].encode()).decode()
    request.add_header("Authorization", f"Basic {password}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert int(answer.read()) >= 1


def test_the_worker_is_healthy_and_the_page_finds_its_api(stack: ComposeProcesses):
    stack.wait_for("worker", "service_healthy")
    address = f"http://127.0.0.1:{stack.ports['server']}"
    with urllib.request.urlopen(f"{address}/ui-settings", timeout=30) as answer:
        assert json.loads(answer.read())["api_url"] == f"{address}/api"


def test_no_secret_is_in_the_database_or_in_any_log(stack: ComposeProcesses):
    binaries = postgres_binaries()
    assert binaries is not None
    dump = subprocess.run(
        [str(binaries / "pg_dump"), "-h", "127.0.0.1", "-U", "prefect", "prefect"],
        env={**stack.environment("postgres"), "PGPASSWORD": stack.secrets["POSTGRES_PASSWORD"]},
        capture_output=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    logs = {path.name: path.read_bytes() for path in stack.directory.glob("*.log")}
    assert b"pretrain" in dump and b"pretrain" in logs["worker.log"]
    for name, secret in stack.secrets.items():
        canary = secret.split(":")[-1] if name == "PREFECT_AUTH_STRING" else secret
        for place, content in {"the database": dump, **logs}.items():
            assert canary.encode() not in content, f"{name} is in {place}"


def test_a_dump_of_the_database_restores_by_the_runbooks_options(stack: ComposeProcesses):
    environment = {**stack.environment("postgres"), "PGPASSWORD": stack.secrets["POSTGRES_PASSWORD"]}
    at = ["-h", "127.0.0.1", "-U", "prefect"]
    binaries = postgres_binaries()
    assert binaries is not None

    def call(program: str, *arguments: str) -> None:
        subprocess.run([str(binaries / program), *at, *arguments], env=environment, check=True, timeout=120)

    dump = str(stack.directory / "prefect.dump")
    call("pg_dump", "--format=custom", "--file", dump, "prefect")
    call("createdb", "restored")
    call("pg_restore", "--clean", "--if-exists", "-d", "restored", dump)
    count = "select count(*) from deployment"
    assert int(psql(stack, count)) > 0
    assert psql(stack, count, database="restored") == psql(stack, count)


def test_deploying_again_changes_nothing(stack: ComposeProcesses):
    """`docker compose up` runs the one-shot service again."""
    before = psql(stack, "select count(*) from deployment"), psql(stack, "select count(*) from work_pool")
    stack.start("deploy")
    assert stack.processes["deploy"].wait(timeout=400) == 0, stack.log("deploy").read_text()
    assert (psql(stack, "select count(*) from deployment"), psql(stack, "select count(*) from work_pool")) == before


def test_the_kubernetes_pool_can_be_made_from_our_template(stack: ComposeProcesses):
    template = DEPLOY / "kubernetes" / "base-job-template.json"
    create = (
        "prefect",
        "work-pool",
        "create",
        "--type",
        "kubernetes",
        "--base-job-template",
        str(template),
        "relora-gpu",
    )
    made = stack.run("deploy", *create, timeout_seconds=120)
    assert made.returncode == 0, made.stdout + made.stderr
    path = "base_job_template->'variables'->'properties'->'gpu_count'->>'default'"
    assert psql(stack, f"select {path} from work_pool where type = 'kubernetes'") == "1"


def test_a_schedule_makes_runs_and_the_worker_starts_them(stack: ComposeProcesses):
    create = ("prefect", "deployment", "schedule", "create", "prune/weekly", "--cron", "* * * * *")
    made = stack.run("deploy", *create, timeout_seconds=120)
    assert made.returncode == 0, made.stdout + made.stderr
    ended = (
        "select f.state_type from flow_run f join deployment d on d.id = f.deployment_id where d.name = 'weekly'"
        " and f.auto_scheduled and f.state_type in ('COMPLETED', 'FAILED', 'CRASHED')"
    )
    deadline = time.monotonic() + 300
    while not (states := psql(stack, ended)):
        assert time.monotonic() < deadline, stack.log("server").read_text()[-3000:]
        time.sleep(1)
    assert set(states.split()) == {"COMPLETED"}, stack.log("worker").read_text()[-3000:]
    stack.run("deploy", "prefect", "deployment", "schedule", "clear", "prune/weekly", "-y", timeout_seconds=120)


def test_a_job_that_is_told_to_stop_goes_back_into_the_queue_and_continues_from_its_snapshot(stack: ComposeProcesses):
    """What a reclaimed spot node does to a Kubernetes job: its command, in the image's environment, gets SIGTERM."""
    profile = stack.directory / "longer.toml"
    smoke = (ROOT / "profiles" / "smoke.toml").read_text()
    profile.write_text(smoke.replace("cycle_length = 20", "cycle_length = 400").replace("cycles = 2", "cycles = 1"))
    deployed = stack.run(
        "deploy", "env", "RELORA_WORK_POOL=relora-gpu", "prefect", "--no-prompt", "deploy", "--prefect-file",
        "deploy/prefect.yaml", "-n", "pretrain/quickstart", timeout_seconds=120,
    )  # fmt: skip
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    flow = ("prefect", "deployment", "run", "pretrain/quickstart", "-p", f"profile={profile}", "-p", "run_id=spot")
    scheduled = stack.run("worker", *flow, timeout_seconds=120)
    flow_run = psql(stack, "select id from flow_run where state_type = 'SCHEDULED' and not auto_scheduled")
    assert flow_run, scheduled.stdout + scheduled.stderr

    first = start_job(stack, flow_run, "first")
    wait_until_said(stack, "first", r"step \d+/420", first)
    first.terminate()
    told = time.monotonic()
    first.wait(timeout=GRACE_SECONDS)
    seconds = time.monotonic() - told
    state = psql(stack, f"select state_name from flow_run where id = '{flow_run}'")
    assert state == "AwaitingRetry", stack.log("first").read_text()[-3000:]
    assert seconds < 30, "a spot node may give no more"

    second = start_job(stack, flow_run, "second")
    assert second.wait(timeout=300) == 0, stack.log("second").read_text()[-3000:]
    assert psql(stack, f"select state_name || run_count from flow_run where id = '{flow_run}'") == "Completed2"
    said = stack.log("second").read_text()
    assert "warm-start: steps" not in said, "what was committed is not done again"
    resumed = re.search(r"cycle-1: going on from the snapshot of step (\d+)", said)
    assert resumed and int(resumed[1]) > 20, said[-3000:]


def test_every_service_stops_within_its_grace(stack: ComposeProcesses):
    pids = [process.pid for process in stack.processes.values()]
    seconds = stack.down()
    assert max(seconds.values()) < 60, seconds
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and os.getpid() != pid]
