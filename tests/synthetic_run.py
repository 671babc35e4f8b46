"""A run's line of real checkpoints in a real store, made without training: numbers from formulas, weights from B A."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, ParentRef, describe_files
from relora_train.checkpoints.run import CheckpointStore
from relora_train.method.schedule import jagged_cosine
from relora_train.method.stages import Stage, fingerprint_settings, plan_stages, stage_fingerprint
from relora_train.settings.data import BatchConfig
from relora_train.settings.method import ModelConfig, ReLoRAConfig, ScheduleConfig
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore

DATASET = "d" * 64
Weights = dict[str, np.ndarray]


def synthetic_profile(**changes: Any) -> Profile:
    sections: dict[str, Any] = {
        "name": "synthetic",
        "model": ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3),
        "batch": BatchConfig(sequences=8, sequence_length=64),
        "schedule": ScheduleConfig(
            warm_start_steps=40, cycles=3, cycle_length=40, warmup_steps=4, restart_warmup_steps=4
        ),
        "relora": ReLoRAConfig(rank=4),
    }
    return Profile(**{**sections, **changes})


def llama_weights(profile: Profile, *, seed: int = 0) -> Weights:
    rng, model = np.random.default_rng(seed), profile.model
    width, inner = model.hidden_size, model.intermediate_size
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.o_proj": (width, width),
    }
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    weights = {"model.embed_tokens.weight": rng.normal(0, 0.02, (64, width)).astype(np.float32)}
    for block in range(model.num_hidden_layers):
        weights[f"model.layers.{block}.input_layernorm.weight"] = np.ones(width, np.float32)
        for name, shape in shapes.items():
            weights[f"model.layers.{block}.{name}.weight"] = rng.normal(0, 0.02, shape).astype(np.float32)
    return weights


def commit_run(
    store: ObjectStore,
    run_id: str,
    profile: Profile,
    scratch: Path,
    *,
    parent: CheckpointRef | None = None,
    stages: Sequence[Stage] | None = None,
    weights: Weights | None = None,
    log_every: int = 1,
    edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
    seconds_per_step: float = 0.5,
) -> list[CheckpointRef]:
    """Commit the checkpoints of `stages`, oldest first. `edit` may change each training record."""
    weights = weights or llama_weights(profile)
    rng = np.random.default_rng(profile.seed + 1)
    line: list[CheckpointRef] = []
    for stage in stages or plan_stages(profile):
        updates = _updates(weights, stage, profile, rng)
        weights = {name: value + _product(*updates[name]) for name, value in weights.items()}
        directory = scratch / run_id / stage.name
        directory.mkdir(parents=True)
        if stage.low_rank:
            _save_adapter(updates, profile, directory / "adapter")
        save_file(weights, directory / "model.safetensors")
        (directory / "optimizer.safetensors").write_bytes(b"not read by a report")
        (directory / "profile.json").write_text(profile.model_dump_json())
        records = [edit(record) for record in _train_records(profile, stage, rng, log_every, seconds_per_step)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        line.append(_commit(store, run_id, profile, stage, directory, line[-1] if line else parent, seconds_per_step))
    return line


def evaluation_of(ref: CheckpointRef, texts: dict[str, str]) -> dict[str, Any]:
    """What the evaluation task says of a checkpoint."""
    return {
        "checkpoint_uri": ref.uri,
        "stage": ref.manifest.stage,
        "step": ref.step,
        **_scores(ref.step, 0.01),
        "val_tokens": 262_144,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in texts.items()],
    }


def _commit(
    store: ObjectStore,
    run_id: str,
    profile: Profile,
    stage: Stage,
    directory: Path,
    parent: CheckpointRef | None,
    seconds_per_step: float,
) -> CheckpointRef:
    settings = fingerprint_settings(profile, stage, DATASET)
    manifest = CheckpointManifest(
        files=describe_files(directory),
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=stage.end_step),
        attempt=hashlib.sha256(stage.name.encode()).hexdigest()[:16],
        versions={"relora-train": "0.1.0", "torch": "2.13.0"},
        run_id=run_id,
        profile=profile.name,
        stage=stage.name,
        step=stage.end_step,
        cycle=stage.cycle,
        tokens_seen=stage.end_step * profile.batch.tokens,
        fingerprint=stage_fingerprint(settings, parent.fingerprint if parent else None),
        fingerprint_settings=settings,
        parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step) if parent else None,
        dataset_id=DATASET,
        dataset_uri=f"{store.uri}/datasets/corpus/{DATASET[:16]}",
        evaluation={
            **_scores(stage.end_step),
            **{f"{key}_before": value for key, value in _scores(stage.start_step).items()},
        },
        merge_report=_merge_report(profile, stage) if stage.low_rank else {},
        stage_seconds=stage.steps * seconds_per_step,
    )
    return CheckpointStore(store, run_id).commit(directory, manifest)


def _updates(
    weights: Weights, stage: Stage, profile: Profile, rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a stage adds to each weight, as factors (out, rank) and (rank, in); of what is no matrix, zeros."""
    found = {}
    for name, value in weights.items():
        rows, columns = value.shape if value.ndim == 2 else (0, len(value))
        rank = profile.relora.rank if stage.low_rank else min(rows, columns)
        size = 0.08 if stage.low_rank else 0.05
        left = rng.normal(0, size, (rows, rank))
        right = rng.normal(0, size, (rank, columns)) * _decay(rank)[:, None]
        found[name] = (left.astype(np.float32), right.astype(np.float32))
    return found


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left @ right if len(left) else np.zeros(right.shape[1], np.float32)


def _save_adapter(updates: dict[str, tuple[np.ndarray, np.ndarray]], profile: Profile, directory: Path) -> None:
    """As a stage does, for the layers that are wrapped."""
    directory.mkdir()
    tensors, scaling = {}, profile.relora.alpha / profile.relora.rank
    for name, (left, right) in updates.items():
        if "proj" in name and any(f"{kind}." in name for kind in profile.relora.target_modules or ("proj",)):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left / np.float32(scaling)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"r": profile.relora.rank, "lora_alpha": profile.relora.alpha, "use_rslora": False}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _decay(rank: int) -> np.ndarray:
    return np.exp(-3 * np.arange(rank) / rank)


def _loss(step: int) -> float:
    return 3.1 + 5.2 / (1 + step / 15) ** 0.8


def _scores(step: int, offset: float = 0.05) -> dict[str, float]:
    loss = _loss(step) + offset
    return {"val_loss": loss, "val_perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 3.6}


def _train_records(
    profile: Profile, stage: Stage, rng: np.random.Generator, log_every: int, seconds_per_step: float
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(stage.start_step + 1, stage.end_step + 1):
        if step % log_every:
            continue
        since = step - stage.start_step
        record = {
            "kind": "train",
            "step": step,
            "loss": _loss(step) + rng.normal(0, 0.05) + (0.25 * math.exp(-since / 6) if stage.low_rank else 0),
            "learning_rate": _learning_rate(profile, stage, step),
            "grad_norm": 0.8 + rng.exponential(0.2),
            "tokens_per_second": profile.batch.tokens / seconds_per_step * rng.normal(1, 0.03),
            "tokens_seen": step * profile.batch.tokens,
            "seconds": since * seconds_per_step,
        }
        if stage.low_rank:
            record["lora_A_grad_norm"] = 0.05 + 0.4 * (1 - math.exp(-since / 8)) + rng.exponential(0.05)
            record["lora_B_grad_norm"] = 0.6 + rng.exponential(0.1)
        records.append(record)
    records.append({"kind": "evaluation", "step": stage.end_step, "when": "after", **_scores(stage.end_step)})
    return records


def _learning_rate(profile: Profile, stage: Stage, step: int) -> float:
    schedule = profile.schedule
    if not stage.low_rank:
        return 5e-4 * min(1.0, step / max(1, schedule.warmup_steps))
    return 1e-3 * jagged_cosine(
        step - 1 - schedule.warm_start_steps,
        cycle_start=stage.phase_step,
        total_steps=schedule.cycles * schedule.cycle_length,
        warmup_steps=schedule.warmup_steps,
        restart_warmup_steps=schedule.restart_warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )


def _merge_report(profile: Profile, stage: Stage) -> dict[str, Any]:
    layers = {
        name.removesuffix(".weight"): {
            "update_norm": 0.9,
            "weight_norm": 20.0,
            "relative_update_norm": 0.045 + 0.001 * i,
            "effective_rank": 0.8 * profile.relora.rank,
        }
        for i, name in enumerate(llama_weights(profile))
        if "proj" in name
    }
    return {
        "cycle": stage.cycle,
        "max_relative_output_change": 3.1e-7 * stage.cycle,
        "relative_update_norm": 0.052 / stage.cycle,
        "effective_rank": 0.83 * profile.relora.rank,
        "optimizer_state_zeroed": 0.99,
        "layers": layers,
    }
