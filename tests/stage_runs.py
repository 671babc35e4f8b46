"""Run real stages in this process, one after the other, as the flow would in processes of their own."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from tiny_data import DATASET_ID

from relora_train.checkpoints.manifest import ParentRef
from relora_train.distributed import Ranks
from relora_train.method.stages import Stage, fingerprint_settings, plan_stages, stage_fingerprint
from relora_train.settings.profile import Profile
from relora_train.training.build import prepare_stage
from relora_train.training.files import read_training_state
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining
from relora_train.training.trainer import run_stage

CPU = Ranks(rank=0, world_size=1, device=torch.device("cpu"))

TINY = {
    "name": "tiny",
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "batch": {"sequences": 8, "sequence_length": 32},
    "schedule": {"warm_start_steps": 6, "cycles": 2, "cycle_length": 8, "warmup_steps": 2, "restart_warmup_steps": 2},
    "relora": {"rank": 4, "alpha": 4},
    "optimizer": {"learning_rate": 1e-2},
    "evaluation": {"sequences": 16, "batch_sequences": 8},
    "logging": {"every_steps": 2},
}


def tiny_profile(**sections: Any) -> Profile:
    """The tiny profile; a dict replaces single keys of a section, anything else the whole value."""
    settings: dict[str, Any] = {}
    for key in {*TINY, *sections}:
        base, new = TINY.get(key), sections.get(key)
        settings[key] = {**(base or {}), **new} if isinstance(new, dict) else (base if new is None else new)
    return Profile.model_validate(settings)


def stage_request(
    profile: Profile, stage: Stage | str, dataset: Path, output: Path, parent: Path | None = None
) -> StageRequest:
    """A request as the run module makes it, for a stage or the name of one in the profile's plan."""
    if isinstance(stage, str):
        stage = next(planned for planned in plan_stages(profile) if planned.name == stage)
    settings = fingerprint_settings(profile, stage, DATASET_ID)
    parent_ref = None
    if parent is not None:
        step = read_training_state(parent).step
        parent_ref = ParentRef(uri=parent.as_uri(), fingerprint=manifest_of(parent)["fingerprint"], step=step)
    return StageRequest(
        run_id="tiny",
        profile=profile,
        stage=stage,
        fingerprint=stage_fingerprint(settings, parent_ref.fingerprint if parent_ref else None),
        fingerprint_settings=settings,
        parent=parent_ref,
        parent_directory=parent,
        dataset_uri="file:///store/datasets/tiny/aaaaaaaaaaaaaaaa",
        dataset_id=DATASET_ID,
        dataset_directory=dataset,
        output_directory=output,
    )


def ignore(event: str, **fields: object) -> None:
    """Drop an event."""


def prepared(warm_start: Path, dataset: Path, output: Path, **sections: Any) -> StageTraining:
    """The first cycle of a tiny run, ready for its first update."""
    return prepare_stage(stage_request(tiny_profile(**sections), "cycle-1", dataset, output, warm_start), CPU)


def run_all(profile: Profile, dataset: Path, output: Path) -> dict[str, Path]:
    """Train every stage; the checkpoint directories by stage name."""
    made: dict[str, Path] = {}
    parent = None
    for stage in plan_stages(profile):
        parent_directory, parent = parent, output / stage.name
        run_stage(stage_request(profile, stage.name, dataset, parent, parent_directory), ignore)
        made[stage.name] = parent
    return made


def drawn_factor(name: str, shape: tuple[int, ...], *, cycle: int, seed: int = 0) -> torch.Tensor:
    """The A of a layer as a cycle begins: Kaiming uniform, its generator seeded by SHA-256 of seed, cycle and name."""
    generator = torch.Generator().manual_seed(seed_of(seed, cycle, name))
    bound = 1 / math.sqrt(shape[1])  # sqrt(6 / ((1 + 5) * in_features))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def seed_of(seed: int, cycle: int, name: str) -> int:
    """What everything random about a layer in a cycle is drawn from."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{cycle}/{name}".encode()).digest()[:8], "big") >> 1


def metrics_of(checkpoint: Path, kind: str = "train") -> list[dict[str, Any]]:
    records = map(json.loads, (checkpoint / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())
