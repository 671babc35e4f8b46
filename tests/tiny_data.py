"""A committed dataset without a corpus: a small Markov chain, which a model learns in a few dozen steps."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from relora_train.checkpoints.manifest import DatasetManifest, describe_files
from relora_train.training.files import new_attempt, write_manifest

VOCABULARY = 257
DATASET_ID = "a" * 64


def write_tiny_dataset(directory: Path, *, train_tokens: int = 20_000, val_tokens: int = 4_000, seed: int = 0) -> Path:
    """Write shards, a byte tokenizer and a manifest."""
    successors = np.random.default_rng(1).integers(0, VOCABULARY, (VOCABULARY, 3))
    for split, size in (("train", train_tokens), ("val", val_tokens)):
        (directory / split).mkdir(parents=True)
        choices = np.random.default_rng(seed + size).integers(0, 3, size)
        tokens = np.empty(size, dtype="<u2")
        token = 0
        for position, choice in enumerate(choices):
            token = tokens[position] = successors[token, choice]
        tokens.tofile(directory / split / "shard-00000.bin")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    manifest = DatasetManifest(
        files=describe_files(directory),
        attempt=new_attempt(),
        name="tiny",
        dataset_id=DATASET_ID,
        inputs={},
        token_dtype="uint16",
        vocab_size=VOCABULARY,
        eos_id=VOCABULARY - 1,
        train_tokens=train_tokens,
        train_documents=1,
        train_bytes=3 * train_tokens,
        val_tokens=val_tokens,
        val_documents=1,
        val_bytes=3 * val_tokens,
    )
    write_manifest(manifest, directory)
    return directory
