"""This library's step beside plain transformers, the paper's ReLoRA and PEFT, on the same model, tokens and AdamW.

    python tests/benchmarks/step.py [PROFILE] [--set KEY=VALUE] [--rounds 5] [--steps 2]

full     eager transformers at full rank, torch's default AdamW, all logits
paper    ReLoRA as the paper's code writes it
peft     LoRA of the peft library
Every arm is eager, or has its blocks compiled: --set launch.compile=true.
Every arm does one forward pass an update in a process of its own, and the arms take turns.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from relora_train.cli.bench import about_this_machine, bench_view, record_of
from relora_train.cli.output import console_for_people, show
from relora_train.experiments.bench import FULL, RELORA, StepRequest, measure, step_requests
from relora_train.settings.load import load_profile

OTHERS = ("full", "paper", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profile", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    profile = load_profile(options.profile, ["launch.compile=false", *options.set])
    requests = arms(step_requests(profile, updates=1 + options.rounds * options.steps))
    worker = (__file__, "--worker")
    results = measure(requests, rounds=options.rounds, steps=options.steps, what=options.profile, worker=worker)
    record = {**about_this_machine(), "profiles": {options.profile: record_of(results)}}
    show(console_for_people(), bench_view(record))


def arms(ours: dict[str, StepRequest]) -> dict[str, StepRequest]:
    """Return the others' arms before ours. A low-rank step of theirs takes 4ND + 6NrS FLOPs a layer."""
    from relora_train.training.models.registry import model_shape
    from relora_train.training.models.shape import model_flops_per_token, wrapped_layers

    full = ours[FULL]
    profile = full.profile
    shape, rank = model_shape(profile), profile.relora.rank
    wrapped = wrapped_layers(shape, target_modules=profile.relora.target_modules, rank=rank)
    counts = {(linear,): 4.0 * linear.weights + 6.0 * rank * linear.sides for linear in wrapped}
    low_rank = model_flops_per_token(shape, sequence_length=profile.batch.sequence_length, wrapped=counts)
    flops = {"full": full.flops_per_token, "paper": low_rank, "peft": low_rank}
    others = {arm: full.model_copy(update={"arm": arm, "flops_per_token": flops[arm]}) for arm in OTHERS}
    return {**others, FULL: full, RELORA: ours[RELORA]}


def work() -> None:
    """Serve the rounds of one arm."""
    from relora_train.experiments import bench_worker

    bench_worker.main(build)


def build(request: StepRequest, training: Any) -> Any:
    from relora_train.experiments.bench_worker import own_step

    if request.arm not in OTHERS:
        return own_step(request, training)
    return eager_step(request, training, {"full": lambda model, _: model, "paper": paper, "peft": peft}[request.arm])


def eager_step(request: StepRequest, training: Any, wrap: Callable[[Any, StepRequest], Any]) -> Any:
    """Return the step that everyone writes: the model's own loss over all logits, torch's default AdamW, clipping."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from relora_train.experiments.bench_worker import BuiltStep

    profile = request.profile
    model = wrap(training.model, request).to(training.ranks.device)
    if profile.precision.dtype != "float32":
        model.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = profile.optimizer
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    tokens = training.batches.batch(0, last=True)

    def step() -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return BuiltStep(model, optimizer, step)


def paper(model: Any, request: StepRequest) -> Any:
    """As peft_pretraining/relora.py: three products, dropout stored by autograd, the sum out of place."""
    from torch import nn
    from torch.nn import functional as F

    from relora_train.method.wrap import check_targets

    relora = request.profile.relora

    class PaperLinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            make = partial(nn.Linear, bias=False, device=linear.weight.device)
            self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
            self.lora_A, self.lora_B = make(linear.in_features, relora.rank), make(relora.rank, linear.out_features)
            nn.init.zeros_(self.lora_B.weight)
            self.lora_dropout = nn.Dropout(relora.dropout)

        def forward(self, x: Any) -> Any:
            low_rank = self.lora_B(self.lora_A(self.lora_dropout(x)))
            return F.linear(x, self.weight) + low_rank * (relora.alpha / relora.rank)

    for name in check_targets(model, relora.target_modules, rank=relora.rank):
        model.set_submodule(name, PaperLinear(cast(nn.Linear, model.get_submodule(name))))
    return model


def peft(model: Any, request: StepRequest) -> Any:
    """As LoRA of peft; like ours it trains all that is not wrapped."""
    from peft import LoraConfig, get_peft_model

    from relora_train.method.wrap import check_targets

    relora = request.profile.relora
    targets = check_targets(model, relora.target_modules, rank=relora.rank)
    config = LoraConfig(
        r=relora.rank, lora_alpha=relora.alpha, lora_dropout=relora.dropout, target_modules=targets, bias="none"
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or ".base_layer." not in name)
    return adapted


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    work() if "--worker" in sys.argv else main()
