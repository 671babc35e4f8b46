"""Merge, re-init and optimizer reset at a model's own layer shapes: seconds, and memory above what is there anyway.

    OMP_NUM_THREADS=1 python tests/benchmarks/merge.py [--profile llama_1b] [--blocks 2] [--device cuda] [--bfloat16]

Only the wrapped layers of some blocks are made, as many as fit; the time of all blocks is the measured one times their
number. Memory is measured twice: as torch's operations hold it (in a run of its own, for the count is slow), and as the
device tells it, resident or allocated. The limit is the largest single layer in float32.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from live_bytes import LiveBytes

from relora_train.method.layer import lora_parameters, relora_layers
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.wrap import apply_relora
from relora_train.settings.load import load_profile
from relora_train.settings.method import OptimizerConfig
from relora_train.settings.profile import Profile
from relora_train.training.optimizer import build_optimizer
from relora_train.training.torch_settings import peak_bytes, process_bytes, reset_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--profile", default="llama_1b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="weights rounded, float32 masters beside them")
    options = parser.parse_args()
    profile, device = load_profile(options.profile), torch.device(options.device)
    model, optimizer, masters = built(profile, options.blocks, device, rounded=options.bfloat16)
    counted = LiveBytes()
    with counted:
        merge_all(model, optimizer, masters, cycle=1)
    seconds, peaks = [], []
    for cycle in range(2, 2 + options.rounds):
        fill(model)
        before = held(device)
        reset_peak(device)
        wait(device)
        started = time.perf_counter()
        merge_all(model, optimizer, masters, cycle=cycle)
        wait(device)
        seconds.append(time.perf_counter() - started)
        peaks.append((peak_bytes(device) or 0) - before)
    layer = 4 * max(layer.weight.numel() for _, layer in relora_layers(model))
    blocks = profile.model.num_hidden_layers
    each = statistics.median(seconds) / options.blocks
    form = "bfloat16 with masters" if options.bfloat16 else "float32"
    print(f"{options.profile}, {form}, rank {profile.relora.rank}, {options.blocks} of {blocks} blocks, {device}")  # noqa: T201
    print(f"merge, re-init and reset: {each:.2f} s a block, {each * blocks:.1f} s for {blocks} blocks")  # noqa: T201
    print(f"largest layer {layer / 1e6:.1f} MB; above the model: {counted.peak / 1e6:.1f} MB held by operations, ")  # noqa: T201
    print(f"{max(peaks) / 1e6:.1f} MB as the device tells it, {max(counted.peak, *peaks) / layer:.2f} layers at most")  # noqa: T201
    assert counted.peak <= layer, "more than one layer's memory"


def built(profile: Profile, blocks: int, device: torch.device, *, rounded: bool) -> tuple[nn.Module, Any, Any]:
    """The wrapped layers of these blocks with a factor's Adam state, as at the end of a cycle."""
    d, ff = profile.model.hidden_size, profile.model.intermediate_size
    sides = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}
    model: nn.Module = nn.ModuleDict(
        {
            f"{block}_{name}": nn.Linear(*io, bias=False, device=device)
            for block in range(blocks)
            for name, io in sides.items()
        }
    )
    names = list(dict(model.named_children()))
    apply_relora(model, rank=profile.relora.rank, alpha=32, dropout=0.0, target_modules=names, seed=0)
    masters = None
    if rounded:
        masters = {f"{name}.weight": layer.weight.detach().clone() for name, layer in relora_layers(model)}
        for _, layer in relora_layers(model):
            layer.weight.data = layer.weight.data.bfloat16()
    optimizer = build_optimizer(model, OptimizerConfig())
    for _, factor in lora_parameters(model):
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    fill(model)
    return model, optimizer, masters


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """An update worth merging."""
    for _, layer in relora_layers(model):
        layer.lora_B.normal_(std=1e-3)


def merge_all(model: nn.Module, optimizer: Any, masters: Any, *, cycle: int) -> None:
    merge_and_reinit(model, cycle=cycle, seed=0, masters=masters)
    reset_optimizer_state(optimizer, lora_parameters(model), mode="magnitude", ratio=0.99, seed=0, cycle=cycle)


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_bytes("VmRSS") or 0


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
