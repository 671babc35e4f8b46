"""Write what a stage produced as a committed checkpoint directory, and read it back before it counts."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from relora_train.checkpoints.manifest import CheckpointManifest, describe_files
from relora_train.data.tokenizer_files import TOKENIZER_FILES
from relora_train.distributed import full_tensor, gather, local_shard
from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.method.experts import ReLoRAExperts, expert_layers
from relora_train.method.frozen import KINDS
from relora_train.method.layer import ReLoRALinear, relora_layers
from relora_train.training.evaluate import evaluation_key
from relora_train.training.files import (
    ADAPTER_DIRECTORY,
    MAX_SHARD_BYTES,
    METRICS_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    PROFILE_FILE,
    STATE_FILE,
    index_and_values,
    is_written_sparse,
    new_attempt,
    package_versions,
    read_tensor,
    save_model,
    save_optimizer_state,
    sparse_shapes,
    stored_shapes,
    write_manifest,
    write_metrics,
)
from relora_train.training.models.base import Evaluation
from relora_train.training.models.model import file_name
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.peft_export import save_adapter
from relora_train.training.step import StageTraining
from relora_train.training.tensor_stream import Layout, TensorStream

_COMPANION_FILES = (*TOKENIZER_FILES, "preprocessor_config.json")
"""Files of a dataset that whoever uses the model needs beside the weights: a tokenizer, or how pixels are scaled."""

Adapter = tuple[dict[str, Tensor], dict[str, Any]]
"""The A and B that the stage's merge consumed, and their PEFT configuration."""


def commit_stage(
    training: StageTraining,
    *,
    metrics: list[dict[str, Any]],
    adapter: Adapter | None,
    merge_report: dict[str, Any],
    before: Evaluation,
    after: Evaluation,
    stage_seconds: float,
) -> None:
    """Write every file of the checkpoint, the manifest last. Leftovers of a failed attempt are removed.

    The first rank writes. The others of a sharded training call this too, and lend their rows.
    Raises CheckpointCorruptError where the files do not hold what was trained.
    """
    request, stage, profile = training.request, training.stage, training.profile
    if not training.ranks.is_first:
        save_sharded(training, None)
        check_written(training, None)
        return
    directory = request.output_directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if training.ranks.sharded:
        save_sharded(training, directory)
    else:
        save_model(training.model, directory, weights=merged_weights(training))
        # The moments of a warm start and of a LoRA end with them: the next stage trains other parameters.
        state = optimizer_state_by_name(training.optimizer, training.model) if stage.keeps_optimizer else {}
        save_optimizer_state(state, directory / OPTIMIZER_FILE)
    check_written(training, directory)
    for name in _COMPANION_FILES:
        if (request.dataset_directory / name).is_file():
            shutil.copyfile(request.dataset_directory / name, directory / name)
    if adapter is not None:
        tensors, config = adapter
        save_adapter(tensors, config, directory / ADAPTER_DIRECTORY)
    end = training.start.model_copy(
        update={
            "step": stage.end_step,
            "cycle": stage.cycle,
            "stage_kind": stage.kind,
            "tokens_seen": training.tokens_seen(stage.end_step),
            "samples_seen": training.samples_seen(stage.end_step),
            "evaluation": after.model_dump(),
            "evaluation_key": evaluation_key(request),
            "matmul_precision": training.matmul,
        }
    )
    (directory / STATE_FILE).write_text(end.model_dump_json(indent=1) + "\n")
    (directory / PROFILE_FILE).write_text(profile.model_dump_json(indent=1) + "\n")
    write_metrics(metrics, directory / METRICS_FILE)
    evaluation = after.model_dump() | {f"{key}_before": value for key, value in before.model_dump().items()}
    manifest = CheckpointManifest(
        files=describe_files(directory),
        attempt=new_attempt(),
        versions=package_versions(),
        run_id=request.run_id,
        profile=profile.name,
        stage=stage.name,
        step=stage.end_step,
        cycle=stage.cycle,
        tokens_seen=end.tokens_seen,
        fingerprint=request.fingerprint,
        fingerprint_settings=request.fingerprint_settings,
        variant_of=request.variant_of,
        divergence=request.divergence,
        parent=request.parent,
        dataset_id=request.dataset_id,
        dataset_uri=request.dataset_uri,
        evaluation=evaluation,
        merge_report=merge_report,
        source_dtype=training.source_dtype,
        dropout_mask=None if profile.method == "full" else request.dropout_mask,
        stage_seconds=stage_seconds,
        provenance=request.provenance,
    )
    write_manifest(manifest, directory)


def merged_weights(training: StageTraining) -> dict[str, Tensor]:
    """Return the model's state under its Hugging Face names: A and B left out, exact weights for rounded ones."""
    masters: Mapping[str, Tensor] = training.masters or {}
    weights: dict[str, Tensor] = {}
    exact: dict[int, Tensor] = {}  # tied tensors stay tied: only so are they written once
    for name, tensor in training.model.state_dict().items():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            continue
        if name in masters:
            weights[name] = exact.setdefault(tensor.data_ptr(), masters[name])
        elif tensor.dtype == torch.bfloat16:
            weights[name] = exact.setdefault(tensor.data_ptr(), tensor.float())
        else:
            weights[name] = tensor.detach()
    return weights


def save_sharded(training: StageTraining, directory: Path | None) -> None:
    """Write model and optimizer as for a whole model, so that any number of ranks goes on from them, sharded or not.

    Every rank gathers one tensor at a time. Those without a directory lend their rows, and the first writes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    parameters = dict(training.model.named_parameters())
    kept = [name for name in parameters if name.rpartition(".")[2] not in ("lora_A", "lora_B")]
    names = dict(sorted((file_name(training.model, name), name) for name in kept))  # the model's by the files'
    empty = {file: torch.empty(parameters[name].shape, device="meta") for file, name in names.items()}
    parts = split_torch_state_dict_into_shards(
        empty, filename_pattern=MODEL_FILE.replace(".", "{suffix}."), max_shard_size=MAX_SHARD_BYTES
    )
    if directory is not None:
        cast(Any, training.model).save_pretrained(directory, state_dict={})  # configuration and no weights
        (directory / MODEL_FILE).unlink(missing_ok=True)
        if parts.is_sharded:
            index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
            (directory / f"{MODEL_FILE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def exact(name: str) -> Tensor:
        if training.masters is not None and name in training.masters:
            return gather(training.masters[name], parameters[name])
        return full_tensor(parameters[name])

    streams = {
        file: TensorStream(
            {saved: (torch.float32, tuple(empty[saved].shape)) for saved in held},
            (exact(names[saved]) for saved in held),
            {"format": "pt"},
        )
        for file, held in parts.filename_to_tensors.items()
    }
    handed_on = training.stage.keeps_optimizer
    streams[OPTIMIZER_FILE] = (
        _optimizer_stream(training) if handed_on else TensorStream({}, iter(()), sparse_shapes({}))
    )
    for file, stream in streams.items():
        if directory is None:
            stream.finish()
        else:
            stream.write(directory / file)


def _optimizer_stream(training: StageTraining) -> TensorStream:
    """Return Adam's state in the form of save_optimizer_state; entries are counted, then gathered and encoded."""
    state = optimizer_state_by_name(training.optimizer, training.model)
    tensors = {f"{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=training.ranks.device)
    for i, value in enumerate(tensors.values()):
        own = local_shard(value)
        if own is not value or training.ranks.is_first:  # a tensor that every rank holds (Adam's step) counts once
            counts[i] = own.count_nonzero()
    training.ranks.sum(counts)
    layout: Layout = {}
    shapes: dict[str, list[int]] = {}
    for (name, value), count in zip(tensors.items(), counts.tolist(), strict=True):
        if is_written_sparse(value.shape, count):
            layout[f"{name}.idx"], layout[f"{name}.val"] = (torch.int32, (count,)), (value.dtype, (count,))
            shapes[name] = list(value.shape)
        else:
            layout[name] = (value.dtype, tuple(value.shape))

    def encoded() -> Iterator[Tensor]:
        for name, value in tensors.items():
            full = full_tensor(value).cpu()
            if name in shapes:
                yield from index_and_values(full)
            else:
                yield full

    return TensorStream(layout, encoded(), sparse_shapes(shapes))


def check_written(training: StageTraining, directory: Path | None) -> None:
    """Raise CheckpointCorruptError unless whoever loads the directory gets the very model that was trained.

    All ranks of a sharded training call together; those without a directory lend their rows. Only where transformers
    writes tensors in another form than it holds (experts one by one, say) is the directory loaded as a second model.
    """
    model = training.model
    masters: Mapping[str, Tensor] = training.masters or {}
    # Each tied tensor of a sharded model is gathered once; in a whole model both names are looked at.
    tensors = dict(model.named_parameters()) if training.ranks.sharded else model.state_dict()
    held = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in ("lora_A", "lora_B")}
    loaded: dict[str, Tensor] = {}
    try:
        files = {name: file_name(model, name) for name in held}
    except ModelError:
        files, loaded = {name: name for name in held}, training.objective.load_model(cast(Path, directory)).state_dict()
    if directory is not None and not loaded:
        files = _stored_names(directory, files, training.objective.load_skeleton(directory))
    layers: dict[str, ReLoRALinear | ReLoRAExperts] = {f"{name}.weight": layer for name, layer in relora_layers(model)}
    layers |= {name: layer for name, layer, _ in expert_layers(model)}
    for name, tensor in held.items():
        trained = full_tensor(tensor)
        exact = gather(masters[name], tensor) if name in masters else trained
        if directory is None:
            continue
        found = loaded[name] if loaded else read_tensor(directory, files[name])
        written = exact.float() if exact.is_floating_point() else exact
        rounded = found is None or exact is trained or _same(_as_held(found, trained, layers.get(name)), trained)
        if found is None or not (rounded and _same(found, written)):
            raise _unequal(directory, f"{name} was not read back as it was trained")


def _as_held(exact: Tensor, held: Tensor, layer: ReLoRALinear | ReLoRAExperts | None) -> Tensor:
    """Return the exact weight rounded to what a device holds."""
    if layer is not None and held.dtype in KINDS:
        return layer.rounded(exact.to(held.device), KINDS[held.dtype])[0]
    return exact.to(held.dtype)


def _stored_names(directory: Path, files: dict[str, str], skeleton: nn.Module) -> dict[str, str]:
    """Return the tensor in the files that the loader takes for each name: of tied ones, any that is there."""
    stored = stored_shapes(directory)
    by_id: dict[int, list[str]] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), []).append(files.get(name, name))
    tied = {file: [other for other in group if other in stored] for group in by_id.values() for file in group}
    taken = {name: file if file in stored else next(iter(tied.get(file, ())), "") for name, file in files.items()}
    if missing := [name for name, file in taken.items() if not file]:
        raise _unequal(directory, f"{missing[0]} was not written")
    if extra := sorted({*stored} - {*taken.values()}):
        raise _unequal(directory, f"{extra[0]} was written and is no part of the model")
    return taken


def _same(found: Tensor, expected: Tensor) -> bool:
    """Return True if they are the same bit for bit, so also where a value is no number."""
    expected = expected.detach().cpu().contiguous()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bits = torch.int32 if found.element_size() == 4 else torch.uint8
    return torch.equal(found.contiguous().view(-1).view(bits), expected.view(-1).view(bits))


def _unequal(directory: Path, what: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{what} in {directory}: nothing of this stage was committed. Either the disk is damaged there, or "
        "transformers writes this model in another form than it loads. Check the disk and run the same command again; "
        "if it comes again, please report it with the model's config.json."
    )
