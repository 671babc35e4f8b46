"""Images become a dataset whose every byte follows from the source, and batches in which every image has its turn."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import tiny_digits, write_digits, write_idx

from relora_train.checkpoints.manifest import hash_file
from relora_train.data.dataset import ImageDataset
from relora_train.data.prepare import describe_dataset, prepare_dataset
from relora_train.errors import CorpusTooSmallError, DataError, SourceUnreadableError
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.training.models.image_classification import ClassLoss
from relora_train.training.models.registry import objective_of


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def all_rows(dataset: ImageDataset) -> np.ndarray:
    return dataset.read_blocks(0, dataset.blocks)


def test_the_digits_are_all_there_once_and_an_image_lies_on_one_side(digits: Path):
    train, val = (all_rows(ImageDataset(digits, split)) for split in ("train", "val"))
    assert len(train) + len(val) == 1797
    assert 0.2 < len(val) / 1797 < 0.3
    assert not {row[:-1].tobytes() for row in train} & {row[:-1].tobytes() for row in val}
    assert set(train[:, -1]) == set(val[:, -1]) == set(range(10))
    assert train[:, :-1].max() == 16


def test_pixels_reach_the_model_with_mean_0_and_deviation_1_over_the_training_part(digits: Path):
    data = ImageDataset(digits, "train")
    pixels = ClassLoss(torch.nn.Identity(), data.format).pixels(torch.from_numpy(all_rows(data)))
    assert pixels.shape == (data.blocks, 1, 8, 8)
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-4)  # the statistics are stored to six digits
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)


def test_a_checkpoint_s_preprocessor_scales_as_training_does(digits: Path):
    stated = json.loads((digits / "preprocessor_config.json").read_text())
    data = ImageDataset(digits, "val")
    rows = torch.from_numpy(data.read_blocks(0, 3))
    ours = ClassLoss(torch.nn.Identity(), data.format).pixels(rows)
    scaled = rows[:, :-1].reshape(3, 1, 8, 8) * stated["rescale_factor"]
    torch.testing.assert_close(ours, ((scaled - stated["image_mean"][0]) / stated["image_std"][0]).float())


def test_the_same_inputs_give_the_same_bytes_and_others_another_dataset(digits: Path, tmp_path: Path):
    again = write_digits(tmp_path)
    for name in ("train/shard-00000.bin", "val/shard-00000.bin", "preprocessor_config.json"):
        assert hash_file(again / name) == hash_file(digits / name)
    data = tiny_digits().data

    def id_with(**changes: object) -> str:
        return describe_dataset(data.model_copy(update=changes), TokenizerConfig())[0]

    assert id_with(name="other", workers=3) == id_with()
    assert len({id_with(), id_with(validation_fraction=0.3), id_with(max_documents=500)}) == 3


def idx_directory(directory: Path, *, ending: str = "", train: int = 40, test: int = 12) -> tuple[Path, dict]:
    directory.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    made = {}
    for prefix, number in (("train", train), ("t10k", test)):
        images = draw.integers(0, 256, (number, 6, 6), dtype=np.uint8)
        labels = (np.arange(number) % 4).astype(np.uint8)
        write_idx(directory / f"{prefix}-images-idx3-ubyte{ending}", images)
        write_idx(directory / f"{prefix}-labels-idx1-ubyte{ending}", labels)
        made[prefix] = images, labels
    return directory, made


def idx_data(directory: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"name": "own", "source": "idx", "paths": [str(directory)], **settings})


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_read_as_published_and_their_test_files_are_held_out(tmp_path: Path, ending: str):
    directory, made = idx_directory(tmp_path / "in", ending=ending)
    prepared = prepare_dataset(idx_data(directory, max_documents=25), TokenizerConfig(), tmp_path / "out")
    (prepared.directory / "manifest.json").write_bytes(prepared.manifest.to_bytes())
    for split, prefix, number in (("train", "train", 25), ("val", "t10k", 12)):
        images, labels = made[prefix]
        rows = all_rows(ImageDataset(prepared.directory, split))
        assert np.array_equal(rows[:, :-1].reshape(-1, 6, 6), images[:number])
        assert np.array_equal(rows[:, -1], labels[:number])
    assert prepared.manifest.images is not None
    assert (prepared.manifest.images.size, prepared.manifest.images.classes) == (6, 4)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "there is no train-images-idx3-ubyte"),
        (lambda file: file.write_bytes(b"\x1f\x8b" + file.read_bytes()[2:]), "does not begin as an IDX file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is cut short or damaged"),
        (lambda file: write_idx(file, np.zeros((39, 6, 6), np.uint8)), "as many classes as images"),
    ],
)
def test_idx_files_that_cannot_be_used_are_one_error(tmp_path: Path, harm, said: str):
    directory, _ = idx_directory(tmp_path / "in")
    harm(directory / "train-images-idx3-ubyte")
    with pytest.raises(SourceUnreadableError, match=said):
        prepare_dataset(idx_data(directory), TokenizerConfig(), tmp_path / "out")


def test_fashion_mnist_that_is_not_there_is_one_error_that_says_where_it_is_looked_for(tmp_path: Path):
    with pytest.raises(SourceUnreadableError, match=f"{tmp_path}/none names no file, directory") as caught:
        describe_dataset(idx_data(tmp_path / "none"), TokenizerConfig())
    assert "Correct data.paths" in str(caught.value) and "dataset-fashion-mnist" in str(caught.value)


def test_without_scikit_learn_the_digits_are_one_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceUnreadableError, match=r"Install relora-train\[images\]"):
        describe_dataset(tiny_digits().data, TokenizerConfig())


def test_a_part_without_images_is_refused(tmp_path: Path):
    data = tiny_digits(data={"max_documents": 1}).data
    with pytest.raises(CorpusTooSmallError, match="A part of dataset 'digits' holds no image"):
        prepare_dataset(data, TokenizerConfig(), tmp_path)


def test_a_batch_larger_than_the_epoch_is_refused(digits: Path):
    with pytest.raises(CorpusTooSmallError, match="images; 5,000 are needed"):
        ImageDataset(digits, "train").require(5000)


def test_a_profile_for_other_images_than_the_dataset_s_is_refused(digits: Path):
    profile = tiny_digits(images={"classes": 7})
    with pytest.raises(DataError, match=r"10 classes; the profile's \[images\] says 8 x 8, 1 and 7"):
        objective_of(profile).open_data(digits, "train")


def test_idx_files_of_two_folders_are_not_mixed(tmp_path: Path):
    (here, _), (there, _) = idx_directory(tmp_path / "here"), idx_directory(tmp_path / "there", ending=".gz")
    with pytest.raises(SourceUnreadableError, match="one file of each name") as refused:
        describe_dataset(idx_data(here, paths=[str(here), str(there)]), TokenizerConfig())
    for folder, ending in ((here, ""), (there, ".gz")):
        assert f"{folder}/t10k-images-idx3-ubyte{ending}" in str(refused.value)
    (tmp_path / "link").symlink_to(here)
    once = describe_dataset(idx_data(here), TokenizerConfig())
    assert describe_dataset(idx_data(here, paths=[str(here), str(tmp_path / "link")]), TokenizerConfig()) == once
