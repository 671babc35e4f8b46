"""What a snapshot and a merge checkpoint cost at a profile's shapes, with random weights on the CPU.

    python tests/benchmarks/snapshots.py --profile llama_60m --rounds 3

Measured: how long training stands still (the copy in memory), how long the writing thread takes (write, hash, fsync)
and what it leaves of the training's speed, the bytes, commit and fetch through the library to a directory and to a real
S3 server on loopback, and the same bytes through plain boto3 to the same server and through a bare loopback socket.
Medians over the rounds; the ways are taken in turn, so that other load meets all of them. llama_350m wants about 20 GB
of memory and 25 GB of disk.
"""

import argparse
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from seaweed import Seaweed, running_seaweed

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.fetch import fetch_bundle
from relora_train.checkpoints.manifest import FileEntry, Manifest, SnapshotManifest, describe_files, parse_manifest
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge_and_reinit
from relora_train.method.reset import reset_optimizer_state
from relora_train.method.wrap import apply_relora
from relora_train.settings.load import load_profile
from relora_train.settings.method import OptimizerConfig
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore
from relora_train.storage.local import LocalStore
from relora_train.storage.s3 import S3Store
from relora_train.training.files import save_model, save_optimizer_state
from relora_train.training.models.registry import objective_of
from relora_train.training.optimizer import build_optimizer, optimizer_state_by_name
from relora_train.training.peft_export import adapter_config, adapter_state, save_adapter
from relora_train.training.snapshot import HostBuffers, SnapshotState, moving_tensors, write_snapshot
from relora_train.training.tensor_stream import TensorStream

FINGERPRINT = "f" * 64


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def show(what: str, seconds: list[float], size_bytes: int | None = None) -> None:
    median = statistics.median(seconds)
    speed = f"{size_bytes / 1e6 / median:9,.0f} MB/s" if size_bytes else ""
    print(f"  {what:<58} {median:8.3f} s {speed}", flush=True)  # noqa: T201 (a benchmark prints)


def make_training(profile: Profile, *, low_rank: bool) -> Any:
    """A model and its optimizer with a full Adam state: what a snapshot needs of a StageTraining."""
    model = objective_of(profile).build_model(SimpleNamespace(vocab_size=32_000, eos_id=0))
    if low_rank:
        relora = profile.relora
        apply_relora(model, rank=relora.rank, alpha=relora.alpha, dropout=0.0, target_modules=None, seed=0, cycle=1)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return SimpleNamespace(model=model, optimizer=optimizer)


def speed(seconds: float) -> float:
    """Products of matrices a second: what training is made of."""
    matrix = torch.randn(512, 512)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        matrix @ matrix
        done += 1
    return done / (time.perf_counter() - started)


def measure_snapshots(training: Any, root: Path, rounds: int) -> list[Path]:
    buffers, stalls, writes, shares, made = HostBuffers(), [], [], [], []
    first, _ = timed(lambda: buffers.copy(moving_tensors(training)))
    for step in range(1, rounds + 1):
        stall, tensors = timed(lambda: buffers.copy(moving_tensors(training)))
        state = SnapshotState(fingerprint=FINGERPRINT, step=step, samples_seen=0, loss_sum=0.0, summed=0, seconds=0.0)
        result: list[Any] = []

        def write(tensors: Any = tensors, state: Any = state, result: list[Any] = result) -> None:
            request: Any = SimpleNamespace(run_id="b", stage=SimpleNamespace(name="c"), parent=None)
            layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            stream = TensorStream(layout, iter(tensors.values()))
            result.append(timed(lambda: write_snapshot(root, request, state, stream, [])))

        alone = speed(1.0)
        thread = threading.Thread(target=write)
        thread.start()
        shares.append(speed(0.5) / alone)
        thread.join()
        seconds, (directory, manifest) = result[0]
        stalls.append(stall)
        writes.append(seconds)
        made.append(directory)
    size = manifest.size_bytes
    print(f"  one snapshot: {size / 1e6:,.1f} MB")  # noqa: T201
    show("training stands still, first time (memory is allocated)", [first], size)
    show("training stands still", stalls, size)
    show("the thread writes, hashes, syncs", writes, size)
    print(f"  training's speed meanwhile: {100 * statistics.median(shares):.0f}%")  # noqa: T201
    return made


def measure_transfers(server: Seaweed, directory: Path, manifest: Manifest, scratch: Path, rounds: int) -> None:
    """Commit and fetch one bundle by every way in turn, as often as asked."""
    stores: list[tuple[str, ObjectStore]] = [
        ("a directory", LocalStore(scratch / "store")),
        ("S3 on loopback", S3Store("bench", "x")),
    ]
    files, size = [directory / entry.path for entry in manifest.files], manifest.size_bytes
    seconds: dict[str, list[float]] = {}
    client = server.client()
    for turn in range(rounds):
        for name, store in stores:
            commit, _ = timed(lambda s=store, t=turn: commit_bundle(s, f"b/{t}", directory, manifest))
            fetched = scratch / "fetched"
            fetch, _ = timed(lambda s=store, t=turn, d=fetched: fetch_bundle(s, f"b/{t}", manifest, d))
            shutil.rmtree(fetched, ignore_errors=True)
            for info in list(store.list(f"b/{turn}/")):
                store.delete(info.key)
            seconds.setdefault(f"commit to {name}", []).append(commit)
            seconds.setdefault(f"fetch and verify from {name}", []).append(fetch)
        up, _ = timed(lambda: [client.upload_file(str(file), "bench", f"plain/{file.name}") for file in files])
        down, _ = timed(
            lambda: [client.download_file("bench", f"plain/{file.name}", str(scratch / "plain")) for file in files]
        )
        seconds.setdefault("plain boto3, upload_file", []).append(up)
        seconds.setdefault("plain boto3, download_file", []).append(down)
        seconds.setdefault("a bare loopback socket", []).append(timed(lambda: send_over_loopback(files))[0])
    client.close()
    for name, taken in seconds.items():
        show(name, taken, size)
    for verb, ours, plain in (
        ("upload", "commit to S3 on loopback", "plain boto3, upload_file"),
        ("download", "fetch and verify from S3 on loopback", "plain boto3, download_file"),
    ):
        ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[plain], strict=True))
        print(f"  {verb}: {ratio:.2f} of plain boto3's speed")  # noqa: T201


def send_over_loopback(files: list[Path]) -> None:
    """The bytes of the files from one thread to another, which drops them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drop() -> None:
            connection, _ = listener.accept()
            with connection:
                buffer = bytearray(1 << 20)
                while connection.recv_into(buffer):
                    pass

        reader = threading.Thread(target=drop)
        reader.start()
        with socket.create_connection(listener.getsockname()) as sender:
            for file in files:
                with file.open("rb") as stream:
                    sender.sendfile(stream)
        reader.join()


def measure_checkpoint(training: Any, directory: Path, profile: Profile) -> Manifest:
    """As trainer.py commits a cycle; the bundle that it leaves."""
    adapter = (adapter_state(training.model), adapter_config(training.model))
    reset = profile.optimizer_reset
    merge, _ = timed(lambda: merge_and_reinit(training.model, cycle=1, seed=0))
    prune, _ = timed(
        lambda: reset_optimizer_state(
            training.optimizer, lora_parameters(training.model), mode=reset.mode, ratio=reset.ratio
        )
    )
    directory.mkdir()

    def write() -> None:
        weights = {
            name: tensor
            for name, tensor in training.model.state_dict().items()
            if name.rpartition(".")[2] not in ("lora_A", "lora_B")
        }
        save_model(training.model, directory, weights=weights)
        save_optimizer_state(
            optimizer_state_by_name(training.optimizer, training.model), directory / "optimizer.safetensors"
        )
        save_adapter(*adapter, directory / "adapter")
        described.extend(describe_files(directory))

    described: list[FileEntry] = []
    seconds, _ = timed(write)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.rglob("*.safetensors"))}
    print("  one merge checkpoint: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items()))  # noqa: T201
    show("merge and re-init, with effective ranks", [merge])
    show("optimizer reset", [prune])
    show("write and hash", [seconds], sum(sizes.values()))
    return SnapshotManifest(
        run_id="b", stage="c", step=1, fingerprint=FINGERPRINT, files=tuple(described), attempt=FINGERPRINT[:16]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="llama_60m")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    with tempfile.TemporaryDirectory() as scratch, running_seaweed(make(Path(scratch) / "weed")) as server:
        os.environ.update(server.environment)
        server.create_bucket("bench")
        for low_rank in (True, False):
            print(f"{profile.name}, {'cycle' if low_rank else 'warm start'}:")  # noqa: T201
            root = make(Path(scratch) / f"low-rank-{low_rank}" / "snapshots")
            training = make_training(profile, low_rank=low_rank)
            made = measure_snapshots(training, root, arguments.rounds)
            snapshot = parse_manifest(SnapshotManifest, (made[0] / "manifest.json").read_bytes(), uri="snapshot")
            for directory in made[1:]:
                shutil.rmtree(directory)
            measure_transfers(server, made[0], snapshot, root.parent, arguments.rounds)
            if low_rank:
                checkpoint = measure_checkpoint(training, root.with_name("checkpoint"), profile)
                measure_transfers(server, root.with_name("checkpoint"), checkpoint, root.parent, arguments.rounds)
            del training
            shutil.rmtree(root.parent)


def make(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


if __name__ == "__main__":
    main()
