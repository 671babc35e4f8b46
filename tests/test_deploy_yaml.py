"""What lies in deploy/ is sound: it can be checked without a server."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_train.cli.serve import choose_deployments, deployments_file
from relora_train.errors import ConfigError
from relora_train.settings.load import list_profiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
DEPLOYMENTS = {each["full_name"]: each for each in choose_deployments()}
RETRAIN = "retrain/nightly"


def flow_of(deployment: dict[str, Any]) -> Any:
    module, _, name = deployment["entrypoint"].partition(":")
    return getattr(importlib.import_module(module), name)


def test_every_deployment_of_the_project_is_there():
    sizes = {f"pretrain/{path.stem.replace('_', '-')}" for path in list_profiles() if path.stem.startswith("llama_")}
    others = {"pretrain/quickstart", RETRAIN, "evaluate/on-demand", "prune/weekly"}
    assert set(DEPLOYMENTS) == sizes | others and len(sizes) == 5
    assert deployments_file() == DEPLOY / "prefect.yaml"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_names_a_flow_and_parameters_it_takes(name: str):
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools import is_valid_schema, validate

    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    assert f"{flow.name}/{deployment['name']}" == name
    schema = parameter_schema(flow).model_dump_for_openapi()
    is_valid_schema(schema)
    given = deployment.get("parameters", {})
    validate(given, schema, raise_on_error=True, ignore_required=True)
    asked = {name: "some-run" for name in schema.get("required", ()) if name not in given}
    flow.validate_parameters({**given, **asked})
    assert all(field.get("description") for field in schema["properties"].values()), "the form would not explain it"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_pulls_nothing_and_nothing_of_it_can_be_lost_with_the_server(name: str):
    deployment = DEPLOYMENTS[name]
    assert deployment["pull"] == [], "Prefect would write the deploying machine's directory into it"
    assert deployment["work_pool"]["name"] == "{{ $RELORA_WORK_POOL }}"
    assert "concurrency_limit" not in deployment, "Prefect ends a run whose lease its server lost"
    assert deployment["work_pool"]["job_variables"]["env"]["PREFECT_CLIENT_MAX_RETRIES"] == "9", "ten minutes"
    assert deployment["description"]


def test_schedules_are_valid():
    from prefect.client.schemas.schedules import CronSchedule

    scheduled = {name: each["schedules"] for name, each in DEPLOYMENTS.items() if "schedules" in each}
    assert set(scheduled) == {"prune/weekly"}, "a training of a sample source every night helps nobody"
    for schedules in scheduled.values():
        for schedule in schedules:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
            assert re.fullmatch(r"[a-z0-9-]+", schedule["slug"])


def test_only_deployments_that_need_a_gpu_wait_for_one():
    limited = {name for name, each in DEPLOYMENTS.items() if "gpu_limit" in each.get("parameters", {})}
    assert limited == {name for name in DEPLOYMENTS if name.startswith("pretrain/llama-")}


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_no_file_holds_a_path_or_a_secret_of_a_machine(path: Path):
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(^|[\s\"'=])(/(home|root|tmp|work|Users|var|opt|mnt)\b|[A-Z]:\\|~/)", text)
    assert not re.search(r"AKIA[0-9A-Z]{16}", text)


def test_the_automations_are_ones_prefect_takes_and_wait_as_long_as_a_living_run_may_be_silent():
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    tags = {f"prefect.tag.{tag}" for each in DEPLOYMENTS.values() for tag in each["tags"]}
    beats = [
        each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for each in DEPLOYMENTS.values()
    ]
    template = json.loads((DEPLOY / "kubernetes" / "base-job-template.json").read_text())
    seconds_of_silence = {
        "relora-dead-run": 3 * max(map(int, beats)),
        "relora-dead-start": 120,
        "relora-dead-start-elsewhere": 60 + template["variables"]["properties"]["pod_watch_timeout_seconds"]["default"],
    }
    automations = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    alarms = [each["name"] for each in automations if each["actions"] == [{"type": "do-nothing"}]]
    assert [each["name"] for each in automations] == [*seconds_of_silence, *alarms] and len(alarms) == 5
    runbook = (DEPLOY / "README.md").read_text()
    for given in automations:
        automation = AutomationCore.model_validate(given)
        assert isinstance(automation.trigger, EventTrigger) and f"| `{given['name']}` |" in runbook
        if given["name"] in alarms:
            continue
        assert automation.trigger.within.total_seconds() >= seconds_of_silence[given["name"]]
        related = given["trigger"]["match_related"]
        tagged = related if isinstance(related, dict) else related[0]
        assert tagged["prefect.resource.id"] in tags


def test_an_unknown_deployment_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"no deployment 'pretrain/huge'.*pretrain/quickstart"):
        choose_deployments(["pretrain/huge"])
    assert [each["full_name"] for each in choose_deployments(["prune/weekly"])] == ["prune/weekly"]
    assert len(choose_deployments([])) == len(DEPLOYMENTS)
