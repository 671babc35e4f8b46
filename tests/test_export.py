"""What an export holds beside the weights, and what it says of them."""

import dataclasses
import json
import shutil
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

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, parse_manifest
from relora_train.cli.export import export_model, unfinished_stages
from relora_train.data.prepare import prepare_dataset
from relora_train.data.tokenizer import load_tokenizer
from relora_train.data.tokenizer_files import TOKENIZER_FILES
from relora_train.errors import CheckpointCorruptError, ConfigError, ModelError
from relora_train.method.stages import plan_stages
from relora_train.runs.datasets import tokenizer_directory
from relora_train.runs.retry import retry_stage
from relora_train.runs.run import fetch_dataset, fetch_parent
from relora_train.settings.data import TokenizerConfig
from relora_train.storage.opening import open_store
from relora_train.training.models.pretrained import dtype_of_files
from relora_train.training.tensor_stream import round_model

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
    monkeypatch.setattr("relora_train.cli.export._HEADER_BYTES", 8)
    with pytest.raises(CheckpointCorruptError, match="has no header of safetensors"):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_says_which_stage_it_is_and_what_its_run_still_plans(tmp_path, monkeypatch, relora):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    store, profile = open_store(tmp_path / "store"), synthetic_profile()
    one, two = commit_run(store, "tale", profile, tmp_path / "scratch", stages=plan_stages(profile)[:2])
    place = ["--store", str(tmp_path / "store")]
    for name, step, rest in (("tale@latest", 80, "cycle-2, cycle-3"), ("tale@warm-start", 40, "cycle-2, cycle-3")):
        said = relora("export", name, str(tmp_path / name), *place).out
        assert f"step {step}: 2 files," in said
        assert f"The run is not finished: its settings plan {rest} after this." in said
    assert unfinished_stages(one) == unfinished_stages(two) == ["cycle-2", "cycle-3"]
    whole = commit_run(store, "whole", profile, tmp_path / "scratch-2")
    assert unfinished_stages(whole[0]) == unfinished_stages(whole[-1]) == []
    made = json.loads(relora("export", "whole", str(tmp_path / "json"), "--json", *place).out)
    assert (made["stage"], made["step"], made["unfinished_stages"]) == ("cycle-3", 160, [])


def test_only_known_dtypes_are_taken(tmp_path, relora):
    commit_run(open_store(tmp_path / "store"), "tale", synthetic_profile(), tmp_path / "scratch")
    for extra in (["--dtype", "int8"], ["--dtype", "float16", "--as-adapter"]):
        refused = relora("export", "tale", str(tmp_path / "out"), *extra, "--store", str(tmp_path / "store"))
        assert refused.code == ConfigError.exit_code


SCHEDULE = {"warm_start_steps": 2, "cycles": 1, "cycle_length": 3}


@pytest.fixture
def source(checkpoint: CheckpointRef, tmp_path: Path) -> Path:
    """A model with a float32 norm among weights of a dtype that the test gives it."""
    export_model(checkpoint, tmp_path / "source")
    return tmp_path / "source"


def round_source(source: Path, dtype: str) -> Path:
    round_model(source, dtype)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_is_by_default_as_the_weights_were_that_its_line_began_from(
    workshop, source, tmp_path, relora, dtype
):
    pretrained = {"pretrained": str(round_source(source, dtype))}
    line = workshop.train(tiny_profile(schedule=SCHEDULE, model=pretrained), "continued")
    shutil.rmtree(source)  # it is asked once, when it is loaded
    more = tiny_profile(schedule={**SCHEDULE, "cycles": 2}, seed=1, model=pretrained)
    line += workshop.train(more, "branch", parent=line[-1])
    assert [ref.manifest.source_dtype for ref in line] == [dtype] * 3
    workshop.disturbed = True
    instead = retry_stage(line[-1], on_event=lambda event: None, replace=True).replacement
    assert instead is not None and instead.manifest.source_dtype == dtype
    done = relora("export", "branch", str(tmp_path / "out"), "--store", workshop.store_uri)
    said = f"The weights are {dtype}, as those were that the run began from; --dtype float32 rounds nothing."
    assert done.code == 0 and said in " ".join(done.out.split())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    whole = export_model(line[-1], tmp_path / "whole", dtype="float32")
    assert whole.dtype == "float32"
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(fetch_parent(line[-1]) / "model.safetensors")[name])


def test_a_float32_source_or_none_or_one_of_which_nothing_is_recorded_gives_float32(
    workshop, checkpoint, source, tmp_path, relora
):
    assert checkpoint.manifest.source_dtype is None
    line = workshop.train(tiny_profile(schedule=SCHEDULE, model={"pretrained": str(source)}), "continued")
    assert line[-1].manifest.source_dtype == "float32"
    stored = json.loads(checkpoint.manifest.to_bytes())
    del stored["source_dtype"]
    older = parse_manifest(CheckpointManifest, json.dumps(stored).encode(), uri="memory://older")
    assert older == checkpoint.manifest
    for number, ref in enumerate((dataclasses.replace(checkpoint, manifest=older), line[-1])):
        assert export_model(ref, tmp_path / str(number)).dtype == "float32"
        assert load_file(tmp_path / str(number) / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    for run, why in (("tiny", "the checkpoint holds them"), ("continued", "those were that the run began from")):
        said = relora("export", run, str(tmp_path / run), "--store", workshop.store_uri).out
        assert f"The weights are float32, as {why}." in " ".join(said.split())


def test_the_dtype_of_files_is_that_of_most_values_and_no_failure_where_it_cannot_be_told(tmp_path):
    sizes = {torch.float32: [70], torch.float16: [40, 40], torch.bfloat16: [20, 20, 20]}
    tensors = [torch.ones(size, dtype=dtype) for dtype, kind in sizes.items() for size in kind]
    weight_map = {}
    for name, tensor in zip("abcdef", tensors, strict=True):
        weight_map[name] = f"model-{name}.safetensors"
        save_file({name: tensor, f"{name}.ids": torch.arange(500)}, tmp_path / weight_map[name])
    assert dtype_of_files(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert dtype_of_files(tmp_path) == "float16"
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert dtype_of_files(tmp_path) is None
    save_file({"a": torch.ones(2, dtype=torch.float64)}, tmp_path / "model.safetensors")
    assert dtype_of_files(tmp_path) == "float32"
