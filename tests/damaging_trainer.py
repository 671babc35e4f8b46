"""The trainer on a disk that changes one bit of every checkpoint: `python -m damaging_trainer --request FILE`."""

from pathlib import Path

from relora_train.process import serve_request
from relora_train.training import commit
from relora_train.training.requests import StageRequest
from relora_train.training.step import StageTraining
from relora_train.training.trainer import run_stage

if __name__ == "__main__":
    from test_read_back import flip_last_bit

    save = commit.save_sharded

    def damaging(training: StageTraining, directory: Path | None) -> None:
        save(training, directory)
        if directory is not None:
            flip_last_bit(directory / "model.safetensors")

    commit.save_sharded = damaging
    serve_request(StageRequest, run_stage)
