"""Full rank beside ReLoRA of one profile, each step in a process of its own, taking turns. Light."""

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

from relora_train.errors import ConfigError, ReLoRAError, TrainerCrashedError
from relora_train.process import SAFE_PATH
from relora_train.runs.plan import plan
from relora_train.settings.base import FrozenConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.registry import model_shape

FULL, RELORA = "full rank", "ReLoRA"
OWN_STEPS = ("-m", "relora_train.experiments.bench_worker")


class StepRequest(FrozenConfig):
    """The work of one process: a training step of a profile."""

    arm: str
    """FULL or RELORA; tests/benchmarks/step.py has more."""

    profile: Profile
    """The profile that `one_pass` returns."""

    vocab_size: int
    flops_per_token: float
    """Multiplications and additions of the products of matrices, forward and backward."""


@dataclass(frozen=True)
class StepResult:
    """The measurements of one arm over all rounds."""

    request: StepRequest
    device: str
    threads: int
    seconds: tuple[float, ...]
    """Seconds a step, the median of each round."""

    loss: float
    matmul_flops: float
    """FLOPs a second of one large product, the fastest of all rounds."""

    memory: Mapping[str, int]
    """Bytes of weights, gradients, optimizer, and the peak above the weights."""

    matmul_precision: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second in the median round."""
        return self.request.profile.batch.tokens / statistics.median(self.seconds)

    @property
    def utilisation(self) -> float:
        """Share of the measured peak."""
        return self.tokens_per_second * self.request.flops_per_token / self.matmul_flops

    @property
    def peak_bytes(self) -> int:
        """The most memory held during a step, weights included."""
        return self.memory["weights"] + self.memory["above_weights"]


class Ratio(FrozenConfig):
    """The speed of one arm over that of another, over the rounds."""

    median: float
    lowest: float
    highest: float


def speed_ratio(ours: StepResult, theirs: StepResult) -> Ratio:
    """Return the ratio of tokens a second. Each round is divided by itself, so that other load meets both sides."""
    values = [other / own for own, other in zip(ours.seconds, theirs.seconds, strict=True)]
    return Ratio(median=statistics.median(values), lowest=min(values), highest=max(values))


def one_pass(profile: Profile, *, updates: int) -> Profile:
    """Return the profile with one forward pass an update, and a warm start and a cycle of so many updates each."""
    settings = profile.model_dump()
    settings["method"] = "relora"
    settings["batch"] |= {"sequences": profile.batch.forward_passes(1)[0], "micro_sequences": None}
    settings["schedule"] = {
        "warm_start_steps": updates, "cycles": 1, "cycle_length": updates, "warmup_steps": 0, "restart_warmup_steps": 0,
    }  # fmt: skip
    settings["launch"] |= {"nproc_per_node": 1, "nnodes": 1, "sharding": "none"}
    return Profile.model_validate(settings)


def step_requests(profile: Profile, *, updates: int) -> dict[str, StepRequest]:
    """Return the requests for both arms. Raises ConfigError for a profile whose shape or objective has no benchmark."""
    if profile.objective != "causal_lm":
        raise ConfigError(
            f"Profile {profile.name!r} has objective {profile.objective!r}; `relora bench` measures language models."
        )
    measured = one_pass(profile, updates=updates)
    planned = plan(measured)
    if planned.full is None or planned.low_rank is None:
        raise ConfigError(f"Profile {profile.name!r} cannot be measured: {planned.unknown}.")
    flops = {FULL: planned.full.flops_per_token, RELORA: planned.low_rank.flops_per_token}
    rows = model_shape(measured).vocab_size
    return {
        arm: StepRequest(arm=arm, profile=measured, vocab_size=rows, flops_per_token=count)
        for arm, count in flops.items()
    }


def measure(
    requests: Mapping[str, StepRequest],
    *,
    rounds: int,
    steps: int,
    on_round: Callable[[int], None] = lambda number: None,
    worker: Sequence[str] = OWN_STEPS,
) -> dict[str, StepResult]:
    """Return each arm's result by its label. In each round every arm does `steps` steps, one arm after the other.

    worker: arguments for Python that start a process which serves rounds, see bench_worker.py.
    """
    with ExitStack() as stack:
        workers = {label: stack.enter_context(_Worker(label, each, worker)) for label, each in requests.items()}
        answers: dict[str, list[dict[str, Any]]] = {label: [] for label in workers}
        for number in range(1, rounds + 1):
            for label, process in workers.items():
                answers[label].append(process.exchange(str(steps)))
            on_round(number)
    return {
        label: StepResult(
            request=requests[label],
            device=process.about["device"],
            threads=process.about["threads"],
            seconds=tuple(statistics.median(answer["seconds"]) for answer in answers[label]),
            loss=answers[label][-1]["loss"],
            matmul_flops=max(answer["matmul_flops"] for answer in answers[label]),
            memory=answers[label][-1]["memory"],
            matmul_precision=process.about["matmul_precision"],
        )
        for label, process in workers.items()
    }


class _Worker:
    """A process that holds an arm and waits for its turn."""

    def __init__(self, label: str, request: StepRequest, program: Sequence[str]) -> None:
        self.label, self.request, self._program = label, request, program
        self.about: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads could fill up
        self._process = subprocess.Popen(  # noqa: S603  # Python itself, with arguments of this repository
            [sys.executable, *self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **SAFE_PATH},
            text=True,
        )
        try:
            self.about = self.exchange(self.request.model_dump_json())
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

    def exchange(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer. Raises TrainerCrashedError if the process ended."""
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
            f"The benchmark's arm {self.label!r} ended early: {last[0]} Take a smaller profile, or set "
            "batch.micro_sequences lower."
        )
