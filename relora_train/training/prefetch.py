"""The batches of a stage, read on a thread one update ahead of their use."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from relora_train.data.dataset import ExampleDataset
from relora_train.distributed import Ranks


class Prefetcher:
    """A reader of one rank's rows of the global batches of `sequences`, onto its device.

    A batch's examples depend on its position alone, so reading ahead changes no bit and has no state to save.
    The dataset is read on this thread only.
    """

    def __init__(self, dataset: ExampleDataset, *, sequences: int, ranks: Ranks) -> None:
        self._dataset, self._sequences, self._ranks = dataset, sequences, ranks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")  # ends when nobody holds it
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._seconds_waited = 0.0

    def batch(self, position: int, *, last: bool = False) -> Tensor:
        """Examples (rows, row length) of the batch at this position; unless `last`, begins with the next.

        On a GPU the copy runs beside what the GPU is doing. Raises what reading raises.
        """
        started = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        reading = ahead[1] if ahead is not None and ahead[0] == position else self._reader.submit(self._read, position)
        tokens = reading.result()
        self._seconds_waited += time.perf_counter() - started
        if not last:
            following = position + self._sequences
            self._ahead = following, self._reader.submit(self._read, following)
        return tokens.to(self._ranks.device, non_blocking=True)

    def take_seconds_waited(self) -> float:
        """Return seconds that training has waited for data since this was last asked."""
        waited, self._seconds_waited = self._seconds_waited, 0.0
        return waited

    def _read(self, position: int) -> Tensor:
        ranks = self._ranks
        blocks = self._dataset.read_batch(position, self._sequences, rank=ranks.rank, world_size=ranks.world_size)
        tokens = torch.from_numpy(blocks)
        return tokens.pin_memory() if ranks.device.type == "cuda" else tokens
