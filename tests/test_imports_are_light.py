"""The light half of the library starts in an instant and runs where torch is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

LIGHT = (
    "relora_train.errors",
    "relora_train.settings.objectives",
    "relora_train.settings.measures",
    "relora_train.experiments.experiment",
    "relora_train.experiments.config",
    "relora_train.reports.statistics",
    "relora_train.cli.compare",
    "relora_train.settings.profile",
    "relora_train.training.models.pretrained_config",
    "relora_train.runs.model_check",
    "relora_train.runs.plan",
    "relora_train.method.schedule",
    "relora_train.checkpoints.manifest",
    "relora_train.checkpoints.commit",
    "relora_train.method.products",
    "relora_train.experiments.bench",
    "relora_train.cli.bench",
    "relora_train.checkpoints.file_checks",
    "relora_train.text",
    "relora_train.checkpoints.layout",
    "relora_train.checkpoints.names",
    "relora_train.checkpoints.view",
    "relora_train.cli.deployments",
    "relora_train.devices",
    "relora_train.runs.joining",
    "relora_train.runs.kept_worker",
    "relora_train.runs.launch",
    "relora_train.settings.overrides",
    "flows.parameters",
    "relora_train.checkpoints.snapshots",
    "relora_train.runs.snapshot_uploader",
    "relora_train.runs.publishing",
    "relora_train.runs.run",
    "relora_train.runs.stage_work",
    "relora_train.checkpoints.lease",
    "relora_train.checkpoints.pins",
    "relora_train.checkpoints.upkeep.protections",
    "relora_train.storage.redaction",
    "relora_train.checkpoints.upkeep.pruning",
    "relora_train.checkpoints.upkeep.retention",
    "relora_train.runs.retraining.options",
    "relora_train.checkpoints.series",
    "relora_train.runs.retraining.series_data",
    "relora_train.checkpoints.series_record",
    "relora_train.checkpoints.tombstone",
    "relora_train.checkpoints.upkeep.verify",
    "relora_train.storage.base",
    "relora_train.storage.opening",
    "relora_train.storage.local",
    "relora_train.storage.memory",
    "relora_train.storage.preflight",
    "relora_train.storage.s3",
    "relora_train.storage.s3_errors",
)
HEAVY = ("torch", "boto3", "botocore", "prefect", "transformers", "datasets", "numpy")


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_opening_any_store_imports_nothing_heavy():
    program = (
        "import sys; from relora_train.storage.opening import open_store\n"
        "[open_store(uri) for uri in ('x', 'file:///x', 'memory://x', 's3://bucket/x')]\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
