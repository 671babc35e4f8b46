"""Run the arms of a benchmark side by side: each in its process, taking turns, so that other load meets all. Light."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Self

from relora_train.errors import ReLoRAError, TrainerCrashedError
from relora_train.experiments.benchmark.request import ArmRequest
from relora_train.process import SAFE_PATH


@dataclass(frozen=True)
class ArmResult:
    """What one arm did in all rounds."""

    request: ArmRequest
    device: str
    threads: int
    seconds: tuple[float, ...]
    """Of a step, the median of each round."""

    loss: float
    flops_per_token: float
    matmul_flops: float
    memory: Mapping[str, int]
    notes: Mapping[str, str]
    matmul_precision: str
    """As asked for; of 'auto' what was chosen, and why."""

    @property
    def tokens_per_second(self) -> float:
        """In the median round."""
        return self.request.shape.tokens / statistics.median(self.seconds)

    @property
    def utilisation(self) -> float:
        """Share of the measured peak of a large product."""
        return self.tokens_per_second * self.flops_per_token / self.matmul_flops


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one arm is as another, round by round."""

    median: float
    lowest: float
    highest: float


def speed_ratio(ours: ArmResult, theirs: ArmResult) -> Ratio:
    """Of the tokens a second, each round by itself."""
    values = [other / own for own, other in zip(ours.seconds, theirs.seconds, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


def share_of_flop_bound(ours: ArmResult, theirs: ArmResult) -> Ratio:
    """The speed ratio relative to that of the FLOPs a token: 1 where every FLOP saved is time saved."""
    bound, speed = theirs.flops_per_token / ours.flops_per_token, speed_ratio(ours, theirs)
    return Ratio(speed.median / bound, speed.lowest / bound, speed.highest / bound)


def extra_cost(slower: ArmResult, faster: ArmResult) -> Ratio:
    """How much more time a step takes, as a share of the faster one's, round by round."""
    ratio = speed_ratio(faster, slower)
    return Ratio(ratio.median - 1, ratio.lowest - 1, ratio.highest - 1)


def measure(
    requests: Mapping[str, ArmRequest],
    *,
    rounds: int,
    steps: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, ArmResult]:
    """Every arm's result by its label. In each round every arm does so many steps, one arm after the other."""
    with ExitStack() as stack:
        workers = {label: stack.enter_context(_Worker(label, request)) for label, request in requests.items()}
        answers: dict[str, list[dict[str, Any]]] = {label: [] for label in workers}
        for number in range(rounds):
            for label, worker in workers.items():
                answers[label].append(worker.ask(steps))
            on_round(number + 1)
        return {label: _result(worker, answers[label]) for label, worker in workers.items()}


def _result(worker: _Worker, answers: Sequence[dict[str, Any]]) -> ArmResult:
    return ArmResult(
        request=worker.request,
        device=worker.about["device"],
        threads=worker.about["threads"],
        seconds=tuple(statistics.median(answer["seconds"]) for answer in answers),
        loss=answers[-1]["loss"],
        flops_per_token=worker.about["flops_per_token"],
        matmul_flops=max(answer["matmul_flops"] for answer in answers),
        memory=answers[-1]["memory"],
        notes=worker.about["notes"],
        matmul_precision=worker.about["matmul_precision"],
    )


class _Worker:
    """A process that holds an arm and waits for its turn."""

    def __init__(self, label: str, request: ArmRequest) -> None:
        self.label, self.request = label, request
        self.about: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads could fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "relora_train.experiments.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **SAFE_PATH},
            text=True,
        )
        try:
            self.about = self._exchange(self.request.model_dump_json())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def ask(self, steps: int) -> dict[str, Any]:
        """The answer to a round."""
        return self._exchange(str(steps))

    def _exchange(self, line: str) -> dict[str, Any]:
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise TypeError("the worker was started without pipes")
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise self._fault()
        found: dict[str, Any] = json.loads(answer)
        return found

    def _fault(self) -> ReLoRAError:
        self._process.wait(timeout=10)
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["it said nothing."]
        return TrainerCrashedError(
            f"The benchmark's arm {self.label!r} ended early: {last[0]} Take a smaller shape, or leave the arm out."
        )
