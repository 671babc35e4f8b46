"""One rank of those that do all work of a run: `python -m relora_train.training.kept_ranks --request FILE`.

The flow names each request to the first rank on its standard input. The others, those of other machines too, get it
from that rank in the group that they share.
"""

import json
import os
from pathlib import Path

from relora_train.distributed import process_group
from relora_train.process import NO_MORE, SERVED, TAKEN, Emit, Works, parent_pipe, serve_request
from relora_train.training.evaluate import evaluate_checkpoint
from relora_train.training.requests import EvaluationRequest, RanksRequest, StageRequest
from relora_train.training.torch_settings import release_memory
from relora_train.training.trainer import run_stage

_WORD_SECONDS = 60.0
"""An idle first rank sends the others a word this often: after distributed.SLOW without one they take it as lost."""


def serve_as_rank(asked: RanksRequest, emit: Emit) -> None:
    """Do what each request asks, one after the other, until the flow says NO_MORE or one of them fails.

    If a rank's parent ends while it is idle, it exits at once.
    """
    works: Works = {StageRequest: run_stage, EvaluationRequest: evaluate_checkpoint}
    kinds = {kind.__name__: kind for kind in works}
    with process_group(asked.device) as ranks:
        while True:
            parent_pipe().on_end(lambda: os._exit(1))  # nothing is lost; leaving in order would wait for the others
            text = ""
            while not text:
                text = ranks.share_text(_next_text() if ranks.is_first else None)
            ranks.barrier()  # if one has died idle, this fails before the request counts as taken
            if ranks.is_first:
                emit(TAKEN)
            if text == NO_MORE:
                break
            name, content = json.loads(text)
            request = kinds[name].model_validate_json(content)
            if isinstance(request, StageRequest) and not ranks.is_first and os.environ["LOCAL_RANK"] == "0":
                emit("joined", run_id=request.run_id, stage=request.stage.name, ranks=ranks.world_size)
            works[kinds[name]](request, emit)
            del request
            release_memory()
            if ranks.is_first:
                emit(SERVED)
        parent_pipe().on_end(None)
    if ranks.is_first:
        emit(SERVED)


def _next_text() -> str:
    """Wait for the request that the flow names next; return its kind and content, NO_MORE, or nothing after a while."""
    line = parent_pipe().next_line(_WORD_SECONDS)
    if line in ("", NO_MORE):
        return line
    name, path = json.loads(line)
    return json.dumps([name, Path(path).read_text()])


if __name__ == "__main__":
    serve_request(RanksRequest, serve_as_rank)
