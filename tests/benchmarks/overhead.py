"""What share of a run's wall time is not spent in optimizer steps, and in what.

    python tests/benchmarks/overhead.py                    # the quickstart, as the user runs it
    python tests/benchmarks/overhead.py --shorter 10       # with a tenth of its steps, whose time counts ten times
    python tests/benchmarks/overhead.py --cycle llama_60m  # a cycle of 30 minutes at that model's shapes, simulated

Over S3 (--s3) a checkpoint is stored while the next stage trains: only what is waited for counts, such as a run's last
one. In a simulated cycle that is what its upload would take beyond 30 minutes.

Add --a-process-each for a trainer process a stage, to compare with. The run is real: own Prefect server, flow, trainer
process, store (a fresh directory, or a real S3 server on loopback with --s3). The clock starts when the flow's module
has been imported; everything after that counts, the start of the Prefect server included. Optimizer steps are the
trainer's loop without what snapshots stop it for.

--cycle: cycles of a few short steps are run, on the built-in corpus. Their overhead is what it is for any length of a
cycle, so its share of 30 minutes is overhead / 30 minutes: computed, not waited for. What grows with the cycle is given
its share: the validation tokens after a cycle are as many a trained token as in the profile, at the speed measured.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from seaweed import running_seaweed

from relora_train import events
from relora_train.cli.local_flow import load_installed, set_orchestrator_environment
from relora_train.cli.local_server import LocalServer
from relora_train.runs import run as runs
from relora_train.runs.workers import Worker
from relora_train.settings.load import load_profile
from relora_train.settings.profile import Profile

CYCLE_SECONDS = 1800.0
UPLOAD = "upload of the checkpoint, beside the next stage"
WAIT = "wait for the upload of a checkpoint"
SHORT_STEPS = 2


class Course(logging.Handler):
    """Events with the moment at which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((time.monotonic(), record.event))  # type: ignore[attr-defined]


def run(profile: str, overrides: dict[str, Any], store: str) -> tuple[float, float, float, Course]:
    """Run the flow; the moments at which its clock started, its flow started and all was over, and what it told."""
    set_orchestrator_environment(verbose=False)
    server = LocalServer()
    os.environ["PREFECT_API_URL"] = server.api_url
    flow = load_installed("pretrain")
    course = Course()
    events.listen(course)
    started = time.monotonic()
    server.wait_until_ready()
    called = time.monotonic()
    flow(profile, overrides=overrides, store=store, run_id="overhead")
    return started, called, time.monotonic(), course


def attribute(started: float, called: float, ended: float, course: Course) -> tuple[dict[str, float], dict[str, dict]]:
    """Seconds by part, which add up to the whole; and by stage."""
    parts: dict[str, float] = {"Prefect's server starts": called - started}
    stages: dict[str, dict[str, float]] = {}
    last, stalls = called, 0.0

    def add(stage: str | None, part: str, seconds: float) -> None:
        parts[part] = parts.get(part, 0.0) + seconds
        if stage is not None:
            row = stages.setdefault(stage, {})
            row[part] = row.get(part, 0.0) + seconds

    stored: list[tuple[float, str, float]] = []

    def wait_for_uploads(begin: float, end: float) -> float:
        """Seconds for which nothing was trained because a checkpoint was on its way; beside steps they cost nothing."""
        waited = 0.0
        for moment, stage, _ in stored:
            if begin < moment <= end:
                add(stage, WAIT, moment - begin)
                waited, begin = waited + moment - begin, moment
        return waited

    for moment, event in course.seen:
        name, stage = event["event"], event.get("stage")
        if name == "dataset_ready":
            add(None, "flow starts, text is tokenized", moment - last)
        elif name == "snapshot_committed":
            stalls += event["stall_seconds"]
            continue
        elif name == "checkpoint_stored":
            stored.append((moment, stage, event["seconds"]))
            continue
        elif name == "stage_committed":
            seconds = event["seconds"]
            idle = moment - last - sum(seconds.values())
            add(stage, "before the trainer has its request", idle - wait_for_uploads(last, last + idle))
            add(stage, "load", seconds["load"])
            add(stage, "evaluate", seconds["evaluate_before"] + seconds["evaluate_after"])
            add(stage, "optimizer steps", seconds["steps"] - stalls)
            add(stage, "copies for snapshots", stalls)
            add(stage, "merge, re-init, reset", seconds["merge"])
            add(stage, "write and hash the checkpoint", seconds["write"])
            stalls = 0.0
        elif name == "stage_finished":
            add(stage, "commit to the store, Prefect's records", moment - last)
        elif name == "evaluated":
            last += wait_for_uploads(last, moment)
            add(None, "final evaluations and samples", moment - last)
        elif name == "report_written":
            add(None, "report", moment - last)
        else:
            continue
        last = moment
    parts["end of the flow"] = ended - last
    for _, stage, seconds in stored:
        stages[stage][UPLOAD] = seconds
    return parts, stages


def show(parts: dict[str, float], total: float) -> None:
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part:<42} {seconds:9.2f} s  {100 * seconds / total:6.2f} %")  # noqa: T201 (a benchmark prints)
    steps = parts.get("optimizer steps", 0.0)
    print(f"  {'all':<42} {total:9.2f} s; outside optimizer steps {100 * (1 - steps / total):.2f} %")  # noqa: T201


def fewer_steps(name: str, divisor: int) -> dict[str, Any]:
    """What else a run does depends on the number of its stages, not of its steps."""
    schedule = load_profile(name).schedule
    steps = {key: getattr(schedule, key) // divisor for key in ("warm_start_steps", "cycle_length")}
    climbs = {"warmup_steps": 1, "restart_warmup_steps": 1}
    return {f"schedule.{key}": value for key, value in {**steps, **climbs}.items()}


def short_cycles(name: str, evaluated: int) -> dict[str, Any]:
    """The profile's shapes and a tokenizer of its vocabulary's kind, with cycles of a few short steps."""
    model = load_profile(name).model
    return {
        **{f"model.{key}": value for key, value in model.model_dump().items() if value is not None},
        "model.vocab_size": model.vocab_size or 32_000,
        "batch.sequences": 4,
        "batch.sequence_length": load_profile(name).batch.sequence_length,
        "relora.rank": load_profile(name).relora.rank,
        "schedule.warm_start_steps": SHORT_STEPS,
        "schedule.cycles": 2,
        "schedule.cycle_length": SHORT_STEPS,
        "schedule.warmup_steps": 1,
        "schedule.restart_warmup_steps": 1,
        "evaluation.sequences": evaluated,
        "evaluation.batch_sequences": 4,
        "evaluation.final_sequences": 4,
        "evaluation.sample_prompts": [],
        "data.max_documents": 400,
        "data.name": "overhead",
    }


def cycle_overhead(stages: dict[str, dict[str, float]], profile: Profile) -> None:
    """The second cycle stands for all: the first begins with an empty optimizer."""
    row = dict(stages["cycle-2"])
    steps = row.pop("optimizer steps") / SHORT_STEPS
    tokens = CYCLE_SECONDS / steps * 4 * profile.batch.sequence_length
    share = profile.evaluation.sequences / (profile.schedule.cycle_length * profile.batch.sequences)
    print(f"  30 minutes would train {tokens:,.0f} tokens here; the profile scores {share:.2%} as many after a cycle.")  # noqa: T201
    upload = row.pop(UPLOAD, 0.0)
    if upload:
        print(f"  Its checkpoint was stored in {upload:.2f} s; that goes on beside the next cycle's steps.")  # noqa: T201
        row[WAIT] = max(0.0, upload - CYCLE_SECONDS)
    row["evaluate"] *= share * tokens / (EVALUATED * profile.batch.sequence_length)
    for part, seconds in sorted(row.items(), key=lambda item: -item[1]):
        print(f"  {part:<42} {seconds:9.2f} s  {100 * seconds / CYCLE_SECONDS:6.3f} %")  # noqa: T201
    total = sum(row.values())
    print(f"  outside optimizer steps: {total:.2f} s a cycle, {100 * total / (CYCLE_SECONDS + total):.2f} % (computed)")  # noqa: T201


EVALUATED = 4
"""Validation sequences that are really scored after a short cycle."""


@contextmanager
def fresh_store(s3: bool) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="relora-overhead-") as scratch:
        os.environ["RELORA_CACHE"] = f"{scratch}/cache"
        os.environ.setdefault("PREFECT_HOME", f"{scratch}/prefect")
        if not s3:
            yield f"{scratch}/store"
            return
        Path(scratch, "weed").mkdir()
        with running_seaweed(Path(scratch, "weed")) as server:
            os.environ.update(server.environment)
            server.create_bucket("bench")
            yield "s3://bench/x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--shorter", type=int, default=1, metavar="N", help="do only every N-th step")
    parser.add_argument("--cycle", metavar="PROFILE", help="simulate a cycle of 30 minutes at this profile's shapes")
    parser.add_argument("--a-process-each", action="store_true", help="a process for every stage, to compare with")
    parser.add_argument("--s3", action="store_true", help="a real S3 server on loopback instead of a directory")
    arguments = parser.parse_args()
    if arguments.a_process_each:
        runs.Worker = lambda keeps: Worker()  # type: ignore[assignment]
    with fresh_store(arguments.s3) as store:
        name, overrides = arguments.profile, {}
        if arguments.cycle:
            name, overrides = "quickstart", short_cycles(arguments.cycle, EVALUATED)
        elif arguments.shorter > 1:
            overrides = fewer_steps(name, arguments.shorter)
        started, called, ended, course = run(name, overrides, store)
        parts, stages = attribute(started, called, ended, course)
        print(f"load of the machine over the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # noqa: T201
        if arguments.cycle:
            print(f"a cycle of 30 minutes at the shapes of {arguments.cycle}, simulated:")  # noqa: T201
            cycle_overhead(stages, load_profile(arguments.cycle))
        else:
            parts["optimizer steps"] *= arguments.shorter
            computed = f"; 1 of {arguments.shorter} steps done, the time of all computed" * (arguments.shorter > 1)
            print(f"{name}, from the end of the imports{computed}:")  # noqa: T201
            show(parts, sum(parts.values()))


if __name__ == "__main__":
    main()
