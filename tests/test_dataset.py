"""Batches are a pure function of (dataset, seed, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_train.checkpoints.manifest import MANIFEST_NAME, DatasetManifest, describe_files
from relora_train.data.dataset import TokenDataset, map_shards, read_dataset_manifest, sample_order
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError, CorpusTooSmallError

LENGTH = 8
SHARD_TOKENS = (50, 8, 9, 131)  # blocks of 8 + 1 tokens: 6, 0, 1, 16
BLOCKS = 23
GOLDEN_ORDER = [3, 5, 4, 7, 8, 0, 9, 2, 1, 6]


def write_dataset(directory, shard_tokens=SHARD_TOKENS, dtype="uint16"):
    """A dataset whose token values count upwards, so that a block shows where it came from."""
    first = 0
    for split in ("train", "val"):
        (directory / split).mkdir(parents=True)
    for index, tokens in enumerate(shard_tokens):
        values = np.arange(first, first + tokens, dtype=dtype)
        values.tofile(directory / "train" / f"shard-{index:05d}.bin")
        values[: tokens // 2].tofile(directory / "val" / f"shard-{index:05d}.bin")
        first += tokens
    manifest = DatasetManifest(
        files=describe_files(directory), attempt="1", name="counting", dataset_id="0" * 64, inputs={},
        token_dtype=dtype, vocab_size=100_000, eos_id=0, train_tokens=first, train_documents=1, train_bytes=3 * first,
        val_tokens=first // 2, val_documents=1, val_bytes=first,
    )  # fmt: skip
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def dataset(directory):
    return TokenDataset(directory, "train", sequence_length=LENGTH, seed=7)


def test_a_block_is_its_inputs_and_the_token_after_them(dataset):
    blocks = dataset.read_blocks(0, dataset.blocks)
    assert blocks.shape == (BLOCKS, LENGTH + 1)
    assert blocks.dtype == np.int64
    assert blocks[0].tolist() == list(range(9))
    assert blocks[6].tolist() == list(range(58, 67))  # the second shard holds 8 tokens, too few
    assert (np.diff(blocks) == 1).all()  # never across two shards


def test_every_token_is_predicted_at_most_once_and_all_but_the_rests_are(dataset):
    predicted = dataset.read_blocks(0, dataset.blocks)[:, 1:].ravel()
    assert len(set(predicted.tolist())) == len(predicted) == BLOCKS * LENGTH


@settings(max_examples=30, deadline=None)
@given(of=st.integers(1, BLOCKS), batch=st.integers(1, BLOCKS))
def test_a_spread_sample_holds_no_block_twice_whatever_the_batch(dataset, of, batch):
    parts = [dataset.read_spread(start, min(batch, of - start), of=of) for start in range(0, of, batch)]
    firsts = np.concatenate(parts)[:, 0].tolist()
    assert len(set(firsts)) == of
    assert firsts == sorted(firsts)
    everything = dataset.read_blocks(0, dataset.blocks)
    assert np.array_equal(np.concatenate(parts), everything) or of < BLOCKS


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000), blocks=st.integers(1, 500))
def test_an_epoch_holds_every_block_exactly_once(seed, epoch, blocks):
    assert sorted(sample_order(seed, epoch, blocks).tolist()) == list(range(blocks))


def test_the_order_is_the_one_that_checkpoints_were_made_with():
    # Recorded with numpy 2.4. If a numpy changes it, resumed runs would see other batches: raise DATASET_FORMAT.
    assert sample_order(7, 3, 10).tolist() == GOLDEN_ORDER


def test_epochs_differ_and_follow_one_another_without_a_gap(dataset):
    two_epochs = np.concatenate([dataset.read_batch(p, 1) for p in range(2 * BLOCKS)])
    first, second = two_epochs[:BLOCKS, 0], two_epochs[BLOCKS:, 0]
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()
    assert np.array_equal(dataset.read_batch(BLOCKS - 2, 4), two_epochs[BLOCKS - 2 : BLOCKS + 2])


def test_every_epoch_is_in_its_own_order_of_one_seed(dataset):
    """Position p is block sample_order(seed, p // blocks)[p % blocks], however batches lie over the ends of epochs."""
    blocks = dataset.read_blocks(0, BLOCKS)
    order = np.concatenate([sample_order(7, epoch, BLOCKS) for epoch in range(4)])
    for count in (1, BLOCKS - 2, BLOCKS):
        read = [dataset.read_batch(p, count) for p in range(0, len(order) - count + 1, count)]
        assert np.array_equal(np.concatenate(read), blocks[order[: len(read) * count]])


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 200), count=st.integers(4, 20), world_size=st.sampled_from([1, 2, 3, 4]))
def test_any_number_of_ranks_reads_the_same_global_batch(dataset, position, count, world_size):
    alone = dataset.read_batch(position, count)
    together = np.empty_like(alone)
    for rank in range(world_size):
        together[rank::world_size] = dataset.read_batch(position, count, rank=rank, world_size=world_size)
    assert np.array_equal(alone, together)


def test_a_reader_opened_later_continues_exactly_where_another_stopped(dataset, directory):
    expected = [dataset.read_batch(p, 4) for p in range(0, 60, 4)]
    for number, batch in enumerate(expected):
        fresh = TokenDataset(directory, "train", sequence_length=LENGTH, seed=7)
        assert np.array_equal(fresh.read_batch(4 * number, 4), batch)


def test_a_batch_with_fewer_sequences_than_ranks_is_refused(dataset):
    with pytest.raises(ValueError, match="3 sequences cannot be shared by 4 ranks"):
        dataset.read_batch(0, 3, world_size=4)


def test_a_corpus_smaller_than_a_batch_is_refused_with_numbers_and_remedies(directory):
    dataset = TokenDataset(directory, "train", sequence_length=LENGTH)
    with pytest.raises(
        CorpusTooSmallError, match=r"198 tokens in 4 shards.* 23 sequences of 8.*24 are needed"
    ) as error:
        dataset.read_batch(0, 24)
    assert "lower batch.sequences" in str(error.value) and "shard_tokens" not in str(error.value)
    long = TokenDataset(directory, "val", sequence_length=1000)
    with pytest.raises(
        CorpusTooSmallError, match=r"raise data\.validation_fraction, or raise data\.shard_tokens"
    ) as error:
        long.require(1)
    assert "fewer" not in str(error.value)


@pytest.mark.parametrize(("tokens", "said"), [(4 * LENGTH, True), (4 * LENGTH + 1, False)])
def test_larger_shards_are_a_remedy_where_none_holds_more_than_four_sequences(tmp_path, tokens, said):
    dataset = TokenDataset(write_dataset(tmp_path, (tokens, 9)), "train", sequence_length=LENGTH)
    with pytest.raises(CorpusTooSmallError) as error:
        dataset.require(100)
    assert ("raise data.shard_tokens" in str(error.value)) == said


def test_a_split_without_a_token_has_no_examples_and_is_refused_like_any_other(tmp_path):
    empty = write_dataset(tmp_path / "empty", (0, 1))
    shards = map_shards(empty, "train", read_dataset_manifest(empty))
    assert [(len(shard), shard.dtype) for shard in shards] == [(0, np.uint16), (1, np.uint16)]
    for directory, shards in ((empty, 2), (write_dataset(tmp_path / "none", ()), 0)):
        dataset = TokenDataset(directory, "train", sequence_length=LENGTH)
        with pytest.raises(CorpusTooSmallError, match=f"in {shards} shards, which makes 0 sequences"):
            dataset.read_batch(0, 1)


def test_bytes_per_token_is_that_of_the_split(directory):
    assert TokenDataset(directory, "train", sequence_length=LENGTH).bytes_per_token == 3
    assert TokenDataset(directory, "val", sequence_length=LENGTH).bytes_per_token == 2


def test_ids_above_sixteen_bits_are_read_whole(tmp_path):
    dataset = TokenDataset(write_dataset(tmp_path, (70_000,), "uint32"), "train", sequence_length=100)
    assert dataset.read_blocks(dataset.blocks - 1, 1).max() == 69_900


def test_a_cut_or_missing_shard_is_named(tmp_path):
    shard = write_dataset(tmp_path) / "train" / "shard-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=r"shard-00003\.bin has 261 bytes, its manifest says 262"):
        TokenDataset(tmp_path, "train", sequence_length=LENGTH)
    shard.unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"shard-00003\.bin"):
        TokenDataset(tmp_path, "train", sequence_length=LENGTH)


def test_a_directory_without_a_manifest_is_no_dataset(tmp_path):
    with pytest.raises(CheckpointIncompleteError, match=r"no manifest\.json"):
        read_dataset_manifest(tmp_path)
    with pytest.raises(CheckpointIncompleteError, match=r"no manifest\.json"):
        read_dataset_manifest(write_dataset(tmp_path) / "train")


def test_an_attempt_that_came_second_is_read_beside_the_manifest_it_shares(tmp_path):
    variant = write_dataset(tmp_path / "variant-0123456789abcdef")
    (variant / MANIFEST_NAME).replace(tmp_path / MANIFEST_NAME)
    assert TokenDataset(variant, "train", sequence_length=LENGTH).blocks == BLOCKS
