"""Compiled blocks beside eager ones on a CPU: forward and backward of one micro-batch, the variants in turn.

    python tests/benchmarks/compiled.py [--dropout 0.1] [--threads 2] [--rounds 7]

A Llama of 20M parameters (512 wide, 5 layers, 8 x 256 tokens), rank 32, float32.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora_train.method.fast_path import HashMasks, share_inputs
from relora_train.method.wrap import apply_relora
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.model import attend_without_mask, next_token_loss

KINDS = ("eager", "eager, hashed masks", "compiled", "full rank", "full rank, compiled")


def model_of() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=5, num_attention_heads=8, vocab_size=8192,
        max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).float()
    attend_without_mask(model)
    return model


def built(kind: str, dropout: float) -> tuple[nn.Module, HashMasks | None]:
    model = model_of()
    if not kind.startswith("full"):
        apply_relora(model, rank=32, alpha=32, dropout=dropout, target_modules=None, seed=0)
    if kind.startswith("eager"):
        share_inputs(model, optimizer=torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    if kind.endswith("compiled"):
        compile_blocks(model)
    return model.train(), HashMasks(model) if kind in ("eager, hashed masks", "compiled") else None


def seconds(model: nn.Module, masks: HashMasks | None, tokens: torch.Tensor) -> float:
    if masks is not None:
        masks.draw()
    started = time.perf_counter()
    (next_token_loss(model, tokens) / tokens.numel()).backward()
    taken = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(8192, (8, 257))
    variants = {kind: built(kind, options.dropout) for kind in KINDS}
    first = {kind: seconds(*variant, tokens) for kind, variant in variants.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(options.rounds):
        for kind in KINDS if round_ % 2 == 0 else KINDS[::-1]:
            taken[kind].append(seconds(*variants[kind], tokens))
    for kind, times in taken.items():
        ratio = statistics.median(own / eager for own, eager in zip(times, taken["eager"], strict=True))
        line = f"{kind:22s} {1000 * statistics.median(times):6.0f} ms, {ratio:.2f} of eager; first {first[kind]:.1f} s"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
