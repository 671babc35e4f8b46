"""The GPUs of this machine, and what a profile asks of them. Imports torch only when there is something to ask it."""

import logging
import os
import warnings
from functools import cache
from pathlib import Path

from relora_train.errors import DeviceError
from relora_train.settings.method import DropoutMask
from relora_train.settings.profile import Profile
from relora_train.settings.running import LaunchConfig

_LOGGER = logging.getLogger(__name__)
_VISIBLE, _GIVEN = "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"
_DEVICE_FILES = Path("/dev")


def check_devices(launch: LaunchConfig) -> None:
    """Raise DeviceError if this machine's GPUs cannot take the ranks that a profile starts on it.

    Covers a GPU that is asked for and not there, 'gpu' ranks without one, and more ranks than GPUs: each rank needs a
    GPU of its own. Ranks of other machines are checked there.
    """
    ranks = launch.nproc_per_node
    if launch.device == "cpu" or (launch.device == "auto" and ranks == 1):
        return
    gpus = usable_gpus()
    if not gpus and launch.device == "cuda":
        raise DeviceError(
            f"launch.device is 'cuda', but torch sees no GPU here: {_why_no_gpu()}. Set launch.device to 'cpu' or "
            "'auto' to train on the CPU."
        )
    if not gpus and ranks == "gpu":
        raise DeviceError(
            f"launch.nproc_per_node is 'gpu', a rank for each GPU, but torch sees none here: {_why_no_gpu()}. Set "
            "launch.nproc_per_node to a number to train on the CPU."
        )
    if gpus and ranks != "gpu" and ranks > gpus:
        visible = f" ({_VISIBLE} is {os.environ[_VISIBLE]!r})" if _VISIBLE in os.environ else ""
        raise DeviceError(
            f"launch.nproc_per_node is {ranks}, but torch sees {gpus} GPU{'s' * (gpus > 1)} on this machine{visible}, "
            "and each rank needs one of its own. Set launch.nproc_per_node to 'gpu' or a smaller number, or "
            "launch.device to 'cpu'."
        )


def takes_gpu(launch: LaunchConfig) -> bool:
    """Return True if ranks that a profile starts on this machine compute on a GPU; torch is asked where one is seen."""
    if launch.device != "auto":
        return launch.device == "cuda"
    return any([*_DEVICE_FILES.glob("nvidia[0-9]*"), *_DEVICE_FILES.glob("dxg")]) and usable_gpus() > 0


def sharing_ranks(launch: LaunchConfig) -> LaunchConfig:
    """Return the ranks of this machine alone that share a model as a profile's do: no more than it has GPUs, if any."""
    if launch.sharding == "none":
        return LaunchConfig()
    gpus = usable_gpus() if takes_gpu(launch) else 0
    wanted = gpus if launch.nproc_per_node == "gpu" else launch.nproc_per_node
    return LaunchConfig(nproc_per_node=max(1, min(wanted, gpus or wanted)))


def dropout_mask_here(profile: Profile) -> DropoutMask:
    """Return the kind of mask with which a run of the profile begins on this machine: hashed if it compiles."""
    relora, launch = profile.relora, profile.launch
    if relora.dropout_mask != "auto":
        return relora.dropout_mask
    compiles = launch.compiles_on("cuda" if takes_gpu(launch) else "cpu")
    return "hash" if compiles and relora.dropout > 0 and profile.method != "full" else "stream"


def usable_gpus() -> int:
    """Return how many GPUs torch can use."""
    return _asked_of_torch()[0]


def _why_no_gpu() -> str:
    """Return the reason as far as torch, the environment or the driver tell it."""
    import torch

    _, said = _asked_of_torch()
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    if said:
        return said
    if _VISIBLE in os.environ:
        return f"{_VISIBLE} is {os.environ[_VISIBLE]!r}"
    return "no driver answers"


@cache  # once a process
def warn_of_unused_gpu() -> None:
    """Warn that device 'auto' means the CPU although this machine, or what started the container, speaks of a GPU.

    Not where CUDA_VISIBLE_DEVICES hides it on purpose.
    """
    files = sorted(_DEVICE_FILES.glob("nvidia[0-9]*"))
    given = os.environ.get(_GIVEN, "none")
    sign = str(files[0]) if files else None if given in ("", "none", "void") else f"{_GIVEN}={given}"
    if sign is None or usable_gpus() or os.environ.get(_VISIBLE) in ("", "-1"):
        return
    _LOGGER.warning(
        "Training on the CPU, though there is an NVIDIA device here (%s): torch cannot use it, since %s. Install the "
        "build of torch that fits the driver, or a newer driver. launch.device = 'cuda' stops a run instead, 'cpu' "
        "silences this.",
        sign, _why_no_gpu(),
    )  # fmt: skip


@cache  # torch gives its reason once a process
def _asked_of_torch() -> tuple[int, str]:
    """Return the number of GPUs, and what torch says when it cannot use them, such as a driver older than its CUDA."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return gpus, " ".join(str(warning.message).split(" (Triggered internally")[0].strip(". ") for warning in said)
