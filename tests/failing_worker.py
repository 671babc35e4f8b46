"""A worker process that ends in the way its request names: `python -m failing_worker --request FILE`."""

from __future__ import annotations

import os
import signal
import sys

from relora_train.errors import DeviceError, DivergedError
from relora_train.process import Emit, serve_request
from relora_train.settings.base import FrozenConfig


class FailingRequest(FrozenConfig):
    kind: str


class OutOfMemoryError(RuntimeError):
    """Named as torch's; matched by name because the process module imports no torch."""


def fail(request: FailingRequest, emit: Emit) -> None:
    match request.kind:
        case "exception":
            raise ValueError("something broke")
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
    sys.exit(0)


if __name__ == "__main__":
    serve_request(FailingRequest, fail)
