"""The chat of profiles/README.md: every command as it stands there, with a tiny model, until it answers."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAGE = (Path(__file__).parents[1] / "profiles/README.md").read_text().partition("\n## A chat from end to end\n")[2]
ANSWERS = {
    "What is the answer?": "forty two",
    "Who asks?": "you do",
    "Is this a chat?": "yes it is",
    "And now?": "bye",
}

# smaller and faster than the profiles, which are for real models
SMALL = [
    "schedule.cycles=2", "schedule.cycle_length=80", "schedule.warmup_steps=5", "schedule.restart_warmup_steps=5",
    "batch.sequences=4", "batch.sequence_length=128", "relora.rank=32", "optimizer.learning_rate=5e-3",
    "evaluation.sequences=4", "data.validation_fraction=0.2", "data.workers=1",
]  # fmt: skip


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with notes, conversations, the page's template, and a model that knows nothing."""
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / f"notes/{number}.txt").write_text(
            f"Note {number}. " + "The answer is forty two, and you ask. " * 20
        )
    chats = [
        [
            {"role": role, "content": said}
            for each in two
            for role, said in zip(("user", "assistant"), each, strict=True)
        ]
        for two in itertools.product(ANSWERS.items(), repeat=2)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "chat.jinja").write_text(block("jinja"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["initializer_range"] = 0.2  # embeddings and head stay as they are, so they must tell tokens apart
    config = LlamaConfig(vocab_size=257, max_position_embeddings=128, eos_token_id=0, bos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_page_ends_with_an_answer_of_ones_own(place: Path):
    environment = {**os.environ, "RELORA_CACHE": str(place / "cache"), "RELORA_STORE": str(place / "store")}

    def said(*command: str) -> str:
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    for line in block("").splitlines():
        program, command, *options = shlex.split(line.replace("DIR_OR_HUB_ID", "model"))
        assert program == "relora"
        if command == "run":
            small = [*SMALL, *(["data.instructions.chat_template=chat.jinja"] if options[0] == "chat" else [])]
            options += [part for setting in small for part in ("--set", setting)]
        said(sys.executable, "-c", "from relora_train.cli.app import main; main()", command, *options)
    code = block("python")
    assert said(sys.executable, "-c", code).strip() == "forty two"
    assert said(sys.executable, "-c", code.replace("What is the answer?", "Who asks?")).strip() == "you do"
