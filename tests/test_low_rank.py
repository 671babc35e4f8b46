"""The fast forms of a ReLoRA layer are the readable one: outputs, gradients, dropout, precision, and what is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relora_train.method import low_rank
from relora_train.method.fast_path import share_inputs
from relora_train.method.layer import ReLoRALinear, lora_parameters, relora_layers, relora_linear
from relora_train.method.low_rank import Factors, low_rank_linears
from relora_train.method.merge import merge_and_reinit
from relora_train.method.products import Products, choose_products, flops_per_token
from relora_train.method.wrap import apply_relora
from relora_train.runs.plan import plan
from relora_train.settings.load import list_profiles, load_profile

ALL: tuple[Products, ...] = ("split", "merged", "dense")


def made_layers(count: int, *, d_in: int = 6, rank: int = 2, bias: bool = True, dtype: torch.dtype) -> list[Factors]:
    torch.manual_seed(3)
    layers = []
    for index in range(count):
        out = 4 + index
        B, A = torch.randn(out, rank, dtype=dtype), torch.randn(rank, d_in, dtype=dtype)
        layers.append(
            Factors(
                torch.randn(out, d_in, dtype=dtype),
                torch.randn(out, dtype=dtype).requires_grad_() if bias else None,
                A.requires_grad_(),
                B.requires_grad_(),
            )
        )
    return layers


def with_merged(layers: list[Factors], scaling: float) -> list[Factors]:
    with torch.no_grad():
        return [Factors(f.weight, f.bias, f.A, f.B, f.weight + scaling * f.B @ f.A) for f in layers]


def gradients(outputs: tuple[Tensor, ...], x: Tensor, layers: list[Factors]) -> list[Tensor]:
    torch.manual_seed(5)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    wanted = [x, *(t for f in layers for t in (f.A, f.B, f.bias) if t is not None)]
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("products", ALL)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_all_products_are_the_reference_in_float64(products: Products, count: int, bias: bool):
    layers, scaling = made_layers(count, bias=bias, dtype=torch.float64), 1.7
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = tuple(relora_linear(x, f.weight, f.bias, f.A, f.B, scaling, 0.0) for f in layers)
    found = low_rank_linears(x, with_merged(layers, scaling), products, scaling, 0.0)
    for ours, theirs in zip(
        [*found, *gradients(found, x, layers)], [*expected, *gradients(expected, x, layers)], strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("products", ALL)
def test_gradients_are_the_derivatives(products: Products):
    layers = made_layers(2, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(layers, factors[::2], factors[1::2], strict=True)
        return low_rank_linears(
            x, with_merged([Factors(f.weight, f.bias, A, B) for f, A, B in pairs], 0.5), products, 0.5, 0.0
        )

    assert torch.autograd.gradcheck(outputs, (x, *(t for f in layers for t in (f.A, f.B))))


def masked_reference(x: Tensor, layers: list[Factors], scaling: float, dropout: float, seed: int) -> tuple[Tensor, ...]:
    keep = low_rank._kept(x.reshape(-1, x.shape[-1]), dropout, seed).view(x.shape)
    read = x * keep / keep.double().mean().new_tensor(1 - round(dropout * 65_536) / 65_536)
    return tuple(x @ f.weight.T + (0 if f.bias is None else f.bias) + scaling * read @ f.A.T @ f.B.T for f in layers)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_is_of_the_low_rank_path_alone_and_the_same_both_ways(dropout: float):
    layers, scaling = made_layers(3, dtype=torch.float64), 0.7
    x = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    found = low_rank_linears(x, layers, "split", scaling, dropout)
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    expected = masked_reference(x, layers, scaling, dropout, seed)
    for ours, theirs in zip(
        [*found, *gradients(found, x, layers)], [*expected, *gradients(expected, x, layers)], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_mask_keeps_its_share_and_is_drawn_anew_by_each_call():
    rows = torch.empty(1000, 100)
    kept = low_rank._kept(rows, 0.1, 7)
    assert torch.equal(kept, low_rank._kept(rows, 0.1, 7))
    assert torch.equal(kept, low_rank._kept(rows.bfloat16(), 0.1, 7).float())
    assert not torch.equal(kept, low_rank._kept(rows, 0.1, 8))
    layers, x = made_layers(1, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    torch.manual_seed(0)
    first, second = (low_rank_linears(x, layers, "split", 1.0, 0.5)[0] for _ in range(2))
    torch.manual_seed(0)
    again = low_rank_linears(x, layers, "split", 1.0, 0.5)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9])
def test_a_mask_drops_the_very_share_and_its_entries_are_independent(dropout: float):
    """0.1 and 0.001 are no multiples of 1 / 256, which a draw of 8 bits would round them to."""
    kept, share = low_rank._kept(torch.empty(8000, 250), dropout, 7).double(), 1 - dropout
    assert set(kept.unique().tolist()) == {0.0, 1.0}

    def error(entries: Tensor, expected: float) -> float:
        """In standard errors of a mean of independent draws."""
        return abs(float(entries.mean()) - expected) / (expected * (1 - expected) / entries.numel()) ** 0.5

    assert error(kept, share) < 4
    assert error(kept[:, ::2] * kept[:, 1::2], share**2) < 4  # along a row
    assert error(kept[::2] * kept[1::2], share**2) < 4  # from row to row
    assert error(kept[:, :125] * kept[:, 125:], share**2) < 4  # far apart in one row, which has one threshold
    columns, rows = kept.mean(0), kept.mean(1)
    variance = share * dropout
    assert float(columns.var()) == pytest.approx(variance / 8000, rel=0.4)  # 250 columns: four standard errors
    assert float(rows.var()) == pytest.approx(variance / 250, rel=0.07)


def test_a_share_next_to_one_is_met_by_its_scale():
    kept = low_rank._kept(torch.empty(4000, 500), 0.999, 7)
    assert float(kept.mean()) == pytest.approx(1 / 256, rel=0.05)
    assert low_rank.low_rank_scale(1.0, 0.999) == 256


class Block(nn.Module):
    """Attention's and MLP's projections, called as a transformers Llama calls them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, out, bias=False) for out in (width, width // 2, width // 2)
        )
        self.o_proj = nn.Linear(width, width, bias=True)
        self.gate_proj, self.up_proj = nn.Linear(width, 24), nn.Linear(width, 24)
        self.down_proj = nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.o_proj(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], dim=-1))
        return x + h + self.down_proj(torch.tanh(self.gate_proj(h)) * self.up_proj(h))


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def wrapped(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(dtype)
    apply_relora(model, rank=4, alpha=8, dropout=dropout, target_modules=NAMES, seed=0)
    with torch.no_grad():
        for name, factor in lora_parameters(model):
            if name.endswith("lora_B"):
                factor.normal_(std=0.1)
    return model


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("products", ALL)
def test_a_model_on_the_fast_path_is_the_model(products: Products, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("relora_train.method.fast_path.choose_products", lambda *_, **__: products)
    model, x = wrapped(), torch.randn(3, 16, dtype=torch.float64)
    expected, grads = step(model, x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    chosen = share_inputs(model, optimizer=optimizer)
    assert set(chosen) == {name for name, _ in relora_layers(model)}
    found, ours = step(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-11, msg=name)
    for _, layer in relora_layers(model):
        layer.shared = None
    assert torch.equal(step(model, x)[0], expected)


def test_siblings_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = low_rank.low_rank_linears

    def counted(x, layers, *rest):
        calls.append(len(layers))
        return real(x, layers, *rest)

    monkeypatch.setattr("relora_train.method.fast_path.low_rank_linears", counted)
    model = wrapped()
    share_inputs(model)
    model(torch.randn(3, 16, dtype=torch.float64))
    assert calls == [3, 1, 2, 1] * 2
    shared = [layer.shared for _, layer in relora_layers(model)]
    assert all(not each._waiting and each._x is None for each in shared)  # nothing is held back


def test_any_order_of_calls_is_right():
    model = wrapped()
    block, x, z = model[0], torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    expected = {name: (block.get_submodule(name)(x), block.get_submodule(name)(z)) for name in ("q_proj", "k_proj")}
    share_inputs(model)
    for name in ("k_proj", "q_proj", "q_proj", "k_proj"):
        for tensor, y in zip((x, z), expected[name], strict=True):
            torch.testing.assert_close(block.get_submodule(name)(tensor), y)
    kept = block.q_proj(x)
    x.mul_(2)  # the same tensor with another content
    torch.testing.assert_close(block.k_proj(x), relora_of(block.k_proj, x))
    assert not torch.equal(kept, block.q_proj(x))


def relora_of(layer: ReLoRALinear, x: Tensor) -> Tensor:
    return relora_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, 0.0)


@pytest.mark.parametrize("change", ["optimizer", "merge", "load"])
def test_a_kept_merged_weight_never_outlives_its_parts(change: str):
    model, x = wrapped(), torch.randn(64, 16, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    products = share_inputs(model, optimizer=optimizer)
    assert "split" not in products.values()
    step(model, x)
    match change:
        case "optimizer":
            optimizer.step()
        case "merge":
            merge_and_reinit(model, cycle=1, seed=0)
        case "load":
            model.load_state_dict({name: tensor + 0.1 for name, tensor in model.state_dict().items()})
    found = step(model, x)[0]
    for _, layer in relora_layers(model):
        layer.shared = None
    torch.testing.assert_close(found, step(model, x)[0], rtol=1e-11, atol=1e-11)


def test_without_the_optimizer_nothing_is_kept():
    assert set(share_inputs(wrapped()).values()) == {"split"}


def test_a_merged_weight_is_formed_once_an_update(monkeypatch: pytest.MonkeyPatch):
    formed = []
    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: formed.append(1) or real(*args, **options))
    model = wrapped()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    share_inputs(model, optimizer=optimizer)
    for _ in range(3):
        model(torch.randn(64, 16, dtype=torch.float64)).sum().backward()
    assert 0 < len(formed) <= len(list(relora_layers(model)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_makes_the_same_step(dropout: float):
    model, x = wrapped(dropout), torch.randn(9, 16, dtype=torch.float64)
    share_inputs(model)

    def run(recompute: bool) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        y = x.clone().requires_grad_()
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
        y.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = run(False), run(True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(grad, recomputed[name]) for name, grad in plain.items())


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_float32():
    model = wrapped(0.2, torch.float32)
    for _, layer in relora_layers(model):
        layer.weight.data = layer.weight.data.bfloat16()
    products = share_inputs(model)
    assert set(products.values()) == {"split"}  # a merged weight in bfloat16 would lose the update
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = step(model.eval(), torch.randn(32, 16))
        assert model[0].q_proj(torch.randn(2, 16)).dtype == torch.bfloat16
    assert all(grads[name].dtype == torch.float32 for name, _ in lora_parameters(model))
    for _, layer in relora_layers(model):
        layer.shared = None
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(32, 16)
        expected = model(x)
        share_inputs(model)
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_a_copied_model_starts_on_the_reference():
    model = wrapped()
    share_inputs(model)
    twin, x = copy.deepcopy(model), torch.randn(4, 16, dtype=torch.float64)
    assert all(layer.shared is None for _, layer in relora_layers(twin))
    torch.testing.assert_close(twin(x), model(x))


def test_only_exact_weights_without_dropout_are_merged():
    """A merged weight in bfloat16 would lose the update to rounding, and dropout acts on one path alone."""
    for dropout, dtype in ((0.0, torch.float32), (0.2, torch.float32), (0.0, torch.bfloat16)):
        model = wrapped(dropout, dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        exact = dropout == 0 and dtype == torch.float32
        assert ("split" not in share_inputs(model, optimizer=optimizer).values()) == exact


CHOSEN_BEFORE = {
    "digits": ["merged", "dense", "merged", "merged"],
    "fashion": ["merged"] * 4,
    "quickstart": ["merged"] * 4,
    "tiny": ["merged"] * 4,
}
"""By the model of time that this rule replaced, on a CPU; on a GPU all of these were dense."""


LATER = ("chat", "continue", "small")
"""Templates, and a profile that came after the rule."""


@pytest.mark.parametrize("name", [path.stem for path in list_profiles() if path.stem not in LATER])
def test_shipped_profiles_multiply_as_they_did(name: str):
    expected = CHOSEN_BEFORE.get(name, ["split"] * 4)
    assert [found.order for found in plan(load_profile(name)).low_rank.orders] == expected
    on_gpu = plan(load_profile(name, ["launch.device=cuda", "launch.compile=false"])).low_rank.orders
    assert [found.order for found in on_gpu] == (["dense"] * 4 if name in CHOSEN_BEFORE else expected)
    compiled = plan(load_profile(name, ["launch.device=cuda"])).low_rank.orders
    assert [found.order for found in compiled] == ["split"] * 4


def test_flops_are_the_closed_forms():
    tokens, d_in, d_out, rank = 512, 64, 128, 8
    S, D = d_in + d_out, d_in * d_out
    per_token = {
        "split": 4 * D + 2 * rank * S + 4 * rank * S + 2 * rank * d_in,
        "merged": 2 * rank * D / tokens + 4 * D + 4 * rank * S,
        "dense": 6 * D + 6 * rank * D / tokens,
    }
    for products, expected in per_token.items():
        found = flops_per_token(products, d_in, [d_out], rank, tokens=tokens, micro_steps=1)
        assert found == pytest.approx(expected), products


def test_a_huge_rank_goes_dense():
    chosen = [choose_products(2048, [2048], rank, merges=True, device="cpu") for rank in (32, 1024)]
    assert chosen == ["merged", "dense"]
