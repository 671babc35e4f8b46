"""The light half of the library starts in an instant and runs where torch is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

LIGHT = (
    "relora_train.errors",
    "relora_train.objectives.registry",
    "relora_train.objectives.measures",
    "relora_train.objectives.facts",
    "relora_train.objectives.causal_lm_facts",
    "relora_train.objectives.image_facts",
    "relora_train.experiments.experiment",
    "relora_train.experiments.config",
    "relora_train.experiments.statistics",
    "relora_train.console.compare",
    "relora_train.config",
    "relora_train.pretrained_config",
    "relora_train.model_check",
    "relora_train.plan",
    "relora_train.schedule",
    "relora_train.manifest",
    "relora_train.bundle",
    "relora_train.method.contraction",
    "relora_train.benchmarking.measure",
    "relora_train.console.bench",
    "relora_train.file_checks",
    "relora_train.units",
    "relora_train.checkpoint_layout",
    "relora_train.checkpoint_resolve",
    "relora_train.checkpoint_store",
    "relora_train.deployments",
    "relora_train.parallel.devices",
    "relora_train.parallel.joining",
    "relora_train.kept_worker",
    "relora_train.launch",
    "relora_train.overrides",
    "relora_train.parameters",
    "relora_train.snapshots.store",
    "relora_train.snapshots.uploader",
    "relora_train.publishing",
    "relora_train.run",
    "relora_train.stage_work",
    "relora_train.lease",
    "relora_train.upkeep.pins",
    "relora_train.upkeep.protections",
    "relora_train.redaction",
    "relora_train.upkeep.pruning",
    "relora_train.upkeep.retention",
    "relora_train.retraining.options",
    "relora_train.retraining.series",
    "relora_train.retraining.series_data",
    "relora_train.retraining.series_record",
    "relora_train.upkeep.tombstone",
    "relora_train.upkeep.verify",
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
