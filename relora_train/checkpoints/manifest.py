"""Records that a store keeps, and manifests: the records of what a bundle holds.

A bundle is a checkpoint, a snapshot or a dataset. It exists when its manifest does.
"""

import hashlib
import json
import re
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from relora_train.checkpoints.example_format import ExampleFormat
from relora_train.checkpoints.layout import RUN_ID_PATTERN, dataset_prefix, join_key
from relora_train.errors import CheckpointCorruptError
from relora_train.settings.method import DropoutMask
from relora_train.storage.base import ObjectStore, find_bytes

MANIFEST_NAME = "manifest.json"
RECORD_FILES = ("metrics.jsonl", "profile.json")
"""Files of a checkpoint that hold its timings and its settings, not its result."""
_NAME = rf"^{RUN_ID_PATTERN}$"  # names of directories are made from what a manifest says
_ADVICE = "Use another checkpoint or delete this one."

Dtype = Literal["float32", "bfloat16", "float16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredRecord(_Frozen):
    """A record that a store keeps as one JSON object. A reader refuses unknown fields and versions."""

    def to_bytes(self) -> bytes:
        """Return readable JSON: the same bytes for the same record."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, *, uri: str, advice: str) -> Self:
        """Return the record. Raise CheckpointCorruptError, with what is wrong and the advice, if it is damaged."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            why = first["msg"].removeprefix("Value error, ")
            raise CheckpointCorruptError(
                f"{uri} is damaged or of another version: it is not a valid {cls.__name__}: {where}: {why}. {advice}"
            ) from None

    @classmethod
    def find(cls, store: ObjectStore, key: str, *, advice: str) -> tuple[Self, str] | None:
        """Return the record at a key and its etag, or None if there is none."""
        found = find_bytes(store, key)
        return found and (cls.parse(found[0], uri=f"{store.uri}/{key}", advice=advice), found[1])


class FileEntry(_Frozen):
    """One file of a bundle, named relative to its prefix."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def path_stays_inside_the_bundle(cls, value: str) -> str:
        parts = PurePosixPath(value).parts
        leaves = not parts or any(part.startswith((".", "/")) for part in parts)
        is_second_name = PurePosixPath(value).as_posix() != value  # 'a//b' and 'a/'
        if leaves or is_second_name or not re.fullmatch(r"[A-Za-z0-9._/-]+", value):
            raise ValueError(f"{value!r} could leave the bundle")
        return value


class ParentRef(_Frozen):
    """The checkpoint a stage started from."""

    uri: str
    fingerprint: str
    step: int


class Manifest(StoredRecord):
    """The common part of every bundle's manifest."""

    format_version: Literal[1] = 1
    kind: str
    files: tuple[FileEntry, ...]
    files_prefix: str = Field(default="", pattern=r"^(variant-[0-9a-f]{16})?$")
    """Empty if the files lie beside the manifest; else the variant directory below it, named by their content.
    commit_bundle sets it: see commit.py."""
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    attempt: str = Field(pattern=r"^[0-9A-Za-z]{1,64}$")
    """Random per attempt: tells a lost answer to our own write from a rival's write."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package versions that wrote the bundle."""

    @field_validator("files")
    @classmethod
    def each_file_is_listed_once(cls, value: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        paths = [entry.path.lower() for entry in value]  # lower: some disks cannot tell A from a
        if len(set(paths)) < len(paths):
            raise ValueError("a file is listed twice")
        return value

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    def key_of(self, entry: FileEntry, prefix: str) -> str:
        """Return the key of a file in a store, for the bundle at this prefix."""
        return join_key(prefix, self.files_prefix, entry.path)


class CheckpointManifest(Manifest):
    """Manifest of a merge checkpoint."""

    kind: Literal["checkpoint"] = "checkpoint"
    run_id: str = Field(pattern=_NAME)
    profile: str
    """Name of the profile, for people; profile.json holds the settings."""
    stage: str
    """'warm-start', 'cycle-3', 'full-2' or 'lora'."""
    step: int = Field(ge=0)
    cycle: int = Field(ge=0)
    """Merges done so far."""
    tokens_seen: int = Field(ge=0)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    fingerprint_settings: dict[str, Any]
    """The settings behind the fingerprint, so that a difference can be named."""
    variant_of: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The fingerprint of the stage that this checkpoint replaces, if any: it diverged and was trained at a lower
    learning rate, or was retried on purpose and came out otherwise."""
    parent: ParentRef | None
    dataset_id: str
    dataset_uri: str
    evaluation: dict[str, float] = Field(default_factory=dict)
    """The scores of the run's objective, and the same with the suffix _before for the stage's start."""
    merge_report: dict[str, Any] = Field(default_factory=dict)
    divergence: dict[str, Any] = Field(default_factory=dict)
    """For a stage that diverged first: attempts that failed, learning_rate, learning_rate_factor,
    profile_learning_rate, failures."""
    source_dtype: Dtype | None = None
    """The dtype of the weights of model.pretrained, if the line of stages began from one and they were asked."""
    dropout_mask: DropoutMask | None = None
    """The run's kind of mask (relora.dropout_mask). None: its low-rank stages, if any, drew from a stream."""
    stage_seconds: float = Field(default=0.0, ge=0)
    provenance: dict[str, str] = Field(default_factory=dict)
    """Ids of the orchestrator's runs; informative only."""


class SnapshotManifest(Manifest):
    """Manifest of a snapshot: the state inside a stage, useful until the stage's checkpoint is committed."""

    kind: Literal["snapshot"] = "snapshot"
    run_id: str = Field(pattern=_NAME)
    stage: str
    step: int = Field(ge=0)
    """Updates done."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The stage's: only a trainer of exactly this stage resumes from here."""
    parent: ParentRef | None = None
    """The checkpoint that holds the frozen weights: without it the snapshot is worth nothing."""


class ImageFormat(_Frozen):
    """The rows of an image dataset."""

    size: int = Field(ge=1)
    """Pixels of a side."""
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    largest_value: int = Field(ge=1)
    """The value of a pixel that is scaled to 1."""
    mean: tuple[float, ...]
    """The mean of each channel over the training part, values scaled."""
    deviation: tuple[float, ...]
    """Standard deviation, likewise."""

    @property
    def row_bytes(self) -> int:
        """The bytes of an image and its class."""
        return self.channels * self.size * self.size + 1


class MixedDataset(_Frozen):
    """One source of a mixture: its own dataset in the same store."""

    name: str = Field(pattern=_NAME)
    """Name of the source, and of its dataset."""
    weight: str = Field(pattern=r"^[0-9]+(/[0-9]+)?$")
    """Its share of the tokens, as a fraction of one."""
    dataset_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    train_tokens: int


class DatasetManifest(Manifest):
    """Manifest of a dataset: token shards of text, or images. Counts of tokens are then counts of images.

    A mixture has only a tokenizer of its own, and names the datasets that hold its shards. Counts are sums over them.
    """

    kind: Literal["dataset"] = "dataset"
    name: str = Field(pattern=_NAME)
    dataset_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    inputs: dict[str, Any]
    """Everything hashed into dataset_id."""
    token_dtype: Literal["uint16", "uint32", "uint8"]
    vocab_size: int
    """Entries of the tokenizer, or classes."""
    eos_id: int
    """The token after a document; −1 of images."""
    train_tokens: int
    train_documents: int
    train_bytes: int
    """UTF-8 bytes of the text behind train_tokens, or pixels of all channels."""
    val_tokens: int
    val_documents: int
    val_bytes: int
    images: ImageFormat | None = None
    """Only for a dataset of images."""
    mixture: tuple[MixedDataset, ...] = ()
    """Only for a mixture."""
    examples: ExampleFormat | None = Field(default=None, exclude_if=lambda value: value is None)
    """Only for instructions and labelled texts; of a mixture, the format of the first such source."""
    statistics: dict[str, Any] = Field(default_factory=dict)
    """Informative: duplicates, what was left out, tokenization speed; how often each class is there."""

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The tokens before a document; none for images, for most tokenizers, and before version 0.2."""
        return tuple(self.inputs.get("bos_ids", ()))

    @property
    def unit(self) -> str:
        """The unit that is counted: 'tokens' or 'images'."""
        return "images" if self.images else "tokens"


M = TypeVar("M", bound=Manifest)


def parse_manifest(kind: type[M], data: bytes, *, uri: str) -> M:
    """Return a manifest. Raise CheckpointCorruptError if it is damaged or of a version that is not known here."""
    return kind.parse(data, uri=uri, advice=_ADVICE)


def read_manifest(store: ObjectStore, prefix: str, kind: type[M]) -> M | None:
    """Return the manifest of the bundle at a prefix, or None if no bundle is committed there."""
    found = kind.find(store, join_key(prefix, MANIFEST_NAME), advice=_ADVICE)
    return found and found[0]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, reading it in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_digest(manifest: Manifest, *, except_for: Collection[str] = ()) -> str:
    """Return the SHA-256 over names, sizes and digests of a bundle's files: equal exactly when all bytes are equal."""
    files = [entry for entry in manifest.files if entry.path not in except_for]
    listing = sorted((entry.path, entry.size_bytes, entry.sha256) for entry in files)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def result_digest(manifest: Manifest) -> str:
    """Return the SHA-256 over the files that later work can depend on: equal exactly when the results are.

    It leaves out the records of how the checkpoint was made: times differ between attempts that gave the same bits.
    """
    return content_digest(manifest, except_for=RECORD_FILES)


def describe_files(directory: Path) -> tuple[FileEntry, ...]:
    """Return every file below a directory except its manifest, sorted by path, with sizes and digests."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return tuple(
        FileEntry(path=p.relative_to(directory).as_posix(), size_bytes=p.stat().st_size, sha256=hash_file(p))
        for p in paths
    )


def find_dataset(store: ObjectStore, name: str, dataset_id: str) -> DatasetManifest | None:
    """Return the committed dataset of exactly this id, or None."""
    prefix = dataset_prefix(name, dataset_id)
    manifest = read_manifest(store, prefix, DatasetManifest)
    if manifest is not None and manifest.dataset_id != dataset_id:
        raise CheckpointCorruptError(
            f"{store.uri}/{prefix} holds dataset {manifest.dataset_id}, not {dataset_id}: it was copied or renamed. "
            "Move it back or delete it."
        )
    return manifest
