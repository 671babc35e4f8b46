"""Any model's shape from its files: parameters of every family of the zoo, activations of those that are promised."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_activations
from families import FAMILIES, family_model
from live_bytes import LiveBytes
from safetensors.torch import save_file
from test_activations import Case
from tiny_models import saved_bytes
from torch import nn

from relora_train.method.targets import check_targets
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile
from relora_train.training.models import shape_of_files as reading
from relora_train.training.models.shape import ModelShape, ShapeUnknownError, wrapped_layers
from relora_train.training.models.shape_of_files import shape_of_files

LARGER = {"hidden_size": 64, "intermediate_size": 112, "vocab_size": 300}
SIZES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 112, "vocab_size": 300},
    **{name: {**LARGER, "head_dim": 16} for name in ("gemma2", "mistral", "qwen3")},
}


def shape_in(directory: Path, model: nn.Module) -> ModelShape:
    model.save_pretrained(directory)  # type: ignore[operator]
    return shape_of_files(directory, json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_and_so_are_the_layers_that_can_be_wrapped(family: str, tmp_path: Path):
    model = family_model(family)
    shape = shape_in(tmp_path, model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(shape.parameters_by_kind(shape.linears).values()) == shape.parameters
    assert shape.layers == 2 and shape.hidden_size == 32
    if family not in EXPERTS and family != "mamba":
        wrapped = sum(model.get_submodule(name).weight.numel() for name in check_targets(model, None, rank=1))
        assert shape.parameters_by_kind(wrapped_layers(shape, target_modules=None, rank=1))["wrapped"] == wrapped


EXPERTS = [name for name, (_, sizes) in FAMILIES.items() if any("expert" in key for key in sizes)]


@pytest.mark.parametrize("family", [name for name in reading._COMPARED if name != "llama"])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_of_a_real_step_within_a_tenth(
    family: str, low_rank: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = SIZES.get(family, LARGER)
    shape = shape_in(tmp_path, family_model(family, **sizes))
    assert not shape.rough
    monkeypatch.setattr(test_activations, "shape_of_config", lambda *_: shape)
    case = Case(lambda: family_model(family, **sizes), low_rank, {}, dtype=dtype)
    assert case.counted.kept == pytest.approx(saved_bytes(case.model, case.loss), rel=0.1)


def test_a_plan_of_someone_s_model_needs_no_torch_and_says_what_is_rough(tmp_path: Path):
    family_model("qwen2").save_pretrained(tmp_path / "qwen2")
    family_model("bloom").save_pretrained(tmp_path / "bloom")
    for name, rough in (("qwen2", False), ("bloom", True)):
        settings = {"model.pretrained": str(tmp_path / name), "launch.device": "cuda", "relora.rank": 4}
        planned = plan(load_profile("continue", settings))
        assert planned.unknown is None and planned.rough == rough
        assert planned.low_rank is not None and planned.low_rank.memory.activations > 0
        assert [fit.low_rank for fit in planned.fits] == [16, 16]
    arguments = ["plan", "continue", "--model", str(tmp_path / "bloom"), "--set", "relora.rank=4"]
    code = (
        f"import sys; from relora_train.cli.app import main\ntry: main({arguments})\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n") and "activations (roughly)" in shown


def test_a_model_in_several_files_is_read_whole_and_what_is_no_model_is_told(tmp_path: Path):
    model = family_model("mistral")
    one = shape_in(tmp_path / "one", model)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert shape_of_files(tmp_path / "many", config) == one
    for place, tensors in (("empty", None), ("flat", {"a.weight": model.lm_head.weight.detach().clone()})):
        (tmp_path / place).mkdir()
        if tensors:
            save_file(tensors, tmp_path / place / "model.safetensors")
        with pytest.raises(ShapeUnknownError):
            shape_of_files(tmp_path / place, config)
    (tmp_path / "flat/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json" + b"x" * 64)
    with pytest.raises(ShapeUnknownError, match="no safetensors"):
        shape_of_files(tmp_path / "flat", config)


@pytest.mark.parametrize("launch", [{}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_updated_weights_of_experts_are_counted(
    launch: dict[str, bool], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {**LARGER, "intermediate_size": 400, "num_local_experts": 8}
    shape = shape_in(tmp_path, family_model("mixtral", **sizes))
    monkeypatch.setattr(test_activations, "shape_of_config", lambda *_: shape)
    monkeypatch.setattr(test_activations, "SEQUENCES", 2)
    case = Case(lambda: family_model("mixtral", **sizes), True, launch, dtype=dtype)
    kept = saved_bytes(case.model, case.loss)
    with LiveBytes() as live:
        case.loss().backward()
        before, live.peak = live.now, 0
        case.loss().backward()
    assert case.counted.kept == pytest.approx(kept, rel=0.1)
    assert sum(case.counted) == pytest.approx(live.peak - before, rel=0.2)
