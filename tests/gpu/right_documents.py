"""A13: attention inside documents by blocks is on a device what a mask of all pairs makes of it, and what it costs."""

import torch
from check_run import Run
from right_numbers import relative
from timing import timed
from torch import Tensor, nn

from relora_train.training.models.documents import attend_in_documents, flex_attention_works, mask_of_documents

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def documents_apart(run: Run) -> None:
    run.require("flex attention works", flex_attention_works(run.device), device_only=True)
    rows, heads, length, size = (2, 2, 128, 16) if run.dry else (8, 32, 2048, 64)
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(length).expand(rows, length).clone()
    for row in places:  # documents of a few hundred tokens
        for begin in sorted(torch.randint(1, length, (length // 256 + 1,), generator=generator).tolist()):
            row[begin:] = torch.arange(length - begin)
    places = places.to(run.device)
    module = nn.Module()
    module.is_causal = True
    for dtype, limit in LIMITS.items():
        shape = (rows, heads, length, size)
        given = [torch.randn(shape, generator=generator).to(run.device, dtype).requires_grad_() for _ in range(3)]
        gradient = torch.randn(rows, length, heads, size, generator=generator).to(run.device, dtype)

        def both(mask: object, given: list[Tensor] = given, gradient: Tensor = gradient) -> tuple[Tensor, ...]:
            out = attend_in_documents(module, *given, mask, scaling=size**-0.5)[0]
            return (out, *torch.autograd.grad(out, given, gradient))

        masks = {
            "all pairs": mask_of_documents(places, by_blocks=False),
            "blocks": mask_of_documents(places, by_blocks=not run.dry),
            "documents joined": None,
        }
        exact = both(masks["all pairs"])
        worst = max(relative(a, b) for a, b in zip(both(masks["blocks"]), exact, strict=True))
        run.below(f"blocks beside all pairs in {dtype}", worst, limit)
        for name, mask in masks.items():
            run.record(**{f"forward and backward, {name}, {dtype}": timed(run, lambda m=mask: both(m)).as_record()})
    made = timed(run, lambda: mask_of_documents(places, by_blocks=True))
    run.record(**{"making the blocks of a batch": made.as_record()})
