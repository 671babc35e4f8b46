"""Full rank beside ReLoRA of one profile, each step in a process of its own, taking turns."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, cast

from relora_train import events
from relora_train.errors import ConfigError, TrainerCrashedError
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
    """Its name; 'cpu, 2 threads'."""

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


def speed_ratio(ours: StepResult, theirs: StepResult) -> dict[str, float]:
    """Return the ratio of tokens a second: median, lowest, highest.

    Each round is divided by itself, so that other load meets both sides.
    """
    values = [other / own for own, other in zip(ours.seconds, theirs.seconds, strict=True)]
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


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
    requests: Mapping[str, StepRequest], *, rounds: int, steps: int, what: str, worker: Sequence[str] = OWN_STEPS
) -> dict[str, StepResult]:
    """Return each arm's result by its label. In each round every arm does `steps` steps, one arm after the other.

    what: name of the work in the events that tell how far it is.
    worker: arguments for Python that start a process which serves rounds, see bench_worker.py.
    """
    answers: dict[str, list[dict[str, Any]]] = {label: [] for label in requests}
    with ExitStack() as stack:
        arms = {label: stack.enter_context(_arm(label, request, worker)) for label, request in requests.items()}
        for number in range(1, rounds + 1):
            for label, exchange in arms.items():
                answers[label].append(exchange(str(steps)))
            events.emit("measuring", what=what, done=number, total=rounds)
    return {
        label: StepResult(
            request=requests[label],
            seconds=tuple(statistics.median(answer["seconds"]) for answer in found),
            matmul_flops=max(answer["matmul_flops"] for answer in found),
            **{name: found[-1][name] for name in ("device", "loss", "memory", "matmul_precision")},
        )
        for label, found in answers.items()
    }


@contextmanager
def _arm(label: str, request: StepRequest, program: Sequence[str]) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Start a process that holds an arm; yield a function that sends it a line and returns the answer.

    The function raises TrainerCrashedError if the process ended.
    """
    environment = {**os.environ, **SAFE_PATH}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads could fill up
        subprocess.Popen([sys.executable, *program], stderr=errors, **pipes) as process,  # noqa: S603
    ):

        def exchange(line: str) -> dict[str, Any]:
            stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
            with suppress(BrokenPipeError):
                stdin.write(line + "\n")
                stdin.flush()
            if answer := stdout.readline():
                return cast(dict[str, Any], json.loads(answer))
            process.wait(timeout=10)
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it said nothing."]
            raise TrainerCrashedError(
                f"The benchmark's arm {label!r} ended early: {last[0]} Take a smaller profile, or set "
                "batch.micro_sequences lower."
            )

        try:
            exchange(request.model_dump_json())
            yield exchange
        finally:
            try:
                process.communicate(timeout=10)  # closes its standard input, which ends it in order
            except subprocess.TimeoutExpired:
                process.kill()
