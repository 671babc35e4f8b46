"""Pictures of what an operator sees: `python tests/screenshots.py DIRECTORY [PROFILE]`, with Chromium installed.

Starts a real server, trains a run to its end and a second one that is still going, and makes a deployment of the flow,
all on loopback. Takes a picture of each page and prints their paths. For people; no test looks at them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefect_server import ServedPrefect, serving_prefect

ROOT = Path(__file__).resolve().parent.parent
_RENDER_MILLISECONDS = 20_000
_WAIT_SECONDS = 600
_DEPLOY = """
from flows.pretrain import pretrain
from prefect.deployments.runner import EntrypointType
module = EntrypointType.MODULE_PATH
pretrain.to_deployment("by-hand", entrypoint_type=module, work_pool_name="screenshots").apply()
"""


def main() -> None:
    directory, profile = Path(sys.argv[1]).resolve(), (sys.argv[2:] or ["smoke"])[0]
    directory.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("This needs a Chromium in the path.")
    with tempfile.TemporaryDirectory(prefix="relora-screenshots-") as scratch:
        work = Path(scratch)
        with serving_prefect(work / "server") as prefect:
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PREFECT_API_URL": prefect.api_url,
                "PREFECT_HOME": str(work / "client"),
                "RELORA_CACHE": str(work / "cache"),
                "RELORA_STORE": str(work / "store"),
            }
            photographer = Photographer(chromium, prefect.api_url.removesuffix("/api"), directory, work)
            finished_pages(photographer, prefect, relora_run(profile, environment, work), environment)
            running_pages(photographer, prefect, relora_run(profile, environment, work, schedule__cycle_length=20_000))
            deployment_pages(photographer, prefect, environment)


class Photographer:
    """Takes pictures of the pages of one server."""

    def __init__(self, chromium: str, root: str, directory: Path, work: Path) -> None:
        self._chromium, self._root, self._directory, self._profile = chromium, root, directory, work / "chromium"

    def take(self, name: str, page: str, *, height: int = 1400) -> None:
        path = self._directory / f"{name}.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
        options += [f"--window-size=1500,{height}", f"--virtual-time-budget={_RENDER_MILLISECONDS}"]
        options += [f"--user-data-dir={self._profile}", f"--screenshot={path}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        subprocess.run([self._chromium, *options, f"{self._root}{page}"], check=True, timeout=180, **quiet)
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()


def relora_run(profile: str, environment: dict[str, str], work: Path, **sets: Any) -> subprocess.Popen[bytes]:
    """The command that starts a run, as a process."""
    settings = [f"--set={key.replace('__', '.')}={value}" for key, value in sets.items()]
    command = [sys.executable, "-m", "relora_train.cli.app", "run", profile, *settings]
    return subprocess.Popen(command, env=environment, cwd=work, stdin=subprocess.DEVNULL)


def finished_pages(
    photographer: Photographer, prefect: ServedPrefect, process: subprocess.Popen[bytes], environment: dict[str, str]
) -> None:
    process.wait(timeout=_WAIT_SECONDS)
    (run,) = prefect.post("/flow_runs/filter", sort="START_TIME_DESC", limit=1)
    photographer.take("finished-run", f"/runs/flow-run/{run['id']}")
    photographer.take("finished-run-artifacts", f"/v2/runs/flow-run/{run['id']}?tab=Artifacts", height=2200)
    photographer.take("artifacts", "/artifacts")
    photographer.take("runs", "/runs")
    only = {"flow_run_id": {"any_": [run["id"]]}}
    artifacts = prefect.all_of("/artifacts/filter", artifacts=only, sort="CREATED_DESC")
    for kind in ("report", "checkpoint", "merge", "progress"):
        newest = next(artifact for artifact in artifacts if artifact["key"].startswith(kind))
        photographer.take(f"artifact-{kind}", f"/artifacts/artifact/{newest['id']}")


def running_pages(photographer: Photographer, prefect: ServedPrefect, process: subprocess.Popen[bytes]) -> None:
    """Mid-run: the warm start is done, a cycle is going."""
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            (run,) = prefect.post("/flow_runs/filter", sort="START_TIME_DESC", limit=1)
            only = {"flow_run_id": {"any_": [run["id"]]}}
            shown = prefect.all_of("/artifacts/filter", artifacts=only, sort="CREATED_DESC")
            going = [a for a in shown if a["type"] == "progress" and 0 < a["data"] < 100]
            if run["state_type"] == "RUNNING" and going:
                break
        photographer.take("running-progress", f"/artifacts/artifact/{going[0]['id']}", height=700)
        photographer.take("running-run", f"/runs/flow-run/{run['id']}")
        photographer.take("running-run-artifacts", f"/v2/runs/flow-run/{run['id']}?tab=Artifacts", height=2200)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def deployment_pages(photographer: Photographer, prefect: ServedPrefect, environment: dict[str, str]) -> None:
    """The form in which a run is started by hand."""
    prefect.post("/work_pools/", name="screenshots", type="process")
    subprocess.run([sys.executable, "-c", _DEPLOY], env=environment, cwd=ROOT, check=True, timeout=180)
    (deployment,) = prefect.post("/deployments/filter", limit=1)
    photographer.take("deployment", f"/deployments/deployment/{deployment['id']}")
    photographer.take("deployment-form", f"/deployments/deployment/{deployment['id']}/run", height=2600)


if __name__ == "__main__":
    main()
