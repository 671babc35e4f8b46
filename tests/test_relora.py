import json
import math
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import COMPILER_WARNINGS, logits, relative_error, tiny_gpt_neox, tiny_llama, train
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from relora_train.errors import ConfigError, ModelError, NoTargetModulesError
from relora_train.method.layer import ReLoRALinear, lora_parameters, relora_layers
from relora_train.method.merge import merge, merge_and_reinit
from relora_train.method.targets import check_targets
from relora_train.method.wrap import apply_relora, unwrap
from relora_train.settings.method import OptimizerConfig
from relora_train.training.optimizer import build_optimizer
from relora_train.training.peft_export import adapter_config, adapter_state

TINY_MODELS = pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_neox])
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def wrap(model, *, rank=4, alpha=8.0, dropout=0.0, target_modules=None, seed=0, **options):
    return apply_relora(
        model, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, seed=seed, **options
    )


def one_layer(*, dtype=torch.float64, bias=True, **options):
    """A wrapped 20 -> 24 layer whose update is not empty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24, bias=bias, dtype=dtype))
    wrap(model, target_modules=["0"], **options)
    fill_updates(model)
    return model


@torch.no_grad()
def fill_updates(model, *, std=0.1, seed=1):
    """Updates of the size of the weights, without the time it takes to train them."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in relora_layers(model):
        layer.lora_B.copy_(std * torch.randn(layer.lora_B.shape, generator=generator))


def adamw(model, learning_rate=1e-2):
    return build_optimizer(model, OptimizerConfig(learning_rate=learning_rate))


# --- the layer


@pytest.mark.parametrize(("rank_stabilized", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_papers_formula(rank_stabilized, scaling, bias):
    layer = one_layer(rank_stabilized=rank_stabilized, bias=bias)[0]
    x = torch.randn(3, 5, 20, dtype=torch.float64)
    expected = x @ (layer.weight + scaling * layer.lora_B @ layer.lora_A).T
    if bias:
        expected = expected + layer.bias
    assert layer.scaling == scaling
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)  # float64, sums in another order


def test_gradients_are_those_of_the_formula_and_the_weight_gets_none():
    layer = one_layer()[0]
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 24, dtype=torch.float64)
    layer(x).backward(g)
    A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling
    close = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ g.T @ x.detach(), **close)
    torch.testing.assert_close(layer.lora_B.grad, s * g.T @ x.detach() @ A.T, **close)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), **close)
    torch.testing.assert_close(x.grad, g @ (layer.weight + s * B @ A), **close)
    assert layer.weight.grad is None


def test_dropout_acts_on_the_low_rank_input_alone_and_only_in_training():
    layer = one_layer(dropout=0.5)[0]
    x = torch.randn(6, 20, dtype=torch.float64)
    torch.manual_seed(3)
    output = layer(x)
    torch.manual_seed(3)
    expected = (
        F.linear(x, layer.weight, layer.bias) + layer.scaling * F.dropout(x, 0.5) @ (layer.lora_B @ layer.lora_A).T
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_in_bfloat16_and_leaves_float32_gradients(weight_dtype):
    layer = one_layer(dtype=torch.float32)[0]
    x = torch.randn(64, 20)
    expected = layer(x)
    layer.weight.data = layer.weight.data.to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {p.grad.dtype for p in (layer.lora_A, layer.lora_B, layer.bias)} == {torch.float32}
    assert relative_error(output.float(), expected) < 4 * 2**-8  # inputs, A x and the sum are each rounded to 8 bits


def test_a_bfloat16_weight_works_without_autocast_and_keeps_the_dtype_of_its_input():
    layer = one_layer(dtype=torch.float32)[0]
    x = torch.randn(64, 20)
    expected = layer(x)
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert relative_error(layer(x), expected) < 4 * 2**-8  # the input, the weight, the bias and W x rounded to 8 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_factors_are_at_least_float32_beside_a_weight_of_any_dtype(dtype):
    layer = one_layer(dtype=dtype)[0]
    assert layer.weight.dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected


@COMPILER_WARNINGS
def test_a_wrapped_layer_compiles_into_one_graph():
    layer = one_layer(dtype=torch.float32)[0]
    x = torch.randn(5, 20)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the graph rounds once where the eager form rounds twice
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


# --- wrapping


@TINY_MODELS
def test_wrapping_leaves_the_function_exactly_as_it_was(build):
    model = build()
    expected = logits(model)
    wrap(model, dropout=0.1)
    assert torch.equal(logits(model), expected)  # B = 0 adds exact zeros


def test_the_default_layers_are_attention_and_mlp_of_each_family():
    llama, gpt_neox = wrap(tiny_llama()), wrap(tiny_gpt_neox())
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert llama == [f"model.layers.{i}.{kind}" for i in range(2) for kind in kinds]
    kinds = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert sorted(gpt_neox) == sorted(f"gpt_neox.layers.{i}.{kind}" for i in range(2) for kind in kinds)


@TINY_MODELS
def test_only_the_wrapped_weights_are_frozen(build):
    model = build()
    before = [name for name, _ in model.named_parameters()]
    wrapped = wrap(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in wrapped}
    plain = [name for name, _ in model.named_parameters() if "lora_" not in name]
    assert sorted(plain) == sorted(before)


def test_tied_embeddings_stay_tied_and_trained():
    model = tiny_llama(tie_word_embeddings=True)
    wrap(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_targets_are_matched_on_whole_segments(target_modules, expected):
    assert wrap(tiny_llama(), target_modules=target_modules) == expected


def test_a_target_is_not_matched_inside_a_segment():
    assert wrap(tiny_gpt_neox(), target_modules=["dense"]) == [f"gpt_neox.layers.{i}.attention.dense" for i in range(2)]


@pytest.mark.parametrize("target_modules", [["proj"], ["lm_head"], ["embed_tokens"], []])
def test_no_match_names_the_layers_there_are(target_modules):
    with pytest.raises(NoTargetModulesError) as error:
        wrap(tiny_llama(), target_modules=target_modules)
    assert all(name in str(error.value) for name in LLAMA_LAYERS)


@pytest.mark.parametrize(
    ("target_modules", "said"),
    [
        (["q_proj", "lm_head"], r"names 'lm_head' \(the output head, which is trained in full\)"),
        (["embed_tokens", "q_proj"], r"names 'embed_tokens' \(an embedding, which is trained in full\)"),
        (
            ["q_proj", "k_prj", "norm"],
            r"names 'k_prj' \(no module is called so\), 'norm' \(no nn.Linear but a LlamaRMSNorm",
        ),
    ],
)
def test_every_name_must_be_of_a_layer_that_can_be_wrapped(target_modules, said):
    model = tiny_llama()
    for refuse in (
        lambda: wrap(model, target_modules=target_modules),
        lambda: check_targets(model, target_modules, rank=4),
    ):
        with pytest.raises(NoTargetModulesError, match=said):
            refuse()
    assert not list(relora_layers(model))


def test_a_model_without_known_targets_asks_for_them():
    with pytest.raises(NoTargetModulesError, match=r"A Sequential has no repeated blocks.* called 0, 2"):
        wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 33}, ConfigError, r"relora\.rank 33 exceeds 32, .* model\.layers\.0\.self_attn\.q_proj"),
        ({"rank": 0}, ValueError, "rank = 0"),
        ({"alpha": 0.0}, ValueError, r"alpha = 0\.0"),
        ({"dropout": 1.0}, ValueError, r"dropout = 1\.0"),
    ],
)
def test_a_refused_wrapping_changes_nothing(options, error, message):
    model = tiny_llama()
    with pytest.raises(error, match=message):
        wrap(model, **options)
    assert not list(relora_layers(model))
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_may_be_as_large_as_the_smaller_side_of_a_layer():
    model = nn.Sequential(nn.Linear(8, 6))
    assert wrap(model, rank=6, target_modules=["0"]) == ["0"] and model[0].rank == 6


def test_a_head_is_known_by_its_name_where_a_model_does_not_tell():
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), lm_head=nn.Linear(4, 4)))
    with pytest.raises(NoTargetModulesError, match="that can be wrapped are called body:"):
        check_targets(model, ["another"], rank=1)


def test_a_wrapped_model_is_not_wrapped_again():
    model = tiny_llama()
    wrap(model)
    with pytest.raises(ModelError, match="unwrap"):
        wrap(model)


def test_a_weight_shared_with_another_module_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ModelError, match=r"0\.weight, 1\.weight"):
        wrap(model, target_modules=["0"])


# --- the draws


def test_the_first_factor_is_kaiming_uniform_and_the_second_zero():
    model = nn.Sequential(nn.Linear(400, 300))
    wrap(model, rank=256, target_modules=["0"])
    A, bound = model[0].lora_A.detach(), 1 / math.sqrt(400)
    assert model[0].lora_B.count_nonzero() == 0
    assert A.abs().max() <= bound
    # 102,400 draws: their standard deviation is known to 0.14 % (4 standard errors), their mean to 4 of its own.
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.006)
    assert abs(A.mean().item()) < 4 * bound / math.sqrt(3 * A.numel())


def draws(model):
    return {name: layer.lora_A.detach().clone() for name, layer in relora_layers(model)}


def test_the_draws_depend_on_seed_cycle_and_name_alone():
    model = tiny_llama()
    wrap(model, seed=7)
    expected = draws(model)

    torch.manual_seed(12345)  # other global state, other weights, fewer layers around it
    other = tiny_llama(seed=5)
    before = torch.get_rng_state()
    wrap(other, seed=7, target_modules=["up_proj"])
    assert torch.equal(torch.get_rng_state(), before)
    for name, A in draws(other).items():
        assert torch.equal(A, expected[name])

    in_double = tiny_llama().double()
    wrap(in_double, seed=7)
    for name, A in draws(in_double).items():
        assert torch.equal(A, expected[name].double())


def test_the_draws_differ_between_layers_seeds_and_cycles():
    drawn = []
    for seed, cycle in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        model = tiny_llama()
        wrap(model, seed=seed, cycle=cycle)
        drawn += [A[0, 0].item() for A in draws(model).values()]
    assert len(set(drawn)) == len(drawn) == 4 * 14


def test_the_draws_are_the_same_in_another_process():
    code = (
        "from torch import nn; from relora_train.method.wrap import apply_relora; m = nn.Sequential(nn.Linear(8, 8));"
        "apply_relora(m, rank=2, alpha=1, dropout=0, target_modules=['0'], seed=3, cycle=4);"
        "print(m[0].lora_A.tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}  # Python's own hash() would differ
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    model = nn.Sequential(nn.Linear(8, 8))
    wrap(model, rank=2, target_modules=["0"], seed=3, cycle=4)
    assert json.loads(printed.stdout) == model[0].lora_A.tolist()


def test_a_resumed_run_draws_what_the_merge_drew():
    model = tiny_llama()
    wrap(model, seed=5)
    merge_and_reinit(model, cycle=3, seed=5)
    resumed = tiny_llama()
    wrap(resumed, seed=5, cycle=4)
    for (_, after_merge), (_, after_resume) in zip(lora_parameters(model), lora_parameters(resumed), strict=True):
        assert torch.equal(after_merge, after_resume)


# --- the plain model again


@TINY_MODELS
def test_unwrapping_gives_back_an_ordinary_model(build, tmp_path):
    model = build()
    names = {name: p.shape for name, p in model.named_parameters()}
    wrapped = wrap(model)
    train(model, adamw(model), range(3))
    merge(model)
    expected = logits(model)
    assert unwrap(model) == wrapped
    assert {name: p.shape for name, p in model.named_parameters()} == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, ReLoRALinear) for module in model.modules())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), expected)


def test_an_update_that_was_not_merged_cannot_be_dropped_by_unwrapping():
    model = one_layer()
    with pytest.raises(ModelError, match=r"first 0: call merge"):
        unwrap(model)
    assert isinstance(model[0], ReLoRALinear)


@pytest.mark.parametrize("rank_stabilized", [False, True])
@TINY_MODELS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks transformers for it
def test_peft_loads_the_adapter_and_gives_the_merged_models_output(build, rank_stabilized, tmp_path):
    base, model = build(), build()
    wrap(model, rank_stabilized=rank_stabilized)
    fill_updates(model)
    save_file(adapter_state(model), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    merge_and_reinit(model, cycle=1, seed=0)
    adapted = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(logits(adapted), logits(model)) < 1e-5  # float32: W is rounded once more by the merge


def test_an_adapter_is_a_copy_that_later_merges_do_not_change():
    model = one_layer()
    state = adapter_state(model)
    expected = model[0].lora_B.detach().clone()
    merge_and_reinit(model, cycle=1, seed=0)
    assert list(state) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    assert torch.equal(state["base_model.model.0.lora_B.weight"], expected)


def test_a_model_without_updates_has_no_adapter():
    with pytest.raises(ModelError, match="no adapter"):
        adapter_config(tiny_llama())
