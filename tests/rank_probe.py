"""The trainer under a recorder: `python -m rank_probe --request FILE` trains the stage as the trainer does and
leaves rank-<r>.json beside the output: what this rank drew, held and sent.
"""

import hashlib
import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from relora_train.distributed import Ranks, full_tensor
from relora_train.method import low_rank
from relora_train.process import Emit, serve_request
from relora_train.training import end_of_cycle, trainer
from relora_train.training.models.base import Objective
from relora_train.training.optimizer import optimizer_state_by_name
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(full_tensor(tensor).detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def probe(request: StageRequest, emit: Emit) -> None:
    seen: dict[str, Any] = {"dropout_masks": [], "messages": [], "scattered": [], "limits": [], "committed": False}
    seen["built"] = 0
    kept, all_reduce = low_rank._kept, dist.all_reduce
    update, finish_cycle = StageTraining.update, end_of_cycle.finish_cycle

    def recorded_mask(*arguments: Any) -> Tensor | None:
        mask = kept(*arguments)
        if mask is not None:
            seen["dropout_masks"][-1].append(digest(mask))
        return mask

    def recorded_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if seen["messages"]:
            seen["messages"][-1].append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    scatter = dist.reduce_scatter_single

    def recorded_scatter(*args: Any, **kwargs: Any) -> Any:
        seen["scattered"][-1] += 1
        return scatter(*args, **kwargs)

    dist.reduce_scatter_single = recorded_scatter
    build_model = Objective.build_model

    def recorded_build(*args: Any) -> Any:
        seen["built"] += 1
        return build_model(*args)

    Objective.build_model = recorded_build

    def recorded_update(training: StageTraining, step: int) -> tuple[Tensor, Tensor]:
        seen["dropout_masks"].append([])
        seen["messages"].append([])
        seen["scattered"].append(0)
        seen["gradient_entries"] = sum(p.numel() + 1 for p in training.trainable)  # and who made it
        return update(training, step)

    def recorded_finish(training: StageTraining, *args: Any) -> dict[str, Any]:
        merge_report = finish_cycle(training, *args)
        seen["tensors"] = {name: digest(p) for name, p in training.model.named_parameters()}
        state = optimizer_state_by_name(training.optimizer, training.model)
        seen["state"] = {f"{n}.{key}": digest(v) for n, entries in state.items() for key, v in entries.items()}
        seen["rank"] = training.ranks.rank
        return merge_report

    low_rank._kept, dist.all_reduce = recorded_mask, recorded_all_reduce
    StageTraining.update, end_of_cycle.finish_cycle = recorded_update, recorded_finish

    def recorded_limit(ranks: Ranks, limit: timedelta) -> None:
        seen["limits"].append([len(seen["messages"]), limit.total_seconds()])

    Ranks.expect_answers_within = recorded_limit
    commit_stage = end_of_cycle.commit_stage

    def recorded_commit(*args: Any, **kwargs: Any) -> Any:
        seen["committed"] = True
        return commit_stage(*args, **kwargs)

    end_of_cycle.commit_stage = recorded_commit
    trainer.run_stage(request, emit)
    (request.output_directory.parent / f"rank-{seen['rank']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    serve_request(StageRequest, probe)
