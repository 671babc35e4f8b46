"""A0 to A2: what this machine is, an update beside a CPU's, and the loss that is logged under bfloat16."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import torch
from check_run import Run
from stages import CPU, stop_sharing, tiny_stage
from torch import Tensor
from torch.nn import functional as F

from relora_train.devices import usable_gpus
from relora_train.training.models.chunked_loss import chunked_cross_entropy
from relora_train.training.precision import Product, product_error
from relora_train.training.step import StageTraining


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the error over the norm of the exact values."""
    exact = exact.double()
    return float((found.double().to(exact.device) - exact).norm() / exact.norm().clamp_min(1e-300))


# --- A0


def environment(run: Run) -> None:
    shm, root = shutil.disk_usage("/dev/shm"), shutil.disk_usage(run.scratch)
    memory = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
    run.record(
        torch=torch.__version__,
        cuda_of_torch=torch.version.cuda,
        cores=os.cpu_count(),
        cores_allowed=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory_gb={name: int(memory[name]) / 1e6 for name in ("MemTotal", "MemAvailable") if name in memory},
        shm_gb=shm.total / 1e9,
        scratch_free_gb=root.free / 1e9,
        c_compiler=shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc"),
        cxx_compiler=shutil.which(os.environ.get("CXX", "g++")),
        triton=triton_version(),
        usable_gpus=usable_gpus(),
    )
    if not usable_gpus():
        run.record(why_no_gpu=said_without_gpu())
        run.require("torch can use a GPU", False, device_only=True)
        return
    properties = torch.cuda.get_device_properties(0)
    driver = nvidia_smi()
    speaks, built = (version_tuple(text) for text in (driver.get("cuda_version", ""), str(torch.version.cuda)))
    run.record(
        gpu=properties.name,
        gpus=torch.cuda.device_count(),
        capability=torch.cuda.get_device_capability(),
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        nccl=nccl_version(),
        cudnn=torch.backends.cudnn.version(),
        nvidia_smi=driver,
        free_and_total=torch.cuda.mem_get_info(),
    )
    # Within one major version an older driver runs a newer toolkit.
    run.require(f"the driver's CUDA {speaks} is of torch's {built}", not speaks or speaks[0] >= built[0])
    ones = torch.ones(64, 64, device=run.device)
    run.require("the device multiplies", float((ones @ ones).sum()) == 64**3)


def said_without_gpu() -> str:
    """Return what torch says when it is made to use one."""
    try:
        return f"none: {torch.zeros(1, device='cuda')}"
    except (RuntimeError, AssertionError) as error:
        return str(error)[:500]


def nccl_version() -> str:
    try:
        from torch.cuda import nccl

        return str(nccl.version())
    except Exception as error:  # a build without it
        return f"{type(error).__name__}: {error}"


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def nvidia_smi() -> dict[str, str]:
    """Return what the driver tells of itself, ECC, clocks, power and throttling. Nothing is changed."""
    said = command("nvidia-smi", "-q", "-x")
    try:
        tree = ElementTree.fromstring(said)
    except ElementTree.ParseError:
        return {"said": said[:200]}
    wanted = re.compile("driver_version|cuda_version|current_ecc|current_mig|performance_state|clocks_event|throttle")
    wanted_too = re.compile(r"(power_draw|current_power_limit|gpu_temp|sm_clock|graphics_clock|mem_clock|persistence)")
    found: dict[str, str] = {}
    for element in tree.iter():
        text = (element.text or "").strip()
        if text and text != "Not Active" and (wanted.search(element.tag) or wanted_too.match(element.tag)):
            found.setdefault(element.tag, text)
    return found


def command(*arguments: str) -> str:
    try:
        return subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


# --- A1

KINDS: dict[str, tuple[str, bool]] = {
    "full rank": ("warm-start", False),
    "low rank": ("cycle-1", False),
    "low rank, reference": ("cycle-1", True),
}


def same_update(run: Run) -> None:
    """Five updates of a CPU and of the device, then one from the very same weights, whose gradients are compared."""
    for kind, (stage, by_reference) in KINDS.items():
        sections = {"relora": {"dropout": 0.0}, "optimizer": {"learning_rate": 1e-3}}
        pair = [tiny_stage(run, stage, device=device, **sections) for device in (CPU, run.device)]
        if by_reference:
            for training in pair:
                stop_sharing(training.model)
        losses = [five_losses(training) for training in pair]
        run.record(**{f"losses, {kind}": losses, f"products, {kind}": sorted(set(pair[1].products.values()))})
        for a, b in zip(*losses, strict=True):
            run.require(f"loss, {kind}: {b} against {a}", abs(a - b) <= 1e-5 * abs(a))
        compare_gradients(run, kind, *pair)
    tf32 = {
        precision: product_error([Product(512, 1024, 512)], run.device, precision) for precision in ("highest", "high")
    }
    run.record(product_error=tf32, precision_now=torch.get_float32_matmul_precision())
    run.below("error of float32 products", tf32["highest"], 1e-5)
    run.require("'high' rounds more, so 'highest' is not TF32", tf32["high"] > 1e-5, device_only=True)


def five_losses(training: StageTraining) -> list[float]:
    first, found = training.stage.first_step, []
    for step in range(first, first + 5):
        found.append(float(training.update(step)[0]))
        training.optimizer.zero_grad(set_to_none=True)
    return found


def compare_gradients(run: Run, kind: str, ours: StageTraining, theirs: StageTraining) -> None:
    theirs.model.load_state_dict(ours.model.state_dict())
    step = ours.stage.first_step + 5
    losses = [float(training.update(step)[0]) for training in (ours, theirs)]
    run.require(f"sixth loss, {kind}: {losses}", math.isclose(*losses, rel_tol=1e-5))
    errors = {
        name: relative(b.grad, a.grad)
        for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    }
    worst = max(errors, key=lambda name: errors[name])
    run.record(**{f"gradients compared, {kind}": len(errors), f"worst gradient, {kind}": worst})
    run.below(f"error of gradients, {kind}", errors[worst], 1e-4)


# --- A2


def logged_loss(run: Run) -> None:
    shapes = [(8_192, 32_100), (19_200, 32_100), (8_192, 128_256), (19_200, 128_256)]
    shapes, width = ([(96, 300), (200, 700)], 64) if run.dry else (shapes, 768)
    for rows, classes in shapes:
        for target in (10.4, 5.5, 3.8):
            for share in (0.0, 0.1):
                name = f"{rows} x {classes}, loss near {target}" + (", one token in a tenth" if share else "")
                measure_loss(run, name, rows, classes, width, target, share)


def measure_loss(run: Run, name: str, rows: int, classes: int, width: int, target: float, share: float) -> None:
    hidden, weight, answers = loss_inputs(rows, classes, width, target, share, run.device)
    exact_loss, exact_hidden, exact_weight = exact_cross_entropy(hidden, weight, answers)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, None, answers)
    loss.backward()
    errors = {
        "loss": abs(float(loss) - exact_loss) / exact_loss,
        "gradient of hidden": relative(hidden.grad, exact_hidden),
        "gradient of head": relative(weight.grad, exact_weight),
    }
    run.record(**{name: {"mean loss": exact_loss / rows, **errors}})
    run.require(f"{name}: loss off by {errors['loss']:.2g}", errors["loss"] < 1e-3)
    for which in ("gradient of hidden", "gradient of head"):
        run.require(f"{name}: {which} off by {errors[which]:.2g}", errors[which] < 4e-3)


def loss_inputs(
    rows: int, classes: int, width: int, target: float, share: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and answers in bfloat16 whose mean loss is near the target, or that of guessing.

    share: of the rows, one after the other, that all have the same answer.
    """
    generator = torch.Generator(device).manual_seed(rows + classes)  # a CPU takes seconds for 100 million
    weight = F.normalize(torch.randn(classes, width, generator=generator, device=device), dim=1)
    answers = torch.randint(classes, (rows,), generator=generator, device=device)
    answers[torch.rand(rows, generator=generator, device=device) < share] = classes // 2
    hidden = torch.randn(rows, width, generator=generator, device=device) / math.sqrt(width)
    hidden += max(math.log(classes) - target, 0.0) * weight[answers]
    return hidden.bfloat16(), weight.bfloat16(), answers


def exact_cross_entropy(hidden: Tensor, weight: Tensor, answers: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the summed loss and both gradients in float64, a thousand rows at a time.

    Where float64 products take minutes (consumer cards), these are in float32 of exact bfloat16 numbers: 1e-6 off.
    """
    dtype = torch.float64 if has_fast_float64(hidden.device) else torch.float32
    w = weight.to(dtype)
    total, grad_weight = 0.0, torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    grad_hidden = []
    for x, right in zip(torch.split(hidden, 1024), torch.split(answers, 1024), strict=True):
        logs = torch.log_softmax((x.to(dtype) @ w.T).double(), dim=1)
        total -= float(logs.gather(1, right[:, None]).sum())
        gradient = logs.exp_()
        gradient[torch.arange(len(right), device=right.device), right] -= 1
        gradient = gradient.to(dtype)
        grad_hidden.append((gradient @ w).double())
        grad_weight += gradient.T @ x.to(dtype)
    return total, torch.cat(grad_hidden), grad_weight


def has_fast_float64(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) in ((7, 0), (8, 0), (9, 0), (10, 0))
