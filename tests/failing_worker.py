"""A worker process, or the second of two ranks, that ends in the way its request names: `python -m failing_worker`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from relora_train.errors import DeviceError, DivergedError
from relora_train.process import Emit, serve_request
from relora_train.settings.base import FrozenConfig

if TYPE_CHECKING:
    from relora_train.distributed import Ranks


class FailingRequest(FrozenConfig):
    kind: str


class OutOfMemoryError(RuntimeError):
    """Named as torch's; matched by name because the process module imports no torch."""


def fail(request: FailingRequest, emit: Emit) -> None:
    match request.kind:
        case "exception":
            raise RuntimeError("something broke")
        case "Python error":
            raise KeyError("a setting")
        case "missing package":
            import a_package_that_is_not_installed  # noqa: F401
        case "shared memory":
            raise RuntimeError("Error while creating shared memory segment /dev/shm/nccl-1 (No space left on device)")
        case "disk":
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        case "exit status":
            os._exit(3)
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGSEGV":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "out of device memory":
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        case "driver out of memory":
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        case "cublas out of memory":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        case "CUDA fault":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "no device":
            raise DeviceError("no such device")
        case "diverged":
            raise DivergedError("the loss is nan")
        case "rank out of memory" | "rank hangs":
            from relora_train.distributed import process_group

            with process_group("cpu") as ranks:
                fail_as_second(request, ranks)
    sys.exit(0)


def fail_as_second(request: FailingRequest, ranks: Ranks) -> None:
    """The first rank waits for the second, which does not come."""
    import torch.distributed as dist

    dist.destroy_process_group = lambda: time.sleep(3600)  # as NCCL's waits for the others
    ranks.barrier()
    if ranks.is_first:
        ranks.expect_answers_within(timedelta(seconds=3 if request.kind == "rank hangs" else 3600))
        ranks.barrier()
    elif request.kind == "rank hangs":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torch's launcher waits half a minute for it
        time.sleep(3600)
    else:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


if __name__ == "__main__":
    serve_request(FailingRequest, fail)
