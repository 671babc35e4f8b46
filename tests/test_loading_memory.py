"""A rank's own memory while it loads a model: the files are mapped, and a tensor at a time goes to the device."""

import ctypes
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora_train.method.wrap import apply_relora
from relora_train.training import build
from relora_train.training.build import round_frozen_weights
from relora_train.training.files import save_model
from relora_train.training.models.pretrained import load_model

MB = 2**20
META = torch.device("meta")
"""A device whose memory is not this machine's, as a GPU's is not."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 MB in tensors of 4 MB, and two of 8."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "vocab_size": 4096}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8))
    found = tmp_path_factory.mktemp("loading")
    save_model(model, found, weights=model.state_dict())
    assert 110 * MB < (found / "model.safetensors").stat().st_size < 140 * MB
    return found


def own_bytes() -> int:
    """Memory that no other process can share: without the pages of files that nobody has written to.

    And without what was freed and the allocator keeps, which is up to 32 MB in another run of the same code.
    """
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_a_rank_holds_no_float32_model_of_its_own(directory: Path):
    before = own_bytes()
    model = load_model(directory)
    assert own_bytes() - before < 16 * MB
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 > 110 * MB


def test_weights_are_rounded_one_by_one_on_their_way_to_the_device(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All rounded ones together would be 50 MB."""
    model = load_model(directory)
    apply_relora(model, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=0)
    before, seen = own_bytes(), [0]
    read = build.read_tensor
    monkeypatch.setattr(build, "read_tensor", lambda *a, **o: (seen.append(own_bytes() - before), read(*a, **o))[1])
    masters = round_frozen_weights(model, "bfloat16", directory, tmp_path, device=META)
    model.to(META)
    assert len(seen) == 1 + len(masters) == 1 + 7 * 7
    assert max(seen) < 16 * MB and own_bytes() - before < 16 * MB
    name = "model.layers.3.mlp.up_proj.weight"
    assert masters[name].dtype == torch.float32 and model.get_parameter(name).dtype == torch.bfloat16
