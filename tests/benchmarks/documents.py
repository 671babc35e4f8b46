"""The CPU time of a training step with batch.documents "mask" over "join", in turn, on the same tokens.

    python tests/benchmarks/documents.py [--threads 1] [--rounds 7] [--mean 300]

A Llama of 20M parameters (512 wide, 5 layers, 8 x 256 tokens), full rank, forward and backward, eager and on a CPU.
Documents have geometric lengths of this mean.
"""

import argparse
import statistics
import time

import torch
from compiled import model_of
from torch import nn

from relora_train.training.models.causal_lm import NextTokenLoss

END = 0


def seconds(model: nn.Module, loss_function: NextTokenLoss, tokens: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    (loss_function.loss(tokens) / loss_function.terms(tokens)).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mean", type=int, default=300)
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 256))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, length = options.shape
    tokens = torch.randint(1, 8192, (rows, length + 1))
    tokens[torch.rand(tokens.shape) < 1 / options.mean] = END
    joined, masked = model_of().train(), model_of().train()
    arms = [(joined, NextTokenLoss(joined)), (masked, NextTokenLoss(masked, END))]
    taken: list[list[float]] = [[], []]
    for round_ in range(options.rounds + 1):
        for arm in (0, 1) if round_ % 2 == 0 else (1, 0):
            spent = seconds(*arms[arm], tokens)
            if round_:  # the first warms up
                taken[arm].append(spent)
    ratios = sorted(mask / join for join, mask in zip(*taken, strict=True))
    join, mask = (1000 * statistics.median(times) for times in taken)
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f}) of join"
    print(f"join {join:.0f} ms, mask {mask:.0f} ms, {spread}")  # noqa: T201


if __name__ == "__main__":
    main()
