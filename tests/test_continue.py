"""The profile that continues a pretrained model: --model names it, no warm start, the dtype it came in goes out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import manifest_of, run_all
from tiny_data import VOCABULARY
from tiny_models import tiny_llama

from relora_train.cli.app import main
from relora_train.cli.options import with_model
from relora_train.method.stages import plan_stages
from relora_train.settings.load import load_profile

SMALL = [
    "schedule.cycles=2", "schedule.cycle_length=4", "schedule.warmup_steps=1", "schedule.restart_warmup_steps=1",
    "batch.sequences=4", "batch.sequence_length=16", "relora.rank=4", "evaluation.sequences=8",
]  # fmt: skip


def test_its_cycles_begin_from_the_model_and_leave_embedding_and_head_alone(dataset: Path, tmp_path: Path):
    model = tiny_llama()
    model.resize_token_embeddings(VOCABULARY)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    profile = load_profile("continue", with_model(SMALL, str(tmp_path / "model")))
    assert [stage.kind for stage in plan_stages(profile)] == ["relora", "relora"]
    made = run_all(profile, dataset, tmp_path / "run")
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(made["cycle-2"] / "model.safetensors")
    assert manifest_of(made["cycle-1"])["source_dtype"] == "bfloat16"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name].float())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert not torch.equal(after[name], before[name].float())


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["run", "continue", "--model", str(tmp_path / "no such place"), "--store", str(tmp_path / "store")])
    assert ended.value.code == 4
    assert capsys.readouterr().err.startswith("Error: model.pretrained") and not (tmp_path / "store/runs").exists()


def test_plan_says_of_which_model_it_does_not_know(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["plan", "continue", "--model", "some/model"])
    assert "'some/model' is downloaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "are quantised"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration"),
        ({}, "longer than the model's 32 positions"),
        (None, "pickles can run code"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(
    change: dict[str, object] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_llama().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (change or {})))
    if change is None:
        (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SystemExit) as ended:
        main(["plan", "continue", "--model", str(tmp_path)])
    assert ended.value.code == 4 and said in capsys.readouterr().err
