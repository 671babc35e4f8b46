"""Stages of this library, tiny or of a shipped profile's shape, ready for their first update."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from check_run import Run
from stage_runs import stage_request, tiny_profile
from tiny_data import write_tiny_dataset

from relora_train.devices import dropout_mask_here
from relora_train.distributed import Ranks
from relora_train.experiments import bench_worker
from relora_train.experiments.bench import FULL, RELORA, StepRequest, step_requests
from relora_train.method.layer import relora_layers
from relora_train.settings.load import load_profile
from relora_train.training.build import prepare_stage
from relora_train.training.models.causal_lm import CausalLM
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining
from relora_train.training.torch_settings import configure_torch

TINY_SHAPE = {
    "model.hidden_size": 32,
    "model.intermediate_size": 52,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.vocab_size": 320,
    "model.max_position_embeddings": 64,
    "tokenizer.vocab_size": 320,
    "batch.sequence_length": 16,
    "relora.rank": 4,
    "launch.threads": 1,
}
"""In a dry run, in place of a profile's."""

CPU = torch.device("cpu")


def tiny_dataset(run: Run) -> Path:
    """Return one dataset for all checks."""
    directory = run.shared / "tiny-dataset"
    return directory if directory.exists() else write_tiny_dataset(directory)


def tiny_request(run: Run, stage: str, output: str, *, parent: Path | None = None, **sections: Any) -> StageRequest:
    """Return the request of a stage of the tiny profile, on the run's device if no other is set."""
    sections["launch"] = {"device": run.device_type, "compile": False} | sections.get("launch", {})
    request = stage_request(tiny_profile(**sections), stage, tiny_dataset(run), run.scratch / output, parent)
    return request.model_copy(update={"dropout_mask": dropout_mask_here(request.profile)})


def tiny_stage(run: Run, stage: str, *, device: torch.device | None = None, **sections: Any) -> StageTraining:
    """Return a tiny stage whose parent is the beginning."""
    device = run.device if device is None else device
    sections["launch"] = {"device": device.type} | sections.get("launch", {})
    request = tiny_request(run, stage, f"{stage}-{device.type}", **sections)
    configure_torch(request.profile)
    with compiled_lightly(run):
        return prepare_stage(request, Ranks(rank=0, world_size=1, device=device))


def updates_of(training: StageTraining) -> range:
    """Return the numbers of a stage's updates."""
    return range(training.stage.first_step, training.stage.end_step + 1)


def shape_request(run: Run, name: str, *, low_rank: bool = True, **settings: Any) -> StepRequest:
    """Return a benchmark's request for a shipped profile's shape: one forward pass an update, random tokens.

    settings: 'section__key' = value. In a dry run the shape is tiny.
    """
    given = {key.replace("__", "."): value for key, value in settings.items()}
    given = {"launch.device": run.device_type, "tokenizer.path": None, "tokenizer.vocab_size": 32_100} | given
    if run.dry:
        given |= TINY_SHAPE | {"batch.micro_sequences": 2 if given.get("batch.micro_sequences", 16) <= 16 else 4}
    profile = load_profile(name, given)
    return step_requests(profile, updates=10_000)[RELORA if low_rank else FULL]


def shape_stage(run: Run, request: StepRequest, *, keep_masters: bool = False) -> StageTraining:
    """Return the stage, its weights made on the device: a CPU draws 1.3 billion in 15 s.

    keep_masters: hold the exact frozen weights where a stage with a parent has them, on the disk; else not at all.
    """
    directory = run.scratch / f"stage-{len(list(run.scratch.iterdir()))}"
    with made_on(run.device), compiled_lightly(run):
        training = bench_worker.prepare(request, directory)
    if training.masters is not None:
        if keep_masters:
            for name in training.masters:
                training.masters[name] = training.masters[name]
        else:
            training.masters = None
    return training


def stop_sharing(model: torch.nn.Module) -> None:
    """Let every low-rank layer follow the reference."""
    for _, layer in relora_layers(model):
        layer.shared = None


def release(run: Run) -> None:
    """Give the memory of what the caller no longer holds back, and count its peak anew."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    if not run.dry:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def compiled_lightly(run: Run) -> Iterator[None]:
    """In a dry run, stop after the graphs: inductor's C++ takes a minute of a small machine, and tests of its own."""
    compile_ = torch.compile

    def without_inductor(*args: Any, **options: Any) -> Any:
        return compile_(*args, **{**options, "backend": "aot_eager"})

    with mock.patch.object(torch, "compile", without_inductor) if run.dry else nullcontext():
        yield


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Let random models be drawn on this device."""
    build = CausalLM.build_model

    def build_there(objective: CausalLM, manifest: Any) -> Any:
        with device:
            return build(objective, manifest)

    with mock.patch.object(CausalLM, "build_model", build_there):
        yield
