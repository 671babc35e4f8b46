"""A5 to A7: the optimizer's state by way of files, its reset, and the merge."""

import time
from typing import Any

import torch
from check_run import Run
from right_numbers import relative
from stages import CPU, release, tiny_stage
from tiny_models import tiny_llama, token_batch
from torch import Tensor, nn

from relora_train.method.layer import relora_layers
from relora_train.method.merge import merge
from relora_train.method.reset import above_quantile, reset_optimizer_state
from relora_train.method.wrap import apply_relora
from relora_train.training.files import SavedOptimizerState, save_optimizer_state
from relora_train.training.optimizer import load_optimizer_state_by_name, optimizer_state_by_name
from relora_train.training.step import StageTraining

# --- A5


def optimizer_round_trip(run: Run) -> None:
    for dtype in ("float32", "bfloat16", "pure-bfloat16"):
        sections = {"precision": {"dtype": dtype}, "relora": {"dropout": 0.1}}
        undisturbed = tiny_stage(run, "cycle-1", **sections)
        first = undisturbed.stage.first_step
        for step in range(first, first + 3):
            undisturbed.update(step)
            undisturbed.optimizer.zero_grad(set_to_none=True)
        path = run.scratch / f"{dtype}.safetensors"
        save_optimizer_state(optimizer_state_by_name(undisturbed.optimizer, undisturbed.model), path)
        weights = {name: tensor.clone() for name, tensor in undisturbed.model.state_dict().items()}
        undisturbed.update(first + 3)
        loaded = tiny_stage(run, "cycle-1", **sections)
        loaded.model.load_state_dict(weights)
        load_optimizer_state_by_name(loaded.optimizer, loaded.model, SavedOptimizerState(path))
        places = {str(state["step"].device.type) for state in loaded.optimizer.state.values()}
        run.record(**{f"place of Adam's step, {dtype}": sorted(places)})
        run.require(
            f"{dtype}: the fused optimizer's step is on {places}",
            dtype == "pure-bfloat16" or places == {run.device_type},
        )
        loaded.update(first + 3)
        run.require(f"{dtype}: the bits of one never stopped", same_bits(undisturbed, loaded))
        there_and_back(run, dtype, undisturbed, path)


def same_bits(one: StageTraining, other: StageTraining) -> bool:
    states = [optimizer_state_by_name(training.optimizer, training.model) for training in (one, other)]
    moments = all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    other_weights = other.model.state_dict()
    return moments and all(torch.equal(tensor, other_weights[name]) for name, tensor in one.model.state_dict().items())


def there_and_back(run: Run, dtype: str, training: StageTraining, path: Any) -> None:
    """Read the device's state by a CPU's optimizer, and that one's by the device's again."""
    before = optimizer_state_by_name(training.optimizer, training.model)
    kept = {name: {key: value.clone() for key, value in entries.items()} for name, entries in before.items()}
    on_cpu = tiny_stage(run, "cycle-1", device=CPU, precision={"dtype": dtype})
    for source, target in ((training, on_cpu), (on_cpu, training)):
        save_optimizer_state(optimizer_state_by_name(source.optimizer, source.model), path)
        load_optimizer_state_by_name(target.optimizer, target.model, SavedOptimizerState(path))
    after = optimizer_state_by_name(training.optimizer, training.model)
    same = all(torch.equal(after[n][key], value) for n, entries in kept.items() for key, value in entries.items())
    run.require(f"{dtype}: by way of a CPU and back to the same bits", same)


# --- A6


def resets(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(64, 33, generator=generator).round(decimals=1)  # ties and zeros
    squares = moments.square() + 0.1
    for mode, ratio in (("magnitude", 0.9), ("magnitude", 0.99), ("magnitude", 0.0), ("random", 0.9), ("zero", 1.0)):
        for independent in (False, True):
            found = [pruned(moments, squares, device, mode, ratio, independent) for device in (CPU, run.device)]
            same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True))
            run.require(f"{mode} {ratio}, independent masks {independent}: as on a CPU", same)
    large = torch.randn(10_000 if run.dry else 33_554_432, device=run.device)
    above_quantile(large, 0.99)
    synchronize(run)
    release(run)
    held = torch.cuda.memory_allocated() if not run.dry else 0
    started = time.perf_counter()
    above_quantile(large, 0.99)
    synchronize(run)
    run.below("seconds of a large threshold", time.perf_counter() - started, 0.5, device_only=True)
    if not run.dry:
        run.record(peak_bytes=torch.cuda.max_memory_allocated() - held, entries=large.numel())


def pruned(
    moments: Tensor, squares: Tensor, device: torch.device, mode: Any, ratio: float, independent: bool
) -> list[Tensor]:
    parameter = nn.Parameter(torch.zeros_like(moments, device=device))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {
        "step": torch.tensor(5.0, device=device),
        "exp_avg": moments.to(device, copy=True),
        "exp_avg_sq": squares.to(device, copy=True),
    }
    reset_optimizer_state(
        optimizer, [("a.lora_A", parameter)], mode=mode, ratio=ratio, independent_masks=independent, seed=3, cycle=2
    )
    return [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq", "step")]


def synchronize(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()


# --- A7


def merges(run: Run) -> None:
    torch.set_float32_matmul_precision("high")
    for name, limit in (("float32", 1e-4), ("bfloat16", 2e-2)):
        model, on_cpu = (wrapped(device) for device in (run.device, CPU))
        layers, masters = dict(relora_layers(model)), None
        if name == "bfloat16":
            masters = {f"{each}.weight": layer.weight.detach().cpu().clone() for each, layer in layers.items()}
            for layer in layers.values():
                layer.weight.data = layer.weight.data.bfloat16()
        exact = {
            each: (masters[f"{each}.weight"] if masters else layer.weight).detach().double().cpu()
            + layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double()).cpu()
            for each, layer in layers.items()
        }
        before = outputs(run, model, name)
        merge(model, masters=masters)
        after = outputs(run, model, name)
        run.below(f"change of the output, {name}", float((after - before).abs().max() / before.abs().max()), limit)
        found = {each: masters[f"{each}.weight"] if masters else layer.weight for each, layer in layers.items()}
        run.below(f"error of merged weights, {name}", max(relative(found[e], exact[e]) for e in exact), 1e-6)
        merge(on_cpu)
        theirs = {each: layer.weight for each, layer in relora_layers(on_cpu)}
        run.below(f"from a CPU's merge, {name}", max(relative(found[e], theirs[e]) for e in theirs), 1e-6)
        rounded = all(torch.equal(layer.weight, found[e].to(layer.weight)) for e, layer in layers.items())
        run.require(f"{name}: the weights are the masters, rounded once", rounded)
    precision = torch.get_float32_matmul_precision()
    run.require(f"the precision of products is {precision} after a merge", precision == "high")


def wrapped(device: torch.device) -> nn.Module:
    """Return a tiny Llama with an update in every layer, about as large as a cycle's."""
    model = tiny_llama(seed=3)
    apply_relora(model, rank=8, alpha=8, dropout=0.0, target_modules=None, seed=0)
    generator = torch.Generator().manual_seed(5)
    for _, layer in relora_layers(model):
        layer.lora_B.data = 0.02 * torch.randn(layer.lora_B.shape, generator=generator)
    return model.to(device)


@torch.no_grad()
def outputs(run: Run, model: nn.Module, name: str) -> Tensor:
    """Return logits on the CPU, computed in full float32 or under autocast as a trainer's probe is."""
    torch.set_float32_matmul_precision("highest")
    with torch.autocast(run.device_type, torch.bfloat16, enabled=name == "bfloat16"):
        made = model.eval()(input_ids=token_batch(seed=99).to(run.device)).logits
    torch.set_float32_matmul_precision("high")
    return made.float().cpu()
