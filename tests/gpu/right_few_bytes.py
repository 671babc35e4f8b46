"""A12: frozen weights in int8 and nf4 and Adam's moments in 8 bits are on a device what they are on a CPU."""

import importlib.util

import torch
from check_run import Run, SkippedError
from right_numbers import relative
from stages import CPU, release, tiny_stage, updates_of

from relora_train.method.frozen import QUANTIZED, dequantize, quantize

SHAPE = (4096, 1088)


def few_bytes(run: Run) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for kind in QUANTIZED:
        codes, scales = quantize(weight, kind)
        there, there_scales = quantize(weight.to(run.device), kind)
        run.require(f"{kind}: the codes of a CPU", torch.equal(there.cpu(), codes))
        for dtype in (torch.float32, torch.bfloat16):
            read = dequantize(there, there_scales, SHAPE, dtype)
            error = relative(read.cpu().float(), dequantize(codes, scales, SHAPE, torch.float32))
            run.below(f"{kind} in {dtype} beside a CPU's", error, 1e-6 if dtype == torch.float32 else 4e-3)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SkippedError("bitsandbytes is not installed: no moments in 8 bits, and nf4 was read by plain torch")
    for kind in QUANTIZED:
        losses = {}
        for device in (CPU, run.device):
            settings = {"precision": {"frozen": kind}, "optimizer": {"state": "8bit"}, "relora": {"dropout": 0.0}}
            training = tiny_stage(run, "cycle-1", device=device, **settings)
            losses[device] = [float(training.update(step)[0]) for step in updates_of(training)][:5]
            del training
            release(run)
        run.record(**{f"losses, {kind}": losses[run.device]})
        worst = max(abs(a - b) / b for a, b in zip(losses[run.device], losses[CPU], strict=True))
        run.below(f"{kind} and moments in 8 bits: 5 losses beside a CPU's", worst, 1e-2)
