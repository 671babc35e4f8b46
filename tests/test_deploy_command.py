"""`relora deploy`: a deployment of one's own profile, and the shipped files on a machine without a checkout."""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_operator import AS_DOCUMENTED, ROOT
from test_deploy_yaml import DEPLOYMENTS, flow_of

from relora_train.cli.app import main
from relora_train.cli.deploy import SHIPPED
from relora_train.settings.load import load_profile

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Deploy = Callable[..., str]


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Deploy:
    """Call the command in a directory with a profile of one's own, and return what it said; `expect` is its exit."""
    monkeypatch.chdir(tmp_path)
    smoke = (ROOT / "profiles" / "smoke.toml").read_text()
    (tmp_path / "mine.toml").write_text(smoke)

    def call(*arguments: str, expect: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["deploy", *arguments])
        said = capsys.readouterr()
        assert ended.value.code == expect, said
        return said.out + said.err

    return call


def printed(deploy: Deploy, *arguments: str) -> dict[str, Any]:
    (made,) = yaml.safe_load(deploy(*arguments, "--print"))["deployments"]
    return made


@pytest.mark.parametrize(
    ("options", "flow", "name", "parameters"),
    [
        ((), "pretrain", "mine", {}),
        (("--series", "news"), "retrain", "news", {"series": "news"}),
        (("--cron", "15 2 * * *", "--set", "relora.rank=4"), "retrain", "mine",
         {"series": "mine", "overrides": {"relora": {"rank": 4}}}),
    ],
)  # fmt: skip
def test_a_deployment_has_the_job_of_the_shipped_ones_and_parameters_its_flow_takes(
    deploy: Deploy, tmp_path: Path, options: tuple[str, ...], flow: str, name: str, parameters: dict[str, Any]
):
    made = printed(deploy, "mine.toml", *options)
    assert (flow_of(made).name, made["name"]) == (flow, name)
    assert made["parameters"] == {"profile": str(tmp_path / "mine.toml"), **parameters}
    shipped = DEPLOYMENTS["pretrain/quickstart"]
    assert all(made[key] == shipped[key] for key in ("pull", "version", "tags", "work_pool"))
    asked = {} if flow == "retrain" else {"run_id": "r"}
    taken = flow_of(made).validate_parameters({**made["parameters"], **asked})
    rank = parameters.get("overrides", {}).get("relora", {}).get("rank", load_profile("smoke").relora.rank)
    assert (
        load_profile(taken["profile"], taken["overrides"].model_dump() if taken.get("overrides") else {}).relora.rank
        == rank
    )


def test_a_schedule_is_in_the_file_and_only_where_it_is_asked_for(deploy: Deploy):
    made = printed(deploy, "quickstart", "--series", "news", "--cron", "15 2 * * *", "--timezone", "Europe/Berlin")
    assert made["schedules"] == [{"slug": "relora", "cron": "15 2 * * *", "timezone": "Europe/Berlin"}]
    assert made["parameters"]["profile"] == "quickstart", "a shipped profile is where the package is"
    assert "schedules" not in printed(deploy, "quickstart", "--series", "news")


def test_the_file_is_the_one_printed_and_one_changed_by_hand_is_kept(deploy: Deploy, tmp_path: Path):
    said = deploy("mine.toml", "--cron", "15 2 * * *")
    assert "prefect --no-prompt deploy --all --prefect-file mine.prefect.yaml" in said
    path = tmp_path / "mine.prefect.yaml"
    assert path.read_text() == deploy("mine.toml", "--cron", "15 2 * * *", "--print")
    deploy("mine.toml", "--cron", "15 2 * * *")
    path.write_text("# mine\n" + path.read_text())
    assert "--force replaces it" in deploy("mine.toml", "--cron", "15 2 * * *", expect=2)
    assert path.read_text().startswith("# mine")
    deploy("mine.toml", "--cron", "15 2 * * *", "--force")
    assert not path.read_text().startswith("# mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mine.toml", "--cron", "15 2 * *"), "has 4 parts and needs five"),
        (("mine.toml", "--cron", "60 2 * * *"), "has '60' as its minute, which is 59 at most"),
        (("mine.toml", "--cron", "15 2 * * 1-8"), "has '1-8' as its weekday, which is 7 at most"),
        (("mine.toml", "--cron", "15 2 * * *", "--timezone", "Mars"), "no zone"),
        (("mine.toml", "--series", "a/b"), "not a valid name of a series"),
        (("mine.toml", "--set", "name=../up"), "not a valid name of a deployment"),
        (("mine.toml", "--set", "relora.rnak=4"), "no such setting"),
        (("mine.toml", "--set", "data.source=text", "--set", "data.paths=['a.txt']"), "'a.txt', relative to this"),
        (("mine.toml", "--set", "tokenizer.path=mine.toml"), "'mine.toml', relative to this"),
        ((), "Name the profile"),
        (("mine.toml", "--init", "there"), "takes no profile"),
    ],
)  # fmt: skip
def test_what_would_fail_at_night_is_refused_now(deploy: Deploy, tmp_path: Path, arguments: tuple[str, ...], said: str):
    assert said in " ".join(deploy(*arguments, expect=2).split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_addresses_and_whole_paths_of_data_are_deployed(deploy: Deploy):
    paths = ["s3://bucket/incoming/", "/data/a.txt", "file:///data/b.txt", "~/c.txt"]
    made = printed(deploy, "mine.toml", "--set", "data.source=text", "--set", f"data.paths={paths}")
    assert made["parameters"]["overrides"]["data"]["paths"] == paths


def test_the_wheel_brings_every_file_that_init_writes():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in SHIPPED:
        places = {
            f"{target}{f'deploy/{name}'.removeprefix(source)}"
            for source, target in included["force-include"].items()
            if f"deploy/{name}".startswith(source)
        }
        assert places == {f"relora_train/_deploy/{name}"} and (ROOT / "deploy" / name).is_file()


def test_init_writes_the_shipped_files_with_the_programs_of_this_environment(deploy: Deploy, tmp_path: Path):
    said = deploy("--init", "there")
    written = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert written == set(SHIPPED) and all(f"there/{name}" in said for name in SHIPPED)
    for name in SHIPPED[:3]:
        assert (tmp_path / "there" / name).read_text() == (ROOT / "deploy" / name).read_text()
    for unit in SHIPPED[3:]:
        text = (tmp_path / "there" / unit).read_text()
        assert f"ExecStart={Path(sys.executable).parent}/prefect" in text and "/opt/relora" not in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(deploy: Deploy, tmp_path: Path):
    deploy("--init", "there")
    units = [str(tmp_path / "there" / name) for name in SHIPPED if name.endswith(".service")]
    taken = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    faults = [line for line in taken.stderr.splitlines() if "relora-" in line and "user" not in line.lower()]
    assert (taken.returncode, faults) == (0, []), taken.stderr


def test_the_units_set_what_the_runbook_says_of_server_and_worker():
    server, worker = ((ROOT / "deploy" / unit).read_text() for unit in SHIPPED[3:])
    lease, retries = AS_DOCUMENTED.items()
    assert "Environment={}={}".format(*lease) in server and "Environment={}={}".format(*retries) in worker
