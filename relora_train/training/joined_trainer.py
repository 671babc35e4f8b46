"""The trainer's ranks on the machines beside the flow's: they have no request of their own and get it from the first
rank, in the group that they join.
"""

from relora_train.distributed import process_group
from relora_train.method.stages import is_last
from relora_train.process import Emit, StopRequest, serve_request
from relora_train.training.requests import JoinRequest, StageRequest
from relora_train.training.trainer import run_as_rank


def join_stage(joining: JoinRequest, emit: Emit) -> None:
    """Train along until the stage is committed by the first rank, or fails."""
    with StopRequest() as stop, process_group(joining.device) as ranks:
        request = StageRequest.model_validate_json(ranks.share_text())
        emit(
            "joined",
            run_id=request.run_id,
            stage=request.stage.name,
            rank=ranks.rank,
            ranks=ranks.world_size,
            last=is_last(request.profile, request.stage),
        )
        run_as_rank(request, ranks, stop, emit)


if __name__ == "__main__":
    serve_request(JoinRequest, join_stage)
