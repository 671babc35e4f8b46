"""The trainer, of which the second rank fails in its fifth update: `python -m failing_rank --request FILE`."""

import os
import signal
from typing import Any

import torch

from relora_train.process import Emit, serve_request
from relora_train.training import trainer
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining


def fail(request: StageRequest, emit: Emit) -> None:
    update = StageTraining.update

    def update_or_fail(training: StageTraining, step: int) -> Any:
        if step == 5 and training.ranks.rank == 1:
            if os.environ["FAILS_BY"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            torch.empty(1 << 46, device=training.ranks.device)  # more than there is: the allocator's own error
        return update(training, step)

    StageTraining.update = update_or_fail  # type: ignore[method-assign]
    trainer.run_stage(request, emit)


if __name__ == "__main__":
    serve_request(StageRequest, fail)
