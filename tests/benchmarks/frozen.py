"""Frozen weights in four forms: bytes held, and the time of forward and backward of one micro-batch, in turn.

    python tests/benchmarks/frozen.py [--threads 2] [--rounds 7]

A Llama of 20M parameters (512 wide, 5 layers, 8 x 256 tokens), rank 32, no dropout, float32 products, on a CPU.
"""

import argparse
import statistics

import torch
from compiled import model_of, seconds
from torch import nn

from relora_train.method.fast_path import share_inputs
from relora_train.method.frozen import Frozen
from relora_train.method.layer import relora_layers
from relora_train.method.wrap import apply_relora

KINDS: tuple[Frozen, ...] = ("float32", "int8", "nf4")


def built(kind: Frozen) -> nn.Module:
    model = model_of()
    apply_relora(model, rank=32, alpha=32, dropout=0.0, target_modules=None, seed=0)
    for _, layer in relora_layers(model):
        if kind != "float32":
            layer.hold(layer.weight.detach(), kind)
    share_inputs(model)
    return model.train()


def held(model: nn.Module) -> int:
    tensors = [t for _, layer in relora_layers(model) for t in (layer.weight, layer.scales) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(8192, (8, 257))
    variants = {kind: built(kind) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(options.rounds + 1):
        for kind in KINDS if round_ % 2 == 0 else KINDS[::-1]:
            spent = seconds(variants[kind], None, tokens)
            if round_:  # the first warms up
                taken[kind].append(spent)
    for kind, times in taken.items():
        ratio = statistics.median(own / exact for own, exact in zip(times, taken["float32"], strict=True))
        size = held(variants[kind]) / held(variants["float32"]) * 4
        line = f"{kind:8s} {size:.3f} bytes a weight, {1000 * statistics.median(times):5.0f} ms, {ratio:.2f} of float32"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
