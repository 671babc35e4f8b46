"""A flow that dies by SIGKILL at a write of our choice. Started as a program: it forks one such flow for each line.

What a write is: whatever changes the store or the scratch space, by name. In a directory, before each call of the
operating system that makes, renames, links or removes something, or opens it to be written; after one means before the
next. Also in the midst of one: the file that was written last is cut to half. In a bucket, before and after each
request that changes it. Stages are real and tiny; nothing is mocked but the trainer's process, which is this one, so
that flow and trainer die together.
"""

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from stage_runs import tiny_profile
from tiny_data import DATASET_ID

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import dataset_prefix
from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.manifest import DatasetManifest, parse_manifest
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.events import Event
from relora_train.method.stages import plan_stages
from relora_train.runs.divergence import train_by_policy
from relora_train.runs.publishing import Publisher
from relora_train.runs.run import DatasetRef, Run, StageOutcome
from relora_train.runs.train import store_trained
from relora_train.storage.opening import open_store
from relora_train.training.requests import StageRequest
from relora_train.training.snapshot import Snapshotter
from relora_train.training.trainer import run_stage

RUN = "run"
PROFILE = tiny_profile(
    model={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    batch={"sequences": 2, "sequence_length": 16},
    schedule={"warm_start_steps": 2, "cycles": 1, "cycle_length": 6, "warmup_steps": 1, "restart_warmup_steps": 1},
    relora={"rank": 2, "alpha": 2},
    evaluation={"sequences": 2, "batch_sequences": 2},
    snapshots={"every_steps": 2, "every_seconds": None, "keep": 1},
    launch={"threads": 1},
)
_RANDOM = re.compile(r"\b(?!0000)[0-9a-f]{8,64}\b")  # what two runs name differently; steps stay
_CHANGES = {"os.rename": 2, "os.link": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1}


@dataclass
class Order:
    """What one flow is to do, and where it is to die."""

    verb: str
    """train or prune; trace to train under a PowerCut's eyes."""
    store: str
    cache: str
    dataset: str
    log: str
    """Where the names of the writes go, one a line; of a trace what a power cut could have broken."""
    environment: dict[str, str] = field(default_factory=dict)
    die_at: str | None = None


@dataclass
class Death:
    """Names the writes of this process one after another and ends it at one of them."""

    roots: dict[str, str]
    die_at: str | None
    names: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.RLock = field(default_factory=threading.RLock)
    written: str | None = None

    def at(self, name: str) -> None:
        with self.lock:  # who dies holds it: no other thread writes meanwhile
            self.seen[name] += 1
            name = f"{name} #{self.seen[name]}"
            self.names.append(name)
            if self.die_at == f"{name}, half written" and self.written is not None:
                os.truncate(self.written, Path(self.written).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if self.die_at == name:
                os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: called before what it is told of."""
        if event == "open":
            if isinstance(arguments[0], int) or not _writes(arguments):
                return
            paths = [os.fsdecode(arguments[0])]
        elif event in _CHANGES:
            directory = arguments[-1]
            paths = [_whole(os.fsdecode(path), directory) for path in arguments[: _CHANGES[event]]]
        else:
            return
        named = [self.named(path) for path in paths]
        if all(named) and not named[-1].endswith(".lock"):
            self.at(f"{event} {' -> '.join(named)}")
            self.written = paths[0] if event == "open" else None

    def named(self, path: str) -> str:
        for root, name in self.roots.items():
            if path.startswith(f"{root}/"):
                return _RANDOM.sub("*", name + path.removeprefix(root))
        return ""


@dataclass
class PowerCut:
    """Names what would be broken if the power went: names may be on the disk at once, bytes only when they are synced.

    A name that others trust (a manifest and all that it lists, whatever a store shows) must come after its bytes, and
    be on the disk itself before the next one is given or taken. What a trainer leaves for its own machine is read with
    every byte checked, so it may be late; but not when the next stage begins before it is stored.
    """

    store: str
    broken: list[str] = field(default_factory=list)
    synced: set[str] = field(default_factory=set)
    directories: set[str] = field(default_factory=set)
    """In which a name has changed and is not on the disk."""

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int) and _writes(arguments):
            path = Path(os.fsdecode(arguments[0]))
            self.synced.discard(str(path))
            if path.name == "request.json":  # the stage before is stored, or waits on this machine
                for manifest in path.parent.parent.glob("*/checkpoint/manifest.json"):
                    self.whole(manifest, manifest.read_bytes())
                    self.broken += [] if str(manifest) in self.synced else [f"{manifest} is not synced"]
        elif event in _CHANGES:
            names = [_whole(os.fsdecode(path), arguments[-1]) for path in arguments[: _CHANGES[event]]]
            self.changed(event, names[0], Path(names[-1]))

    def changed(self, event: str, old: str, path: Path) -> None:
        if event == "os.mkdir":
            if not path.exists() and path.parent.exists():
                self.note(path.parent)
        elif event == "os.rmdir":
            if not any(path.iterdir()):  # else it will be refused
                self.directories.discard(str(path))
        elif event == "os.link" and path.exists():
            return  # it will be refused
        elif not path.name.startswith(".") and self.trusts(path):
            stored = str(path).startswith(self.store)
            late = {each for each in self.directories if stored or Path(each) not in path.parents}
            self.broken += [f"{event} {path} while names in {each} are not synced" for each in late]
            self.directories -= late
            if event != "os.remove":
                self.named(old, path)
            elif stored:
                self.note(path.parent)

    def named(self, old: str, path: Path) -> None:
        self.broken += [] if old in self.synced else [f"{path} was given its name before its bytes were synced"]
        self.synced.add(str(path))
        if path.name == "manifest.json":
            self.whole(path, Path(old).read_bytes())
        self.note(path.parent)

    def whole(self, path: Path, manifest: bytes) -> None:
        listed = json.loads(manifest)
        files = [str(path.parent / listed["files_prefix"] / entry["path"]) for entry in listed["files"]]
        self.broken += [f"{path} lists {name}, which is not synced" for name in files if name not in self.synced]

    def fsync(self, descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        original(descriptor)
        self.synced.add(path)
        self.directories.discard(path)

    def trusts(self, path: Path) -> bool:
        return str(path).startswith(self.store) or not {"snapshots", "datasets"}.isdisjoint(path.parts)

    def note(self, directory: Path) -> None:
        if str(directory).startswith(self.store) or "snapshots" in directory.parts:
            self.directories.add(str(directory))


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or bool(set(mode or "") & set("wax+"))


def _whole(path: str, directory: Any) -> str:
    absolute = Path(path).is_absolute() or not isinstance(directory, int) or directory < 0
    return path if absolute else str(Path(f"/proc/self/fd/{directory}").readlink() / path)


def watch_requests(death: Death, store: str) -> None:
    """Before and after each request by which botocore changes a bucket."""
    from botocore.httpsession import URLLib3Session

    send, below = URLLib3Session.send, f"{store.removeprefix('s3:/')}/"

    def sending(self: Any, request: Any) -> Any:
        if request.method in ("GET", "HEAD"):
            return send(self, request)
        path, _, query = request.url.partition("?")
        what = "upload " if "upload" in query else ""
        name = _RANDOM.sub("*", f"{what}{request.method} {path.partition(below)[2]}")
        death.at(f"before {name}")
        answer = send(self, request)
        death.at(f"after {name}")
        return answer

    URLLib3Session.send = sending


def train(order: Order) -> None:
    """What the flow does, but in this process: see flows/pretrain.py."""
    store, outcomes, parent = open_store(order.store), list[StageOutcome](), None
    store.preflight()
    publisher = Publisher()
    with hold_run(store, RUN) as lease, publisher if store.is_remote else nullcontext():
        run = Run(RUN, order.store, PROFILE, lease=lease, publisher=publisher)
        directory = Path(order.dataset)
        path = directory / "manifest.json"
        made = parse_manifest(DatasetManifest, path.read_bytes(), uri=path.as_uri())
        dataset = DatasetRef(store.uri, commit_bundle(store, dataset_prefix("tiny", DATASET_ID), directory, made))
        for stage in plan_stages(PROFILE):
            outcome = train_by_policy(run, stage, dataset, parent, on_event=once_stored(run), provenance={})
            outcomes = [*stored(run, outcomes), outcome]
            parent = outcome.checkpoint
        stored(run, outcomes)


def stored(run: Run, outcomes: list[StageOutcome]) -> list[StageOutcome]:
    return [outcome if outcome.stored else store_trained(run, outcome) for outcome in outcomes]


def once_stored(run: Run) -> Callable[[Event], None]:
    """Let a snapshot reach the store before training goes on: then the same writes come in every run."""

    def on_event(event: Event) -> None:
        if event["event"] == "snapshot_committed":
            name, deadline = Path(event["directory"]).name, time.monotonic() + 5
            while time.monotonic() < deadline and not any(
                info.key.endswith(f"{name}/manifest.json") for info in run.store.list(f"runs/{RUN}/snapshots/")
            ):
                time.sleep(0.005)

    return on_event


def work(module: str, request: StageRequest, path: Path, *, on_event: Callable[[Event], None], **_: Any) -> None:
    path.write_text(request.model_dump_json())
    run_stage(request, lambda event, **fields: on_event({"event": event, **fields}))


def after_step(self: Snapshotter, progress: Any, *, original: Any = Snapshotter.after_step) -> None:
    original(self, progress)
    self.wait()


def prune(order: Order) -> None:
    prune_run(open_store(order.store), RUN, RetentionPolicy(keep_last=1), grace=timedelta(0))


def live(order: Order) -> None:
    """In a process of its own, until the end or until death."""
    os.environ.update({**order.environment, "RELORA_CACHE": order.cache})
    import relora_train.runs.workers

    relora_train.runs.workers.run_worker = work  # type: ignore[assignment]
    Snapshotter.after_step = after_step  # type: ignore[method-assign]
    if order.verb == "trace":
        power = PowerCut(order.store)
        os.fsync = power.fsync
        sys.addaudithook(power.hear)
        train(order)
        Path(order.log).write_text("\n".join(power.broken))
        return
    roots = {order.cache: "cache"} | ({} if "://" in order.store else {order.store: "store"})
    death = Death(roots, order.die_at)
    sys.addaudithook(death.hear)
    watch_requests(death, order.store)
    os.fsync = lambda descriptor: None  # a kill loses nothing that this would save, and it is most of the time
    {"train": train, "prune": prune}[order.verb](order)
    death.at("end")
    Path(order.log).write_text("\n".join(death.names))


def warm_up() -> None:
    """What a first stage spends seconds on, once for all flows. No gradients: torch refuses them after a fork."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import relora_train.training.models.causal_lm  # noqa: F401

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(directory)
        LlamaForCausalLM.from_pretrained(directory)(torch.zeros((1, 4), dtype=torch.long))


def say(what: object) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


def serve() -> None:
    warm_up()
    say("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(Order(**json.loads(line)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        say(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    serve()
