"""What an export holds beside the weights, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_up_corpus import write_corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stage_runs import tiny_profile
from stored_runs import Workshop
from synthetic_run import commit_run, synthetic_profile
from test_tokenizer_choice import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora_train.checkpoint_store import CheckpointRef
from relora_train.cli import main
from relora_train.console.export import export_model, unfinished_stages
from relora_train.corpus.prepare import prepare_dataset
from relora_train.corpus.tokenizer_choice import tokenizer_directory
from relora_train.errors import CheckpointCorruptError, ConfigError, ModelError
from relora_train.rounding import round_model
from relora_train.run import fetch_dataset, fetch_parent
from relora_train.settings.data import TokenizerConfig
from relora_train.stages import plan_stages
from relora_train.storage.opening import open_store
from relora_train.tokenizer import TOKENIZER_FILES, load_tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path / "store", patch)


@pytest.fixture
def checkpoint(workshop: Workshop) -> CheckpointRef:
    (fetch_dataset(workshop.dataset) / "chat_template.jinja").write_text(TEMPLATE)
    return workshop.train(tiny_profile(schedule={"warm_start_steps": 2, "cycles": 1, "cycle_length": 3}))[-1]


def test_every_file_of_a_tokenizer_goes_from_its_directory_to_the_dataset(tmp_path):
    source = write_tokenizer(tmp_path / "t")
    for name in TOKENIZER_FILES[2:]:
        (source / name).write_text("{}")
    (source / "README.md").write_text("not a part of it")
    made = prepare_dataset(
        write_corpus(tmp_path / "c.jsonl", documents=60), TokenizerConfig(path=str(source)), tmp_path / "out"
    )
    assert {entry.path for entry in made.manifest.files if "/" not in entry.path} == {*TOKENIZER_FILES}
    for name in TOKENIZER_FILES:
        assert (made.directory / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(str(made.directory)) == load_tokenizer(str(source))


def test_a_chat_template_is_in_checkpoint_and_export_and_goes_on_with_the_tokenizer(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "out")
    for directory in (fetch_parent(checkpoint), tmp_path / "out", tokenizer_directory(checkpoint)):
        said = AutoTokenizer.from_pretrained(directory).apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False
        )
        assert said == "<a>"


def test_no_export_goes_into_the_store_or_over_the_model_that_its_run_began_from(workshop, checkpoint, tmp_path):
    inside = tmp_path / "store" / checkpoint.prefix
    for place in (inside, inside.parent / "new", tmp_path / "store"):
        with pytest.raises(ConfigError, match="lies in the store"):
            export_model(checkpoint, place, force=True)
    export_model(checkpoint, tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    schedule = {"warm_start_steps": 2, "cycles": 1, "cycle_length": 3}
    profile = tiny_profile(schedule=schedule, model={"pretrained": str(tmp_path / "base")})
    continued = workshop.train(profile, "continued")[-1]
    with pytest.raises(ConfigError, match=r"is the model that the run began from \(model\.pretrained\)"):
        export_model(continued, tmp_path / "base", force=True)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    export_model(checkpoint, tmp_path / "base", force=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_has_the_dtype_asked_for_and_names_its_origin(checkpoint, tmp_path, dtype):
    written = export_model(checkpoint, tmp_path / "out", dtype=dtype)
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "out", fetch_parent(checkpoint)))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(getattr(torch, dtype)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt", "run": "tiny", "stage": "cycle-1", "step": "5", "fingerprint": checkpoint.fingerprint,
        }  # fmt: skip
    again = export_model(checkpoint, tmp_path / "again", dtype=dtype)
    assert again.files == written.files  # the same bytes


def test_a_value_that_float16_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.full((4, 4), 7e4)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj\.weight holds a value above 65504.*Use bfloat16"):
        round_model(tmp_path, "float16")


def test_rounding_a_split_model_keeps_whole_numbers_and_corrects_the_index(tmp_path):
    parts = {"model-00001-of-00002.safetensors": torch.ones(8, 4), "model-00002-of-00002.safetensors": torch.arange(6)}
    for number, (name, tensor) in enumerate(parts.items()):
        save_file({f"t{number}": tensor}, tmp_path / name)
    index = {"metadata": {"total_size": 176, "total_parameters": 38}, "weight_map": {"t0": "a", "t1": "b"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    round_model(tmp_path, "bfloat16")
    kept = [load_file(tmp_path / name)[f"t{number}"] for number, name in enumerate(parts)]
    assert kept[0].dtype == torch.bfloat16 and torch.equal(kept[1], torch.arange(6))
    found = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert found == {**index, "metadata": {"total_size": 2 * 32 + 8 * 6, "total_parameters": 38}}


def test_a_file_without_a_header_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("relora_train.console.export._HEADER_BYTES", 8)
    with pytest.raises(CheckpointCorruptError, match="has no header of safetensors"):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_says_which_stage_it_is_and_what_its_run_still_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    store, profile = open_store(tmp_path / "store"), synthetic_profile()
    one, two = commit_run(store, "tale", profile, tmp_path / "scratch", stages=plan_stages(profile)[:2])
    place = ["--store", str(tmp_path / "store")]
    for name, step, rest in (("tale@latest", 80, "cycle-2, cycle-3"), ("tale@warm-start", 40, "cycle-2, cycle-3")):
        with pytest.raises(SystemExit):
            main(["export", name, str(tmp_path / name), *place])
        said = capsys.readouterr().out
        assert (
            f"step {step}: 1 files" in said and f"The run is not finished: its settings plan {rest} after this." in said
        )
    assert unfinished_stages(one) == unfinished_stages(two) == ["cycle-2", "cycle-3"]
    whole = commit_run(store, "whole", profile, tmp_path / "scratch-2")
    assert unfinished_stages(whole[0]) == unfinished_stages(whole[-1]) == []
    with pytest.raises(SystemExit) as ended:
        main(["export", "whole", str(tmp_path / "json"), "--json", *place])
    made = json.loads(capsys.readouterr().out)
    assert not ended.value.code and (made["stage"], made["step"], made["unfinished_stages"]) == ("cycle-3", 160, [])


def test_only_known_dtypes_are_taken(tmp_path, monkeypatch, capsys):
    commit_run(open_store(tmp_path / "store"), "tale", synthetic_profile(), tmp_path / "scratch")
    for extra in (["--dtype", "int8"], ["--dtype", "float16", "--as-adapter"]):
        with pytest.raises(SystemExit) as ended:
            main(["export", "tale", str(tmp_path / "out"), *extra, "--store", str(tmp_path / "store")])
        assert ended.value.code == ConfigError.exit_code
