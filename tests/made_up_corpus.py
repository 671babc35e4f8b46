"""Texts that nobody wrote, the same for the same seed."""

import json
import random
from pathlib import Path

from relora_train.settings.data import DataConfig

WORDS = ("the", "a", "of", "loss", "train", "rank", "merge", "12", "3.5", "naïve", "漢字", "(", ":", "<|endoftext|>")


def made_up_text(seed: int) -> str:
    rng = random.Random(seed)
    return rng.choice(["", "\n", "  "]) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 250)))


def write_corpus(path: Path, documents: int = 400) -> DataConfig:
    texts = [made_up_text(seed) for seed in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source="jsonl", paths=(str(path),), shard_tokens=20_000, validation_fraction=0.2, workers=1)
