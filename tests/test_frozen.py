"""Frozen weights in int8 and nf4: what they hold, that training reads just that, and that merges never see it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from safetensors.torch import load_file
from stage_runs import CPU, ignore, manifest_of, run_all, stage_request, tiny_profile
from tiny_models import COMPILER_WARNINGS, logits, tiny_llama, token_batch, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

from relora_train.errors import CheckpointCorruptError, ConfigError, ModelError, TrainingError
from relora_train.method import merge as merging
from relora_train.method.experts import low_rank_layers
from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.frozen import NF4_BLOCK, QUANTIZED, Frozen, dequantize, quantize
from relora_train.method.layer import lora_parameters, relora_layers
from relora_train.method.merge import merge, merge_and_reinit
from relora_train.method.wrap import apply_relora
from relora_train.runs.costs import bytes_per_weight
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile, default_run_id
from relora_train.training.build import prepare_stage, round_frozen_weights
from relora_train.training.commit import check_written
from relora_train.training.end_of_cycle import finish_cycle
from relora_train.training.files import read_tensor
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.optimizer import build_optimizer
from relora_train.training.trainer import run_stage


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_back(weight: Tensor, kind: Frozen, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize(*quantize(weight, kind), tuple(weight.shape), dtype)  # type: ignore[arg-type]


def test_int8_is_off_by_half_a_step_of_its_row_at_most_and_keeps_its_largest_entry():
    weight = normal(40, 70)
    found, step = read_back(weight, "int8"), weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= step * 0.5001).all()
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0)
    assert quantize(weight, "int8")[0].abs().max() == 127


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("shape", [(3, 5), (8, 64), (7, 33), (1, 1)])
def test_any_shape_reads_back_and_zeros_stay_zero(kind: Frozen, shape: tuple[int, int]):
    weight = normal(*shape)
    weight[0] = 0
    found = read_back(weight, kind)
    assert found.shape == shape and (found[0] == 0).all()
    torch.testing.assert_close(read_back(found, kind), found, rtol=1e-6, atol=0)  # what is held is held again


@pytest.mark.parametrize("shape", [(64, 128), (40, 192)])  # on a CPU, it takes rows of whole blocks only
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(shape: tuple[int, int]):
    from bitsandbytes import functional

    weight = normal(*shape)
    theirs, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    codes, scales = quantize(weight, "nf4")
    assert torch.equal(codes, theirs.view(-1)) and scales is not None and torch.equal(scales.view(-1), state.absmax)
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        torch.testing.assert_close(read_back(weight, "nf4", dtype), functional.dequantize_4bit(theirs, state))


def wrapped(kind: Frozen, *, dropout: float = 0.0, fast: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that holds its frozen weights so, with an update in every layer, and its masters."""
    model = tiny_llama()
    apply_relora(model, rank=4, alpha=4.0, dropout=dropout, target_modules=None, seed=1)
    masters = {}
    for name, layer in relora_layers(model):
        masters[f"{name}.weight"] = layer.weight.detach().clone()
        layer.hold(layer.weight.detach(), kind)
        layer.lora_B.data.copy_(0.1 * normal(*layer.lora_B.shape, seed=len(name)))
    if fast:
        share_inputs(model)
    return model, masters


def plain(model: nn.Module) -> nn.Module:
    """The same model with what it holds written out in float32."""
    twin = copy.deepcopy(model)
    for _, layer in relora_layers(twin):
        matrix = layer.frozen_matrix(torch.float32)
        weight = matrix.T.contiguous() if layer.transposed else matrix
        layer.scales, layer.weight = None, nn.Parameter(weight, requires_grad=False)
    return twin


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(7)
    tokens = token_batch()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_reads_what_is_held_and_nothing_else(kind: Frozen, fast: bool, dropout: float):
    model, _ = wrapped(kind, dropout=dropout, fast=fast)
    twin = plain(model)
    if fast:
        share_inputs(twin)
    found, expected = trained_gradients(model), trained_gradients(twin)
    assert found.keys() == expected.keys() and "model.layers.0.mlp.up_proj.lora_A" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@COMPILER_WARNINGS
@pytest.mark.parametrize("kind", QUANTIZED)
def test_one_graph_reads_the_same(kind: Frozen):
    model, _ = wrapped(kind, dropout=0.3, fast=True)
    HashMasks(model)
    expected = trained_gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    for name, gradient in trained_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_codes_alone_wait_for_the_backward_pass(kind: Frozen):
    model, _ = wrapped(kind, fast=True)
    layers = dict(relora_layers(model))
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(input_ids=token_batch())
    factors = {p.data_ptr() for p in model.parameters()}
    weights = [t for t in kept if tuple(t.shape) in shapes]
    assert len(kept) > len(layers) and all(t.data_ptr() in factors for t in weights)
    assert {layer.weight.data_ptr() for layer in layers.values()} <= {t.data_ptr() for t in kept}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_after_eight_merges_the_masters_are_those_of_float32_arithmetic_bit_for_bit(kind: Frozen):
    """Given the same A and B: what is held rounded never reaches them, and is the last master rounded once."""
    model, masters = wrapped(kind)
    expected = {name: master.clone() for name, master in masters.items()}
    optimizer = build_optimizer(model, load_profile("smoke").optimizer)
    for cycle in range(1, 9):
        train(model, optimizer, range(cycle, cycle + 2))
        for name, layer in relora_layers(model):
            expected[f"{name}.weight"].addmm_(layer.lora_B.detach(), layer.lora_A.detach(), alpha=layer.scaling)
        report = merge_and_reinit(model, cycle=cycle, seed=0, masters=masters)
        assert all(0 <= layer.master_change < 1e-5 and layer.update_norm > 0 for layer in report.values())
    for name, layer in relora_layers(model):
        assert torch.equal(masters[f"{name}.weight"], expected[f"{name}.weight"]), name
        codes, scales = quantize(expected[f"{name}.weight"], kind)
        assert torch.equal(layer.weight, codes) and torch.equal(layer.scales, scales), name  # type: ignore[arg-type]


def test_a_merge_without_masters_or_with_those_of_another_layer_is_refused():
    model, masters = wrapped("int8")
    before = logits(model)
    with pytest.raises(ModelError, match="int8"):
        merge(model)
    first = next(iter(masters))
    with pytest.raises(ModelError, match="its master"):
        merge(model, masters=masters | {first: torch.zeros(3, 3)})
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return {
        kind: run_all(tiny_profile(precision={"frozen": kind}), dataset, tmp_path_factory.mktemp(kind))
        for kind in ("float32", *QUANTIZED)
    }


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_checkpoint_is_its_parent_plus_the_update_in_float32(runs: dict[str, dict[str, Path]], kind: str):

    made = runs[kind]
    adapter = load_file(made["cycle-2"] / "adapter" / "adapter_model.safetensors")
    for module in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        A, B = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        parent, merged = (read_tensor(made[stage], f"{module}.weight") for stage in ("cycle-1", "cycle-2"))
        torch.testing.assert_close(merged, parent + B @ A, rtol=0, atol=1e-7)  # scaling is 1
        assert not torch.equal(merged, read_back(merged, kind))  # type: ignore[arg-type]
    scores = manifest_of(made["cycle-2"])["evaluation"]
    assert scores["val_loss"] < scores["val_loss_before"]
    exact = manifest_of(runs["float32"]["cycle-2"])["evaluation"]["val_loss"]
    assert scores["val_loss"] == pytest.approx(exact, rel=0.02) and scores["val_loss"] != exact


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_stage_trained_again_gives_the_same_bytes(
    runs: dict[str, dict[str, Path]], dataset: Path, tmp_path: Path, kind: str
):

    profile = tiny_profile(precision={"frozen": kind})
    run_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "again", runs[kind]["warm-start"]), ignore)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (runs[kind]["cycle-1"] / name).read_bytes()


def test_the_merge_is_checked_on_the_masters_and_so_are_the_files(
    runs: dict[str, dict[str, Path]], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):

    profile = tiny_profile(precision={"frozen": "nf4"})
    training = prepare_stage(
        stage_request(profile, "cycle-1", dataset, tmp_path / "out", runs["nf4"]["warm-start"]), CPU
    )
    check_written(training, runs["nf4"]["warm-start"])
    layer = next(layer for _, layer in relora_layers(training.model))
    held = layer.weight.detach().clone()
    layer.weight.data[0] ^= 0x11
    with pytest.raises(CheckpointCorruptError, match="was not read back"):
        check_written(training, runs["nf4"]["warm-start"])
    layer.weight.data.copy_(held)
    layer.lora_B.data.fill_(0.01)
    real = merging._probe
    calls = iter(range(10**6))
    monkeypatch.setattr(merging, "_probe", lambda *given: real(*given) * (1 + 1e-3 * (next(calls) % 3 == 2)))
    with pytest.raises(TrainingError, match=r"0\.0001"):
        finish_cycle(training, [], ignore)


def test_what_is_held_is_part_of_a_stage_s_name_only_where_it_is_chosen():
    profile = load_profile("smoke")
    names = {kind: default_run_id(load_profile("smoke", {"precision.frozen": kind})) for kind in ("auto", *QUANTIZED)}
    assert names["auto"] == default_run_id(profile) and len({*names.values()}) == 3


def test_codes_are_not_sharded():
    with pytest.raises(ConfigError, match=r"frozen 'nf4' does not go with launch.sharding"):
        load_profile("smoke", ["precision.frozen=nf4", "launch.sharding=full", "launch.nproc_per_node=2"])


def test_the_bytes_of_a_weight_are_counted_with_its_scales():
    for kind, dtype in (("int8", torch.int8), ("nf4", torch.uint8)):
        codes, scales = quantize(normal(48, 128), kind)  # type: ignore[arg-type]
        held = codes.numel() * codes.element_size() + scales.numel() * 4  # type: ignore[union-attr]
        assert codes.dtype == dtype and held == round(48 * 128 * bytes_per_weight(kind, 128))  # type: ignore[arg-type]
    assert [bytes_per_weight(kind, 128) for kind in ("float32", "bfloat16")] == [4, 2]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_transposed_weight_is_held_merged_and_read_back_alike(kind: Frozen):
    """GPT-2's Conv1D has its weight as (in, out)."""
    torch.manual_seed(0)
    exact = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    model = copy.deepcopy(exact)
    apply_relora(model, rank=4, alpha=4.0, dropout=0.0, target_modules=None, seed=1)
    masters = {}
    for name, layer in relora_layers(model):
        masters[f"{name}.weight"] = layer.weight.detach().clone()
        layer.hold(layer.weight.detach(), kind)
        layer.lora_B.data.copy_(0.1 * normal(*layer.lora_B.shape))
    found, expected = logits(model), logits(plain(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - logits(exact)).abs().max() > 0.01
    report = merge(model, masters=masters)
    assert all(each.master_change < 1e-5 for each in report.values())
    layer = next(layer for name, layer in relora_layers(model) if name.endswith("c_attn"))
    assert masters["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    torch.testing.assert_close(
        layer.frozen_matrix(torch.float32), masters["transformer.h.0.attn.c_attn.weight"].T, rtol=0, atol=0.05
    )


ENDS = {"train": {"embeddings": False, "head": False}}
ROUNDED: list[dict[str, str]] = [
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "frozen": "int8"},
    {"dtype": "bfloat16", "frozen": "nf4"}, {"dtype": "bfloat16", "frozen": "float32"}, {"frozen": "nf4"},
]  # fmt: skip


@pytest.mark.parametrize("precision", ROUNDED, ids=str)
@pytest.mark.parametrize(
    ("family", "relora"),
    [
        ("llama", ENDS),
        ("qwen2", {}),
        ("gpt2", {**ENDS, "target_modules": ["c_attn"]}),
        ("mixtral", ENDS),
        ("qwen3_moe", {}),
    ],
)
def test_the_plan_counts_the_bytes_that_a_stage_holds(
    family: str, relora: dict[str, Any], precision: dict[str, str], tmp_path: Path
):
    model = family_model(family, vocab_size=300)
    model.save_pretrained(tmp_path)
    settings = {"model": {"pretrained": str(tmp_path)}, "relora": {"rank": 2, **relora}, "precision": precision}
    profile = Profile.model_validate({**settings, "batch": {"sequence_length": 16}})
    apply_relora(
        model, rank=2, alpha=2, dropout=0, target_modules=profile.relora.target_modules, seed=0,
        frozen=profile.relora.frozen,
    )  # fmt: skip
    if (kind := profile.precision.frozen_as) != "float32":
        device, others = torch.device("cpu"), profile.precision.rounds_others
        round_frozen_weights(model, kind, tmp_path, tmp_path, device=device, others=others)
    tensors = [
        *model.parameters(),
        *(each.scales for each in low_rank_layers(model).values() if each.scales is not None),
    ]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    counted = plan(profile).low_rank
    assert counted is not None and counted.memory.weights == pytest.approx(held, rel=0.01)
    assert counted.adapter_parameters == sum(factor.numel() for _, factor in lora_parameters(model))


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_embeddings_and_heads_are_held_in_bfloat16_and_written_exactly(
    tied: bool, dataset: Path, tmp_path: Path
):
    base = family_model("llama", vocab_size=300, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {
        "model": {"pretrained": str(tmp_path / "base")},
        "schedule": {
            "warm_start_steps": 0,
            "cycles": 2,
            "cycle_length": 4,
            "warmup_steps": 0,
            "restart_warmup_steps": 0,
        },
        "relora": {"rank": 4, **ENDS, "target_modules": ["q_proj", "v_proj"]},
        "batch": {"sequence_length": 16},
    }
    losses = []
    for frozen in ("float32", "nf4"):
        profile = tiny_profile(**changes, precision={"dtype": "bfloat16", "frozen": frozen})
        if frozen == "nf4":
            training = prepare_stage(stage_request(profile, "cycle-1", dataset, tmp_path / "out"), CPU)
            held = training.model
            for weight in (
                held.model.embed_tokens.weight,
                held.lm_head.weight,
                held.model.layers[0].mlp.up_proj.weight,
            ):
                assert weight.dtype == torch.bfloat16 and not weight.requires_grad
            assert held.model.embed_tokens(torch.tensor([1])).dtype == torch.float32
        made = run_all(profile, dataset, tmp_path / frozen)
        losses.append(manifest_of(made["cycle-2"])["evaluation"]["val_loss"])
        before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", made["cycle-2"]))
        assert before.keys() == after.keys() and ("lm_head.weight" in after) != tied
        for name in before:
            moved = "norm" in name or "q_proj" in name or "v_proj" in name
            assert torch.equal(before[name], after[name]) != moved, name
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
