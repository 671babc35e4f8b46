"""Images and their classes -> an image dataset: rows of bytes, split and normalised by a stated rule.

There are two sources. scikit-learn's digits are 1,797 of 8 x 8, values 0 to 16, read from the file in its package. They
are held out by a hash of the pixels, so that equal images stay on one side. Files in MNIST's IDX format have test
files, which are what is held out. The training part's mean and deviation of each channel, of values scaled to [0, 1],
go into the manifest.
"""

import gzip
import hashlib
import importlib.util
import json
import secrets
import struct
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora_train.checkpoints.manifest import DatasetManifest, ImageFormat, describe_files
from relora_train.data.dataset_changes import source_record
from relora_train.data.source_files import SourceFile, find_files
from relora_train.data.sources import check_content, identify
from relora_train.data.splitting import Split, split_of
from relora_train.errors import CorpusTooSmallError, SourceUnreadableError
from relora_train.settings.data import DataConfig
from relora_train.settings.keys import settings_digest
from relora_train.storage.durable import write_durably

IMAGE_SOURCES = ("digits", "idx")
"""Those of data.source that hold images."""

IMAGES_FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""

PREPROCESSOR_FILE = "preprocessor_config.json"
_HASHED_SPLIT = "blake2b-64 of the pixels below data.validation_fraction is held out"
_PUBLISHED_SPLIT = "as published: the t10k files are held out"
_IDX_FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class LabelledImages:
    """Images (number, channels, size, size) of bytes up to largest_value, and their classes (number,)."""

    pixels: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    largest_value: int

    def taken(self, which: NDArray[Any] | slice) -> "LabelledImages":
        return LabelledImages(self.pixels[which], self.classes[which], self.largest_value)


@dataclass(frozen=True)
class ImageInputs:
    """A source of images, found and hashed, with nothing done yet."""

    data: DataConfig
    files: tuple[SourceFile, ...]

    @property
    def dataset_id(self) -> str:
        return settings_digest(self.hashed())

    def hashed(self) -> dict[str, Any]:
        """Return all that can change a byte of the dataset, and nothing else."""
        published = self.data.source == "idx"
        split = {"rule": _PUBLISHED_SPLIT if published else _HASHED_SPLIT}
        return {
            "images_format": IMAGES_FORMAT,
            "source": identify(self.data.source, self.files),
            "max_documents": self.data.max_documents,
            "split": split if published else {**split, "validation_fraction": self.data.validation_fraction},
        }


def resolve_images(data: DataConfig) -> ImageInputs:
    """Find and hash the source's files. Raises SourceUnreadableError."""
    files = tuple(_find_idx(data)) if data.source == "idx" else (_find_digits(),)
    check_content(data, files)
    return ImageInputs(data, files)


def _find_digits() -> SourceFile:
    package = importlib.util.find_spec("sklearn")
    for place in (package.submodule_search_locations or ()) if package else ():
        path = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return SourceFile.of(path, str(path))
    raise SourceUnreadableError(
        "Source 'digits' is a file of the package scikit-learn, which is not installed here. Install "
        "relora-train[images], or use source 'idx' with files of your own."
    )


def write_images(found: ImageInputs, directory: Path) -> DatasetManifest:
    """Write the shards of both parts and what transformers needs to treat images alike; return the manifest.

    Raises SourceUnreadableError, CorpusTooSmallError.
    """
    for file in found.files:
        file.check_unchanged()
    parts = _read_digits(found) if found.data.source == "digits" else _read_idx(found)
    if any(len(part.pixels) == 0 for part in parts.values()):
        sizes = ", ".join(f"{len(part.pixels)} in {split}" for split, part in parts.items())
        raise CorpusTooSmallError(
            f"A part of dataset {found.data.name!r} holds no image ({sizes}). Change data.validation_fraction or "
            "data.max_documents."
        )
    train = parts["train"]
    scaled = train.pixels.reshape(*train.pixels.shape[:2], -1) / train.largest_value
    images = ImageFormat(
        size=train.pixels.shape[2],
        channels=train.pixels.shape[1],
        classes=int(max(part.classes.max() for part in parts.values())) + 1,
        largest_value=train.largest_value,
        mean=tuple(np.round(scaled.mean(axis=(0, 2)), 6).tolist()),
        deviation=tuple(np.round(scaled.std(axis=(0, 2)), 6).tolist()),
    )
    for split, part in parts.items():
        (directory / split).mkdir(parents=True, exist_ok=True)
        rows = np.column_stack([part.pixels.reshape(len(part.pixels), -1), part.classes])
        write_durably(directory / split / "shard-00000.bin", rows.tobytes())
    processor = {  # for transformers' image processors: the same scaling, for values up to largest_value
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": None,
        "do_resize": False,
        "size": {"height": images.size, "width": images.size},
        "do_rescale": True,
        "rescale_factor": 1 / images.largest_value,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.deviation),
    }
    write_durably(directory / PREPROCESSOR_FILE, (json.dumps(processor, indent=1) + "\n").encode())
    return DatasetManifest(
        files=describe_files(directory),
        attempt=secrets.token_hex(8),
        versions={"numpy": version("numpy")},
        name=found.data.name,
        dataset_id=found.dataset_id,
        inputs=found.hashed(),
        token_dtype="uint8",  # noqa: S106  # a number format, no password
        vocab_size=images.classes,
        eos_id=-1,
        **{f"{split}_{unit}": len(parts[split].pixels) for split in parts for unit in ("tokens", "documents")},
        **{f"{split}_bytes": part.pixels.size for split, part in parts.items()},
        images=images,
        statistics={
            f"{split}_images_of_class": np.bincount(part.classes, minlength=images.classes).tolist()
            for split, part in parts.items()
        }
        | source_record(found.data.source, found.files),
    )


def _read_digits(found: ImageInputs) -> dict[Split, LabelledImages]:
    """64 values of 0 to 16 a line, and the digit."""
    lines = _content(found.files[0]).decode("ascii").split()
    table = np.array([line.split(",") for line in lines], dtype=np.float64).astype(np.uint8)
    every = LabelledImages(table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1], largest_value=16)
    every = every.taken(slice(found.data.max_documents))
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in every.pixels)
    sides = [split_of(int.from_bytes(digest, "big"), found.data.validation_fraction) for digest in digests]
    held_out = np.array(sides) == "val"
    return {"train": every.taken(~held_out), "val": every.taken(held_out)}


def _find_idx(data: DataConfig) -> list[SourceFile]:
    """The four files, in a fixed order."""
    try:
        found = find_files(data.paths, "idx")
    except SourceUnreadableError as error:
        raise SourceUnreadableError(f"{error} Debian's dataset-fashion-mnist is a package of such files.") from None
    files: dict[str, SourceFile] = {}
    for file in found:  # in one folder a .gz goes before the plain file beside it
        other = files.setdefault(_stem(file), file)
        if other.name.rpartition("/")[0] != file.name.rpartition("/")[0]:
            raise SourceUnreadableError(
                f"data.paths names both {other.name} and {file.name}, and source 'idx' takes one file of each name. "
                "Name the folder that is meant."
            )
        files[_stem(file)] = file
    wanted = [name for names in _IDX_FILES.values() for name in names]
    if missing := [name for name in wanted if name not in files]:
        raise SourceUnreadableError(
            f"{', '.join(data.paths)}: of the four IDX files of source 'idx' there is no {' and no '.join(missing)} "
            "(plain or .gz). Put them there or correct data.paths."
        )
    return [files[name] for name in wanted]


def _stem(file: SourceFile) -> str:
    return file.name.rpartition("/")[2].removesuffix(".gz")


def _read_idx(found: ImageInputs) -> dict[Split, LabelledImages]:
    by_name = {_stem(file): file for file in found.files}
    parts: dict[Split, LabelledImages] = {}
    for split, (images, labels) in _IDX_FILES.items():
        pixels, classes = _idx_array(by_name[images], dimensions=3), _idx_array(by_name[labels], dimensions=1)
        if len(pixels) != len(classes) or pixels.shape[1] != pixels.shape[2]:
            raise SourceUnreadableError(
                f"{by_name[images].name} holds images of shape {pixels.shape}, {by_name[labels].name} {len(classes)} "
                "classes: as many classes as images are needed, and square images."
            )
        parts[split] = LabelledImages(pixels[:, None], classes, largest_value=255)
    return {**parts, "train": parts["train"].taken(slice(found.data.max_documents))}


def _idx_array(file: SourceFile, *, dimensions: int) -> NDArray[np.uint8]:
    """Magic number 0x08 (bytes) and the number of dimensions, their sizes as big-endian int32, then the bytes."""
    content = _content(file)
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise SourceUnreadableError(
            f"{file.name} does not begin as an IDX file of bytes in {dimensions} dimensions. Fetch it again."
        )
    shape = struct.unpack(f">{dimensions}i", content[4:head])
    values = np.frombuffer(content, dtype=np.uint8, offset=head)
    if values.size != np.prod(shape):
        raise SourceUnreadableError(f"{file.name} is cut short or damaged: {values.size} bytes for {shape}.")
    return values.reshape(shape)


def _content(file: SourceFile) -> bytes:
    try:
        raw = file.path.read_bytes()
        return gzip.decompress(raw) if file.name.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise SourceUnreadableError(
            f"{file.name} cannot be read: {error}. Repair it or let this user read it."
        ) from error
