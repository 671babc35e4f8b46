"""What an operator sees of a run in Prefect's UI, as its API tells it; and that nobody waits for the API."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from observed import Observed
from observed_flows import CHATTER_EVENTS, CHATTER_SECONDS_APART, RUN_ID, STRAY_LINE
from PIL import Image

from relora_train.reports.event_text import merge_table
from relora_train.storage.opening import open_store

STAGES = ["warm-start", "cycle-1", "cycle-2"]


@pytest.fixture(scope="module")
def flow_run(observed: Observed) -> Any:
    """The run that was killed in cycle-1 and went on from a snapshot."""
    return observed.flow_runs()[0]


@pytest.fixture(scope="module")
def artifacts(observed: Observed, flow_run: Any) -> list[Any]:
    return observed.artifacts(flow_run)


def latest(artifacts: list[Any], key: str) -> Any:
    return [artifact for artifact in artifacts if artifact["key"] == key][-1]


def chatter(observed: Observed) -> Any:
    return next(run for run in observed.flow_runs() if run["name"] == "chatter")


def test_runs_and_tasks_are_named_by_what_they_do(observed: Observed, flow_run: Any):
    assert flow_run["name"] == f"smoke · {RUN_ID}" and flow_run["state_type"] == "COMPLETED"
    assert [task["name"] for task in observed.task_runs(flow_run)] == [
        "open-store",
        f"check-model-of-{RUN_ID}",
        "tokenize-python-stdlib-smoke",
        "warm-start steps 1-20",
        "cycle-1 steps 21-40",
        "store warm-start",
        "cycle-2 steps 41-60",
        "store cycle-1",
        "store cycle-2",
        "evaluate-warm-start",
        "evaluate-cycle-2",
        f"report-{RUN_ID}",
    ]


def test_every_stage_ends_at_100_also_one_that_was_killed_and_went_on(observed: Observed, artifacts: list[Any]):
    assert "killed: True" in observed.console
    for stage in STAGES:
        progress = latest(artifacts, f"progress-{RUN_ID}-{stage}")
        assert (progress["type"], progress["data"]) == ("progress", 100)
        assert f"**{stage}**: steps " in progress["description"] and " done in " in progress["description"]
    killed = [artifact for artifact in artifacts if artifact["key"] == f"progress-{RUN_ID}-cycle-1"]
    assert len(killed) == 2 and 0 < killed[0]["data"] < 100
    assert "cycle-1 stopped" in killed[0]["description"]


def test_a_skipped_stage_says_so(observed: Observed):
    again = observed.flow_runs()[1]
    states = {task["name"]: task["state_name"] for task in observed.task_runs(again)}
    assert states["cycle-2 steps 41-60"] == "Skipped"
    shown = [artifact for artifact in observed.artifacts(again) if artifact["type"] == "progress"]
    assert len(shown) == len(STAGES)
    for artifact in shown:
        assert artifact["data"] == 100 and "skipped" in artifact["description"]


def test_every_committed_checkpoint_is_shown_with_its_uri(
    observed: Observed, artifacts: list[Any], monkeypatch: pytest.MonkeyPatch
):
    for name, value in observed.seaweed.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{observed.bucket}/prefix")
    objects = store.list(f"runs/{RUN_ID}/checkpoints/")
    committed = {info.key.rpartition("/")[0] for info in objects if info.key.endswith("/manifest.json")}
    shown = [latest(artifacts, f"checkpoint-{RUN_ID}-{stage}")["data"] for stage in STAGES]
    uris = [re.search(r"\| Checkpoint \| `(.+)` \|", text)[1] for text in shown]
    assert sorted(uris) == sorted(f"{store.uri}/{prefix}" for prefix in committed)


def test_every_merge_is_a_table_of_its_layers(artifacts: list[Any]):
    for cycle in (1, 2):
        artifact = latest(artifacts, f"merge-{RUN_ID}-cycle-{cycle}")
        assert artifact["type"] == "table"
        table = json.loads(artifact["data"])
        whole, kinds, layers = table[0], table[1:8], table[8:]
        assert float(whole["output change"]) < 1e-4 and float(whole["Adam zeroed"]) > 0.9
        assert float(whole["∇B"]) > 0 and float(whole["∇A"]) > 0
        assert [row["layer"] for row in kinds][:2] == ["all q_proj", "all k_proj"]
        assert len(layers) == 2 * 7 and layers[0]["layer"] == "layers.0.self_attn.q_proj"
        assert all(float(row["‖ΔW‖"]) > 0 and float(row["effective rank"]) >= 1 for row in layers)
    assert not [artifact for artifact in artifacts if artifact["key"] == f"merge-{RUN_ID}-warm-start"]


def test_norms_of_several_layers_are_of_all_their_weights_together():
    layers = {
        f"model.layers.{index}.{kind}.weight": {"update_norm": update, "weight_norm": weight, "effective_rank": rank}
        for index, kind, update, weight, rank in [(0, "q", 3.0, 6.0, 1.0), (1, "q", 4.0, 8.0, 3.0), (0, "v", 0.0, 1, 2)]
    }
    whole, q, v, *_ = merge_table({"layers": layers, "max_relative_output_change": 1e-7})
    assert (q["layer"], q["‖ΔW‖"], q["‖ΔW‖ / ‖W‖"], q["effective rank"]) == ("all q", "5", "0.5", "2")
    assert v["‖ΔW‖ / ‖W‖"] == "0" and v["output change"] == "" and whole["output change"] == "1e-07"


def test_one_report_holds_the_table_of_stages_and_a_small_picture(artifacts: list[Any]):
    (report,) = [artifact for artifact in artifacts if artifact["key"] == f"report-{RUN_ID}"]
    lines = report["data"].splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "`step-" in line] == STAGES
    places = [line for line in lines if line.startswith("- ") and "`s3://" in line]
    assert [line.split(": `s3://")[0] for line in places] == [f"- {stage}" for stage in STAGES]
    encoded = re.search(r"\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", report["data"])[1]
    picture = base64.b64decode(encoded, validate=True)
    assert Image.open(io.BytesIO(picture)).width > 400 and len(encoded) < 60_000
    assert "report.html" in report["description"] and "report/report.html`" in report["data"]
    assert re.search(r"\| cycle-2 \| 60 \| [\d.,]+ \| [\d.]+ \| [\d,]+ \|", report["data"]), "its evaluation"


def test_progress_is_logged_and_shown_at_a_bounded_rate(observed: Observed):
    """The worker's clock runs a tenth of a second an event; both the log and the artifact take one in ten seconds."""
    run = chatter(observed)
    most = CHATTER_EVENTS * CHATTER_SECONDS_APART / 10 + 1
    lines = [line for line in observed.logs(run) if "  loss " in line["message"]]
    assert most / 2 < len(lines) <= most
    assert all(line["task_run_id"] and line["level"] == 20 for line in lines)
    (progress,) = [artifact for artifact in observed.artifacts(run) if artifact["type"] == "progress"]
    only = {
        "occurred": {"since": "2020-01-01T00:00:00Z", "until": "2100-01-01T00:00:00Z"},
        "event": {"name": ["prefect.artifact.updated"]},
        "resource": {"id": [f"prefect.artifact.{progress['id']}"]},
    }
    updates = observed.prefect.post("/events/filter", filter=only, limit=50)["total"]
    assert 1 <= updates <= most


def test_what_a_worker_prints_beside_its_events_is_logged_for_debugging(observed: Observed):
    (line,) = [line for line in observed.logs(chatter(observed)) if line["message"] == STRAY_LINE]
    assert line["level"] == 10 and line["task_run_id"]


def test_an_api_that_takes_no_artifact_costs_a_training_little(observed: Observed):
    """Through a way on which requests for artifacts are never answered."""
    run = next(run for run in observed.flow_runs() if run["name"] == "unanswered")
    assert run["state_type"] == "COMPLETED"
    assert observed.artifacts(run) == []
    assert "cycle-2 steps 41-60" in [task["name"] for task in observed.task_runs(run)]
    slow = [line for line in observed.logs(run) if "Prefect's API is slow to answer" in line["message"]]
    assert len(slow) == 2  # at the end of the stage, and of the report


@contextmanager
def silent_server() -> Iterator[socket.socket]:
    """It accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.filterwarnings("ignore:Artifact creation outside:FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nobody_waits_for_an_api_that_never_answers():
    from prefect.logging import disable_run_logger
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.artifacts import ArtifactQueue, publish_markdown

    with (
        silent_server() as server,
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.getsockname()[1]}/api"}),
        disable_run_logger(),
    ):
        began = time.monotonic()
        with ArtifactQueue(wait_seconds=0.5) as publisher:
            from prefect.artifacts import create_markdown_artifact

            for number in range(1000):
                publisher.offer(f"a{number % 3}", lambda: create_markdown_artifact(key="a", markdown="b"))
            assert time.monotonic() - began < 0.3
            server.settimeout(10)
            connection, _ = server.accept()  # it was asked
            began = time.monotonic()
        assert 0.4 < time.monotonic() - began < 2
        connection.close()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), disable_run_logger():
        began = time.monotonic()
        publish_markdown("a", "b", "c")
        assert time.monotonic() - began < 8
