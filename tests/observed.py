"""One real run, its server, its store and its console, for all tests that look at what a run leaves behind."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_server import QUIET, ServedPrefect, serving_prefect
from seaweed import SECRET_KEY, Seaweed

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "PREFECT_API_KEY": f"canary-prefect-{uuid.uuid4().hex}",
    "CANARY_IN_ENDPOINT": f"canary-endpoint-{uuid.uuid4().hex}",
    "HF_TOKEN": f"canary-hub-{uuid.uuid4().hex}",
}
"""Secrets by the variable that holds them; the first is the store's real one. Prefect masks its own key in logs."""

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Observed:
    """What tests/observed_flows.py did."""

    prefect: ServedPrefect
    seaweed: Seaweed
    bucket: str
    directory: Path
    """Everything that was written on this machine is below it, the server's database too."""
    console: str

    def flow_runs(self) -> list[Any]:
        """In the order in which they started."""
        return self.prefect.all_of("/flow_runs/filter", sort="START_TIME_ASC")

    def task_runs(self, flow_run: Any) -> list[Any]:
        only = {"id": {"any_": [flow_run["id"]]}}
        return self.prefect.all_of("/task_runs/filter", flow_runs=only, sort="EXPECTED_START_TIME_ASC")

    def artifacts(self, flow_run: Any) -> list[Any]:
        """Oldest first."""
        only = {"flow_run_id": {"any_": [flow_run["id"]]}}
        found = self.prefect.all_of("/artifacts/filter", artifacts=only, sort="CREATED_DESC")
        return found[::-1]

    def logs(self, flow_run: Any) -> list[Any]:
        only = {"flow_run_id": {"any_": [flow_run["id"]]}}
        return self.prefect.all_of("/logs/filter", logs=only, sort="TIMESTAMP_ASC")


@contextmanager
def observed_flows(seaweed: Seaweed, directory: Path) -> Iterator[Observed]:
    """Run the flows against a server of their own; the server stays up as long as the block."""
    bucket = f"observed-{uuid.uuid4().hex[:12]}"
    seaweed.create_bucket(bucket)
    with serving_prefect(directory / "server") as prefect:
        command = [sys.executable, str(Path(__file__).with_name("observed_flows.py")), f"s3://{bucket}/prefix"]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))},
            **QUIET,
            **seaweed.environment,
            **CANARIES,
            "PYTHONPATH": str(_ROOT),
            "PREFECT_API_URL": prefect.api_url,
            "PREFECT_HOME": str(directory / "client"),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "RELORA_CACHE": str(directory / "cache"),
            "TMPDIR": str(directory),
        }
        ended = subprocess.run(
            [*command, str(directory)], env=environment, cwd=directory, timeout=540, capture_output=True, text=True
        )
        console = ended.stdout + ended.stderr
        assert ended.returncode == 0, console[-5000:]
        yield Observed(prefect, seaweed, bucket, directory, console)
    seaweed.delete_bucket(bucket)
