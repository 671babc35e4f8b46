"""Runs on conversations, alone and mixed with plain text: the template travels, and what was left out is told."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instructions import CHATML, MARKED, record, write_records
from made_up_corpus import made_up_text
from stage_runs import tiny_profile
from stored_runs import Workshop
from transformers import AutoTokenizer

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.cli.export import export_model
from relora_train.data.mixed_dataset import MixedTokens, open_tokens
from relora_train.errors import TokenizerError
from relora_train.reports.sources import left_out_of
from relora_train.runs.datasets import choose_tokenizer, prepare_or_reuse
from relora_train.runs.run import Run, fetch_dataset
from relora_train.settings.profile import Profile
from relora_train.storage.workspace import checkpoint_cache

LENGTH = 48


@pytest.fixture
def workshop(tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path / "store", patch)


def source(folder: Path, name: str, template: str) -> dict[str, Any]:
    (folder / f"{name}.jinja").write_text(template)
    path = write_records(folder / f"{name}.jsonl", [*(record(seed) for seed in range(80)), {"messages": []}])
    instructions = {"messages": "messages", "chat_template": str(folder / f"{name}.jinja")}
    return {"source": "jsonl", "paths": [str(path)], "unreadable": "skip", "instructions": instructions}


def mixed(folder: Path, **templates: str) -> Profile:
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": made_up_text(seed)}) + "\n" for seed in range(60)))
    sources = [{"name": "text", "source": "jsonl", "paths": [str(text)], "weight": 3}]
    sources += [{"name": name, **source(folder, name, template)} for name, template in templates.items()]
    data = {"sources": sources, "workers": 1, "validation_fraction": 0.2}
    batch = {"documents": "mask", "sequence_length": LENGTH}
    schedule = {"warm_start_steps": 2, "cycles": 1, "cycle_length": 3}
    return tiny_profile(data=data, tokenizer={"vocab_size": 300}, batch=batch, schedule=schedule)


def test_a_mixture_of_text_and_conversations_is_trained_on_exported_and_told(workshop, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="relora_train")
    profile = mixed(tmp_path, chats=CHATML)
    workshop.dataset = prepare_or_reuse(Run("r", workshop.store_uri, profile), on_event=lambda event: None).dataset
    directory = fetch_dataset(workshop.dataset)
    data = open_tokens(directory, "train", sequence_length=LENGTH, seed=0)
    assert isinstance(data, MixedTokens)
    rows = data.read_batch(0, 40)
    of_conversations = rows[:, 0] < 0
    assert of_conversations.sum() == 10, "one part in four, by examples"
    assert (rows[~of_conversations] >= 0).all()
    alone = open_tokens(directory, "val", sequence_length=LENGTH, seed=0)
    assert np.array_equal(
        alone.read_blocks(0, alone.blocks), np.vstack([alone.read_blocks(n, 1) for n in range(alone.blocks)])
    )
    last = workshop.train(profile)[-1]
    told = [record.getMessage() for record in caplog.records]
    dataset = f"left out 1 of 81 records (no list of messages; first: {tmp_path}/chats.jsonl, line 81)."
    assert [message for message in told if "left out" in message and "records" in message] == [
        f"Dataset 'chats': {dataset}"
    ]
    cut = f"Training examples longer than a sequence: {data.left_out['cut']} cut to its length"
    assert data.left_out["cut"] > 5 and sum(cut in message for message in told) == 1, "in the first stage alone"
    notes = left_out_of(last, files_in_stores(checkpoint_cache("tiny")))
    assert notes[0] == f"Dataset chats: {dataset}" and notes[1].startswith(cut)
    export_model(last, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_two_templates_in_one_mixture_are_refused(workshop, tmp_path):
    run = Run("r", workshop.store_uri, mixed(tmp_path, one=CHATML, two=MARKED))
    with pytest.raises(TokenizerError, match="Sources 'one' and 'two' have different chat templates"):
        prepare_or_reuse(run, on_event=lambda event: None)
    same = Run("r", workshop.store_uri, mixed(tmp_path, one=CHATML, two=CHATML))
    assert choose_tokenizer(same, None)[1]
