"""`relora export`: a checkpoint's model as a directory in transformers' format, or as a PEFT adapter."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args
from urllib.parse import unquote, urlsplit

import typer

from relora_train.checkpoints.fetch import fetch_bundle
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import Dtype, FileEntry, describe_files, hash_file
from relora_train.checkpoints.pins import record_export
from relora_train.checkpoints.run import CheckpointStore
from relora_train.cli.options import AsJson, CheckpointName, Store, echo_json, open_named, resolve
from relora_train.cli.output import say, tell
from relora_train.data.tokenizer_files import TOKENIZER_FILES
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    ConfigError,
    ReLoRAError,
    StorageError,
)
from relora_train.method.stages import stages_after
from relora_train.reports.model_card import is_by_others, write_card
from relora_train.reports.ranks.cycles import ADAPTER_FILES
from relora_train.runs.evaluations import profile_of
from relora_train.runs.hub import check_push, push
from relora_train.runs.retry import parent_of
from relora_train.runs.run import fetch_parent
from relora_train.settings.objectives import DEFAULT_OBJECTIVE
from relora_train.storage.durable import disk_error
from relora_train.storage.opening import open_store
from relora_train.text import counted, size
from relora_train.training.models.registry import auto_class_of

_HEADER_BYTES = 100_000_000  # safetensors itself reads no larger one
_TOKENIZER = re.compile("|".join(["tokenizer.*", "chat_template.*", *map(re.escape, TOKENIZER_FILES)]))
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_MODEL = re.compile(rf"{_WEIGHTS.pattern}|(generation_)?config\.json|{_TOKENIZER.pattern}")


def export(
    checkpoint: CheckpointName,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where it goes: new or empty. Not needed with --push.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in a directory that is not empty.")] = False,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write a PEFT adapter for the checkpoint that the stage began from.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; as the weights were that the run began from when absent."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="For the model card, e.g. apache-2.0.")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository of the hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that --push makes is public.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write the merged model of a checkpoint for transformers, with a model card, every byte verified."""
    refused = ["--force"] * force + [f"--dtype {dtype}"] * (dtype not in (None, "float32"))
    refused += ["--push"] * (push_to is not None)  # its base has a name on this machine alone
    if as_adapter and refused:
        given = " and ".join(refused)
        raise ConfigError(f"--as-adapter writes float32 to a new directory. Leave {given} out, or --as-adapter.")
    if dtype not in (None, *get_args(Dtype)):
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}.")
    if directory is None and push_to is None:
        raise ConfigError("There is no place to export to. Give a directory, --push OWNER/NAME, or both.")
    if push_to is not None:
        check_push(push_to)
    ref, parent, pushed = resolve(checkpoint, store), None, None
    what, unfinished = f"{ref.manifest.run_id}@{ref.manifest.stage}, step {ref.step}", unfinished_stages(ref)
    with tempfile.TemporaryDirectory(prefix="relora-export-") as scratch:
        made = directory or Path(scratch, "model")
        if as_adapter:
            written, parent = export_adapter(ref, made)
        else:
            written = export_model(ref, made, force=force, dtype=cast(Dtype | None, dtype), license_id=license_id)
        place, names = str(written.directory) if directory else str(push_to), [entry.path for entry in written.files]
        for kept in filter(None, (ref, parent)):
            try:
                if kept.prefix:
                    record_export(open_named(kept.store_uri), kept, place)
            except StorageError as error:  # a store that can only be read still exports
                tell(f"The export is not recorded, so a prune may remove its checkpoint: {error}")
        if push_to is not None:
            pushed = push(written.directory, names, push_to, message=what, public=public)
    if as_json:
        about = {"stage": ref.manifest.stage, "step": ref.step, "unfinished_stages": unfinished, "pushed": pushed}
        origin = {"directory": place if directory else None, "checkpoint_uri": ref.uri}
        echo_json({**origin, **about, "dtype": written.dtype, "files": names})
        return
    files = f"{counted(len(names), 'file')}, {size(sum(entry.size_bytes for entry in written.files))}"
    say(f"{what}: {files}, in {place}")
    if pushed:
        say(f"Pushed: {pushed}")
    if dtype is None and not as_adapter:
        why = "those were that the run began from" if ref.manifest.source_dtype else "the checkpoint holds them"
        hint = "" if written.dtype == "float32" else "; --dtype float32 rounds nothing"
        say(f"The weights are {written.dtype}, as {why}{hint}.")
    if unfinished:
        say(f"The run is not finished: its settings plan {', '.join(unfinished)} after this.")
    if as_adapter:
        base = parent.uri if parent else "the model.pretrained of its run"
        say(f'Load it with PeftModel.from_pretrained(model, "{place}"), model being {base}.')
    else:
        loader = auto_class_of(ref.manifest.fingerprint_settings.get("objective", DEFAULT_OBJECTIVE))
        say(f'Load it with {loader}.from_pretrained("{place}").')


@dataclass(frozen=True)
class ExportedModel:
    """An exported model."""

    directory: Path
    files: tuple[FileEntry, ...]
    dtype: Dtype = "float32"


def export_model(
    checkpoint: CheckpointRef,
    directory: Path,
    *,
    force: bool = False,
    dtype: Dtype | None = None,
    license_id: str | None = None,
) -> ExportedModel:
    """Write the merged model, its tokenizer and its card, every byte verified: `from_pretrained(directory)` works.

    The header of each file of weights names run, stage, step and fingerprint. dtype: what the weights are rounded to;
    if absent, that of the weights the run began from, or float32 where none is recorded. The directory appears complete
    or not at all. One that holds something already is refused, unless `force`: then its model is replaced and other
    files stay.
    """
    entries = tuple(entry for entry in checkpoint.manifest.files if _MODEL.fullmatch(entry.path))
    if not any(_WEIGHTS.fullmatch(entry.path) for entry in entries):
        raise CheckpointIncompleteError(f"{checkpoint.uri} holds no model.safetensors. Use another checkpoint.")
    directory = directory.expanduser().absolute()
    dtype = dtype or checkpoint.manifest.source_dtype or "float32"
    _refuse_what_is_there(directory, checkpoint, force=force)
    part = checkpoint.manifest.model_copy(update={"files": entries})
    with _replacing(directory, "model") as model:
        scratch = model.parent
        fetched = fetch_bundle(open_store(checkpoint.store_uri), checkpoint.prefix, part, scratch / "fetched")
        for entry in entries:
            copy = model / entry.path
            if fetched.is_relative_to(scratch):
                (fetched / entry.path).rename(copy)
                continue
            shutil.copyfile(fetched / entry.path, copy)  # the store's own file
            if hash_file(copy) != entry.sha256:
                raise CheckpointCorruptError(f"{entry.path} changed while it was copied to {copy}. Export once more.")
        _name_origin(checkpoint, model)
        if dtype != "float32":
            from relora_train.training.tensor_stream import round_model  # torch

            round_model(model, dtype)
        write_card(checkpoint, model, license_id=license_id)
        written = describe_files(model)
    return ExportedModel(directory, written, dtype)


@contextmanager
def _replacing(directory: Path, what: str) -> Iterator[Path]:
    """Yield an empty directory; at the end of the block it becomes `directory`, or replaces the model in it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            made = Path(scratch) / what
            made.mkdir()
            yield made
            if not directory.exists() or not any(directory.iterdir()):
                directory.unlink() if directory.is_symlink() else None
                made.chmod(0o755)
                made.replace(directory)
                return
            for old in directory.iterdir():
                if _WEIGHTS.fullmatch(old.name):
                    old.unlink()  # a shard of another model, left beside the new ones, would be loaded with them
            for path in made.iterdir():
                if not is_by_others(directory / path.name):
                    path.replace(directory / path.name)
    except OSError as error:
        raise disk_error(error, f"write the {what} to {directory}") from error


def unfinished_stages(checkpoint: CheckpointRef) -> list[str]:
    """Return the stages that a checkpoint's own settings plan after it and its run has not committed."""
    if not checkpoint.prefix:
        return []
    run = CheckpointStore(open_store(checkpoint.store_uri), checkpoint.manifest.run_id)
    made = {ref.manifest.stage for ref in run.history() if ref.step > checkpoint.step}
    try:
        following = stages_after(profile_of(checkpoint), checkpoint.manifest)
    except (ReLoRAError, ValueError):  # settings of another version: the model is there all the same
        return []
    return [stage.name for stage in following if stage.name not in made]


def _name_origin(checkpoint: CheckpointRef, model: Path) -> None:
    """Write into the header of each file of weights where they come from; a checkpoint's own names only its format."""
    manifest = checkpoint.manifest
    origin = {"run": manifest.run_id, "stage": manifest.stage, "step": str(manifest.step)}
    origin["fingerprint"] = manifest.fingerprint
    for path in model.glob("*.safetensors"):
        with path.open("rb") as source:
            size = int.from_bytes(source.read(8), "little")
            try:
                header = json.loads(source.read(min(size, _HEADER_BYTES)))
                header["__metadata__"] = {**header.get("__metadata__", {}), **origin}
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointCorruptError(
                    f"{path.name} of {checkpoint.uri} has no header of safetensors: {error}. Use another checkpoint."
                ) from None
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with path.with_suffix(".named").open("wb") as target:
                target.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(source, target, 1 << 22)
        path.with_suffix(".named").replace(path)


def export_adapter(checkpoint: CheckpointRef, directory: Path) -> tuple[ExportedModel, CheckpointRef | None]:
    """Write what a low-rank stage learned as a PEFT adapter on what it began from; that is returned too.

    It began from a checkpoint, or, where none is returned, from a local model.pretrained. The directory is new, and
    appears complete or not at all.
    """
    if not set(ADAPTER_FILES) <= {entry.path for entry in checkpoint.manifest.files}:
        raise ConfigError(
            f"{checkpoint.uri} ended the full-rank stage {checkpoint.manifest.stage}, which has no low-rank update. "
            "Name a checkpoint of a cycle or a LoRA, or export this one whole, without --as-adapter."
        )
    directory = directory.expanduser().absolute()
    _refuse_what_is_there(directory, checkpoint, force=False)
    parent = parent_of(checkpoint)
    if parent:
        base = fetch_parent(parent)
        name = str(base) if parent.store_uri.startswith("file:") else parent.uri
    else:
        pretrained = profile_of(checkpoint).model.pretrained
        base = Path(pretrained or "").expanduser()
        name = str(base)
        if pretrained is None or not base.is_dir():
            began = "random weights" if pretrained is None else f"{pretrained!r}, which is no directory of this machine"
            raise ConfigError(
                f"{checkpoint.uri} has no parent checkpoint: it began from {began}. An adapter needs a model it "
                "belongs on. Name a later checkpoint, or export this one whole, without --as-adapter."
            )
    files = fetch_parent(checkpoint)
    from relora_train.training.peft_export import write_adapter  # torch

    with _replacing(directory, "adapter") as made:
        write_adapter(files, base, made, base_name=name, checkpoint_name=checkpoint.uri)
        for entry in checkpoint.manifest.files:
            if _TOKENIZER.fullmatch(entry.path):
                shutil.copyfile(files / entry.path, made / entry.path)
        written = describe_files(made)
    return ExportedModel(directory, written), parent


def _refuse_what_is_there(directory: Path, checkpoint: CheckpointRef, *, force: bool) -> None:
    if checkpoint.store_uri.startswith("file:"):
        store = Path(unquote(urlsplit(checkpoint.store_uri).path)).resolve()
        if directory.resolve().is_relative_to(store):
            raise ConfigError(
                f"{directory} lies in the store {store}, which holds only what runs commit. Give a directory elsewhere."
            )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file. Give a directory that is new or empty.")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise ConfigError(
            f"{directory} is not empty, and nothing in it was changed. Give a directory that is new or empty, or "
            "--force to replace the model in it."
        )
    if force:
        try:
            pretrained = profile_of(checkpoint).model.pretrained
        except (ReLoRAError, ValueError):  # settings of another version
            pretrained = None
        if pretrained and Path(pretrained).expanduser().resolve() == directory.resolve():
            raise ConfigError(
                f"{directory} is the model that the run began from (model.pretrained), and the run needs it as it is. "
                "Give another directory."
            )
