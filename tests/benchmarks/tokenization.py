"""How fast a corpus becomes token shards and shards become batches, beside raw `tokenizers`.

    python tests/benchmarks/tokenization.py --megabytes 40 --rounds 3

The corpus is the Python source in this environment's site-packages. The unit is MB per CPU-second, children included,
so that other load on the machine matters little; the contestants take turns and the median round counts.

    python tests/benchmarks/tokenization.py --compare --megabytes 100

prepares the same text as a run does, with hashing, process and commit: as one source, cut into texts of up to 4,000
characters (those of C4 have 2,200 on average), as a mixture of two, as a single line, as prompts and completions of up
to 1,000 characters, and as conversations of four messages of up to 1,000 characters, whose template marks answers or
does not. The megabytes are those that were encoded, of every contestant: a template's own words are encoded too, and
add a twentieth to conversations.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from instructions import CHATML, MARKED

from relora_train.data.dataset import TokenDataset
from relora_train.data.prepare import PreparedDataset, prepare_dataset
from relora_train.data.tokenizer import train_tokenizer
from relora_train.runs.datasets import DatasetOutcome, prepare_or_reuse
from relora_train.runs.run import Run, parts_of
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.load import load_profile

VOCAB_SIZE = 16_384


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """CPU-seconds and seconds."""
    cpu, clock = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - clock


class WorkerMemory(threading.Thread):
    """Watches the largest resident size that any child of this process reaches, in MB.

    From /proc, since ru_maxrss of a child begins with the size of the parent it was started from.
    """

    def __init__(self, command: bytes = b"spawn_main") -> None:
        super().__init__(daemon=True)
        self.largest_mb, self._command = 0.0, command

    def run(self) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        while True:
            for child in children.read_text().split():
                with suppress(OSError, IndexError):
                    peak = Path(f"/proc/{child}/status").read_text().split("VmHWM:")[1].split()[0]
                    is_worker = self._command in Path(f"/proc/{child}/cmdline").read_bytes()
                    self.largest_mb = max(self.largest_mb, int(peak) / 1024) if is_worker else self.largest_mb
            time.sleep(0.05)


def copy_corpus(directory: Path, megabytes: float) -> list[str]:
    """Copy source files until there are so many megabytes; return their texts."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        raw = path.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        if raw:
            (directory / f"{len(texts):05d}.py").write_bytes(raw)
            texts.append(text)
            size += len(raw)
        if size >= megabytes * 1e6:
            break
    return texts


def encode_raw(tokenizer_path: Path, texts: list[str]) -> None:
    """`tokenizers` alone: no reading, no splitting, no writing."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(texts[start : start + 64], add_special_tokens=False):
            np.array(encoding.ids, dtype=np.uint16)


def read_all(dataset: TokenDataset, *, shuffled: bool, batch: int = 16) -> int:
    """Tokens read in batches, one epoch."""
    read = dataset.read_batch if shuffled else dataset.read_blocks
    return sum(read(start, batch).size for start in range(0, dataset.blocks - batch, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--compare", action="store_true", help="mixtures and a long line beside plain text")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        (compare if chosen.compare else run)(Path(scratch), chosen.megabytes, chosen.rounds, chosen.workers)


def run(scratch: Path, megabytes: float, rounds: int, workers: int) -> None:
    (scratch / "corpus").mkdir()
    texts = copy_corpus(scratch / "corpus", megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    training_cpu, _ = measured(lambda: train_tokenizer(texts, vocab_size=VOCAB_SIZE).save(scratch))
    show(
        f"{len(texts)} documents, {size:.1f} MB; tokenizer of {VOCAB_SIZE} entries: {size / training_cpu:.1f} MB/CPU-s"
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = TokenizerConfig(path=str(scratch / "tokenizer.json"))
    data = DataConfig(source="text", paths=(str(scratch / "corpus"),), workers=workers)
    results: dict[str, list[float]] = {"raw encode_batch": [], "prepare, tokenizers": [], "prepare, tiktoken": []}
    made: list[PreparedDataset] = []
    memory = WorkerMemory()
    memory.start()
    for number in range(rounds):
        results["raw encode_batch"].append(measured(lambda: encode_raw(scratch / "tokenizer.json", texts))[0])
        for engine in ("tokenizers", "tiktoken"):
            engine_data = data.model_copy(update={"engine": engine})
            work = scratch / f"{engine}-{number}"
            spent, _ = measured(lambda d=engine_data, w=work: made.append(prepare_dataset(d, settings, w)))
            results[f"prepare, {engine}"].append(spent)
    raw = statistics.median(results["raw encode_batch"])
    targets = {"raw encode_batch": "", "prepare, tokenizers": "2 and 0.8 of raw", "prepare, tiktoken": "10"}
    show(f"\n{'':24}{'MB/CPU-s':>10}{'of raw':>9}   target")
    for name, spent in results.items():
        median = statistics.median(spent)
        show(f"{name:24}{size / median:10.2f}{raw / median:9.2f}   {targets[name]}")
    same = {tuple(entry.sha256 for entry in prepared.manifest.files) for prepared in made}
    show(f"\nall shards the same bytes: {len(same) == 1}; largest worker {memory.largest_mb:.0f} MB (target 300)")
    _, rerun = measured(lambda: prepare_dataset(data, settings, scratch / "tiktoken-0"))
    show(f"prepared again: {rerun:.2f} s (target 1)")
    manifest = made[0].manifest
    show(f"{manifest.train_tokens + manifest.val_tokens:,} tokens; statistics {manifest.statistics}")
    dataset = TokenDataset(made[0].directory, "train", sequence_length=512, manifest=manifest)
    for shuffled in (False, True):
        read_all(dataset, shuffled=shuffled)  # pages in memory
        spent, _ = measured(lambda s=shuffled: [read_all(dataset, shuffled=s) for _ in range(5)])
        speed = 5 * dataset.blocks * 513 / 1e6 / spent
        show(f"reader, {'shuffled' if shuffled else 'in order':9}{speed:8.0f} Mtok/CPU-s (target 200)")


def compare(scratch: Path, megabytes: float, rounds: int, workers: int) -> None:
    (scratch / "corpus").mkdir()
    texts = copy_corpus(scratch / "corpus", megabytes)
    train_tokenizer(texts[:2000], vocab_size=VOCAB_SIZE).save(scratch)
    half = len(texts) // 2
    short = [text[start : start + 4000] for text in texts for start in range(0, len(text), 4000)]
    corpora = {"all": texts, "short": short, "a": texts[:half], "b": texts[half:], "line": ["".join(texts)]}
    for name, part in corpora.items():
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))

    with (scratch / "chats.jsonl").open("w") as stream:
        for text in texts:
            said = [text[start : start + 1000] for start in range(0, len(text), 1000)]
            for start in range(0, len(said), 4):
                turns = zip(("user", "assistant") * 2, [*said[start : start + 4], *["alpha"] * 3][:4], strict=True)
                messages = [
                    {"role": role, "content": content if content.strip() else "beta"} for role, content in turns
                ]
                stream.write(json.dumps({"messages": messages}) + "\n")
    with (scratch / "prompts.jsonl").open("w") as stream:
        for text in texts:
            for start in range(0, len(text), 2000):
                prompt, completion = text[start : start + 1000], text[start + 1000 : start + 2000]
                pair = {"prompt": prompt, "completion": completion if completion.strip() else "alpha"}
                stream.write(json.dumps(pair) + "\n")
    (scratch / "plain.jinja").write_text(CHATML)
    (scratch / "marked.jinja").write_text(MARKED)

    def chats(name: str) -> dict[str, object]:
        return {**source("chats"), "instructions": {"messages": "messages", "chat_template": str(scratch / name)}}

    def source(name: str) -> dict[str, object]:
        return {"source": "jsonl", "paths": [str(scratch / f"{name}.jsonl")]}

    contestants: dict[str, dict[str, object]] = {
        "plain text": source("all"),
        "the same, cut": source("short"),
        "mixture of two": {"sources": [{"name": name, "weight": 1, **source(name)} for name in ("a", "b")]},
        "one line": source("line"),
        "prompts": {**source("prompts"), "instructions": {"prompt": "prompt", "completion": "completion"}},
        "conversations": chats("plain.jinja"),
        "with marks": chats("marked.jinja"),
    }
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, float] = {}
    encoded: dict[str, float] = {}
    os.environ["RELORA_CACHE"] = str(scratch / "cache")
    for number in range(rounds):
        for name, data in contestants.items():
            settings = {"data": {"workers": workers, **data}, "tokenizer": {"path": str(scratch)}}
            settings |= {"batch": {"documents": "mask"}} if "instructions" in data else {}
            own = load_profile("quickstart", settings)
            watched = WorkerMemory(b"relora_train.data.prepare")
            watched.start()
            store, made = str(scratch / f"{name}-{number}"), list[DatasetOutcome]()
            spent, _ = measured(
                lambda o=own, s=store, m=made: m.append(prepare_or_reuse(Run("run", s, o), on_event=lambda event: None))
            )
            parts = [part for part in parts_of(made[0].dataset).values() if part] or [made[0].dataset]
            encoded[name] = sum(part.manifest.train_bytes + part.manifest.val_bytes for part in parts) / 1e6
            cpu[name].append(spent)
            memory[name] = watched.largest_mb
    speeds = {name: encoded[name] / statistics.median(spent) for name, spent in cpu.items()}
    show(f"{'':16}{'MB':>10}{'MB/CPU-s':>10}{'of plain':>10}{'of cut':>10}{'largest preparing process, MB':>32}")
    for name, speed in speeds.items():
        of_plain, of_cut = (speed / speeds[other] for other in ("plain text", "the same, cut"))
        show(f"{name:16}{encoded[name]:10.1f}{speed:10.2f}{of_plain:10.2f}{of_cut:10.2f}{memory[name]:32.0f}")


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
