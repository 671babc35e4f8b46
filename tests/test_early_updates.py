"""Updates inside the backward pass: the weights of an update after it, and one gradient at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import CPU, metrics_of, run_all, stage_request, tiny_profile

from relora_train.errors import ConfigError
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile
from relora_train.training.build import prepare_stage

FULL: dict[str, Any] = {"method": "full", "schedule": {"warm_start_steps": 0, "cycles": 1, "cycle_length": 6}}


def optimizer(kind: str, **changes: Any) -> dict[str, Any]:
    subspace = {"subspace_rank": 4, "subspace_steps": 2} if kind == "fira" else {}
    return {"kind": kind, "max_grad_norm": "off", "weight_decay": 0.1, **subspace, **changes}


@pytest.mark.parametrize("kind", ["adamw", "factored", "fira"])
def test_weights_state_and_norms_are_those_of_updates_after_the_pass(kind: str, dataset: Path, tmp_path: Path):
    """With embedding and head one matrix, whose gradient is whole only when the pass ends."""
    made = [
        run_all(
            tiny_profile(**FULL, model={"tie_word_embeddings": True}, optimizer=optimizer(kind, in_backward=early)),
            dataset,
            tmp_path / str(early),
        )["full-1"]
        for early in (False, True)
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes(), name
    norms = [[record["grad_norm"] for record in metrics_of(checkpoint)] for checkpoint in made]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[0][-1] > 0
    losses = [[record["loss"] for record in metrics_of(checkpoint)] for checkpoint in made]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("early", [False, True])
def test_a_gradient_is_freed_before_the_next_is_made(early: bool, dataset: Path, tmp_path: Path):
    profile = tiny_profile(**FULL, optimizer=optimizer("factored", in_backward=early))
    training = prepare_stage(stage_request(profile, "full-1", dataset, tmp_path / "out"), CPU)
    alive: list[int] = []
    for parameter in training.trainable:  # called after the hook that updates
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in training.trainable))
        )
    before = [parameter.detach().clone() for parameter in training.trainable]
    training.update(2)  # the first has a rate of 0
    assert len(alive) == len(before) and alive == ([0] * len(alive) if early else list(range(1, len(alive) + 1)))
    assert not any(torch.equal(a, b) for a, b in zip(before, training.trainable, strict=True))


@pytest.mark.parametrize("refused", [
    ["optimizer.max_grad_norm=1.0"], ["method=relora"], ["method=lora"], ["batch.micro_sequences=1"],
    ["launch.nproc_per_node=2"], ["launch.nproc_per_node=gpu", "launch.device=auto"], ["precision.dtype=pure-bfloat16"],
])  # fmt: skip
def test_what_needs_all_gradients_at_once_is_refused(refused: list[str]):
    sets = ["method=full", "optimizer.in_backward=true", "optimizer.max_grad_norm=off"]
    assert load_profile("smoke", sets).optimizer.max_grad_norm is None
    with pytest.raises(ConfigError, match=r"optimizer\.in_backward moves each parameter once its gradient is made"):
        load_profile("smoke", [*sets, *refused])


def test_a_plan_counts_the_largest_matrix_alone():
    for tokens, largest in ((257, 32 * 48), (4096, 4096 * 32)):
        early, late = (
            plan(
                tiny_profile(**FULL, tokenizer={"vocab_size": tokens}, optimizer=optimizer("adamw", in_backward=on))
            ).full
            for on in (True, False)
        )
        assert early is not None and late is not None
        assert early.memory.gradients == 4 * max(largest, tokens * 32)
        assert late.memory.gradients == 4 * late.trainable_parameters
        assert early.memory.optimizer == late.memory.optimizer
