"""Mutation score: the share of small faults, put into the library one at a time, that a module's tests notice.

    pip install --constraint deploy/constraints.txt --editable ".[dev,mutation]"
    nice python tests/benchmarks/mutation.py [--modules schedule lease] [--sample 40] [--seed 0] [--jobs 1] [--again]

Faults are put into copies of the tree, never into this one. Each module's tests run once without a fault. They must
pass, and tell what each test costs and which lines it runs. Against a mutant go the tests that run its lines, cheapest
first, until one fails; a test that starts processes counts as running any line. Results are JSON lines. A mutant judged
there is not run again; with --again, survivors are. Mutants that change nothing stand in equivalent_mutants.toml with
the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, Place, places

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")

MODULES: dict[str, tuple[list[str], list[str]]] = {
    "schedule": (["method/schedule.py"], ["test_schedule.py"]),
    "merge": (
        ["method/layer.py", "method/wrap.py", "method/merge.py", "training/end_of_cycle.py"],
        ["test_relora.py", "test_merge.py", "test_precision.py"],
    ),
    "reset": (["method/reset.py", "training/optimizer.py"], ["test_optimizer.py"]),
    "stages": (
        ["method/stages.py"],
        [
            "test_stages.py",
            "test_branching.py",
            "test_schedule.py::test_a_run_with_growing_cycles_goes_on_as_it_is_and_takes_no_more_cycles",
        ],
    ),
    "manifest": (["checkpoints/manifest.py"], ["test_manifest.py"]),
    "bundle": (
        ["checkpoints/commit.py", "checkpoints/fetch.py"],
        ["test_bundle.py", "test_file_checks.py", "test_bundle_races.py", "test_bundle_cache.py"],
    ),
    "lease": (
        ["checkpoints/lease.py", "checkpoints/holder.py"],
        [
            "test_lease.py",
            "test_pruning.py::test_who_begins_to_depend_on_a_checkpoint_while_it_is_being_removed_keeps_it_or_is_told",
        ],
    ),
    "view": (["checkpoints/run.py"], ["test_requests.py", "test_checkpoint_store.py"]),
    "pruning": (
        ["checkpoints/upkeep/pruning.py", "checkpoints/upkeep/retention.py"],
        ["test_pruning.py", "test_prune_crashes.py"],
    ),
    "training step": (
        ["training/step.py", "training/build.py"],
        ["test_learning.py", "test_trainer.py", "test_sharding.py"],
    ),
    "dataset order": (["data/dataset.py"], ["test_dataset.py"]),
    "snapshot": (["training/snapshot.py", "checkpoints/snapshots.py"], ["test_snapshot.py", "test_snapshot_store.py"]),
}
"""The files of a module, under relora_train/, and the tests that state its properties, under tests/."""

LEFT_OUT = re.compile(r"(?<![^\W_])s3(?![^\W_])")
"""Tests with this word in their name: the other stores state the same properties in a tenth of the time."""

ELSEWHERE = "another process"
"""Stands for the lines that a test may run in a process it starts."""

# Imported once, before a process is forked for each mutant: most of a short test's time otherwise.
PRELOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "peft",
    "safetensors.torch",
    "numpy",
    "hypothesis",
    "pydantic",
    "boto3",
    "rich.console",
    "anyio.pytest_plugin",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="judge survivors again, as after a test was added")
    parser.add_argument("--table", action="store_true", help="run nothing: show what was judged")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutation.jsonl")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    for name in () if options.table else PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a forked process need not look at all this again
    assert not [name for name in sys.modules if name.startswith("relora_train")], "mutants would not be imported"
    # What a test leaves behind when its process is killed becomes our child, to be ended with it.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    table = []
    for module in options.modules:
        population = [place for path in MODULES[module][0] for place in places(ROOT, f"relora_train/{path}")]
        drawn = [place.mutant() for place in draw(population, options.sample, options.seed)]
        judged = read_results(options.results)
        todo = [
            mutant for mutant in drawn if not equivalence(mutant) and to_judge(judged.get(mutant.key), options.again)
        ]
        if todo and not options.table:
            judge(module, todo, options.results, options.jobs)
        table.append(row(module, len(population), drawn, read_results(options.results)))
    print("\n| module | places | drawn | killed | by timeout | survived | equivalent | score |")  # noqa: T201
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", *table, sep="\n")  # noqa: T201


def draw(population: list[Place], size: int, seed: int) -> list[Place]:
    """A random sample that stays the same, but for the places that changed, when the file is edited."""
    return sorted(population, key=lambda place: hashlib.sha256(f"{seed}/{place.key}".encode()).digest())[:size]


def to_judge(outcome: str | None, again: bool) -> bool:
    return outcome is None or (again and outcome == "survived")


def read_results(path: Path) -> dict[str, str]:
    """The last outcome of each mutant by its key."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["key"]: record["outcome"] for record in map(json.loads, lines)}


def equivalence(mutant: Mutant) -> str | None:
    """Why a mutant changes nothing that counts, if it is listed."""
    for known in tomllib.loads(EQUIVALENT.read_text()).get("mutant", []):
        if all(known[name] == getattr(mutant, name) for name in ("path", "function", "before", "after")):
            return str(known["reason"])
    return None


def row(module: str, population: int, drawn: list[Mutant], judged: dict[str, str]) -> str:
    equivalent = [mutant for mutant in drawn if equivalence(mutant)]
    rest = [mutant for mutant in drawn if mutant not in equivalent]
    survivors = [mutant for mutant in rest if judged.get(mutant.key) == "survived"]
    killed, late = (sum(judged.get(mutant.key) == outcome for mutant in rest) for outcome in ("killed", "timeout"))
    for mutant in survivors:
        print(f"survived: {mutant}")  # noqa: T201
    numbers = (population, len(drawn), killed, late, len(survivors), len(equivalent))
    score = f"{(killed + late) / max(1, killed + late + len(survivors)):.1%}"
    return f"| {module} | {' | '.join(map(str, numbers))} | {score} |"


def judge(module: str, mutants: list[Mutant], results: Path, jobs: int) -> None:
    """Append one line for each mutant. Each job has a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copies = [copied_tree(Path(scratch) / str(job)) for job in range(jobs)]
        tests = [f"tests/{name}" for name in MODULES[module][1]]
        seen = run_tests(copies[0], tests, Costs(copies[0], {mutant.path for mutant in mutants}), limit=3600)
        if seen["outcome"] != "passed":
            output = copies[0].with_suffix(".log").read_text()[-3000:]
            sys.exit(f"{output}\nThe tests of {module} do not pass without a fault: {seen['by']}")
        print(f"{module}: {len(seen['seconds'])} tests in {sum(seen['seconds'].values()):.0f} s")  # noqa: T201
        shares = [
            multiprocessing.Process(target=judge_share, args=(module, mutants[job::jobs], copy, tests, seen, results))
            for job, copy in enumerate(copies)
        ]
        for share in shares:
            share.start()
        for share in shares:
            share.join()


def judge_share(
    module: str, mutants: list[Mutant], copy: Path, tests: list[str], seen: dict[str, Any], results: Path
) -> None:
    limit = 60 + 4 * sum(seen["seconds"].values())
    for number, mutant in enumerate(mutants, start=1):
        source = copy / mutant.path
        original = source.read_text()
        source.write_text(mutant.source)
        os.utime(source, (number, number))  # else Python may take the bytecode of a mutant of the same size and second
        started = time.monotonic()
        lines = {ELSEWHERE, *(f"{mutant.path}:{line}" for line in mutant.lines)}
        if any(lines & set(ran) - {ELSEWHERE} for ran in seen["lines"].values()):
            covering = {test for test, ran in seen["lines"].items() if lines & set(ran)}
        else:
            covering = set(seen["lines"])  # a line of a module or class body runs at the import, before any test
        result = run_tests(copy, tests, Order(covering, seen["seconds"], seen["waits"]), limit=limit)
        source.write_text(original)
        outcome = {"passed": "survived", "failed": "killed"}.get(result["outcome"], result["outcome"])
        record = {
            "key": mutant.key, "module": module, "path": mutant.path, "function": mutant.function, "line": mutant.line,
            "before": mutant.before, "after": mutant.after, "outcome": outcome, "by": result.get("by"),
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{outcome:8} {record['seconds']:5} s  {mutant}  [{record['by']}]", flush=True)  # noqa: T201


def copied_tree(directory: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    return directory


def run_tests(copy: Path, tests: list[str], plugin: Report, *, limit: float) -> dict[str, Any]:
    """Run tests in a process forked from this one; "passed", "failed" or "timeout", with what the plugin saw."""
    answer = plugin.answer = copy.with_suffix(".json")
    answer.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(copy, tests, plugin, answer))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        os.kill(process.pid or 0, signal.SIGINT)  # lets pytest stop the servers it started
        process.join(20)
    end_children()
    process.join()
    if process.exitcode == 2:
        sys.exit(f"pytest ran no test of {', '.join(tests)}: {copy.with_suffix('.log').read_text()[-2000:]}")
    if late or not answer.exists():
        return {"outcome": "timeout" if late else "failed", "by": None if late else "the process ended"}
    return dict(json.loads(answer.read_text()))


def run_pytest(copy: Path, tests: list[str], plugin: Report, answer: Path) -> None:
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(copy)
    sys.dont_write_bytecode = False  # of the copy's unchanged files, once for all mutants
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in (str(ROOT), str(Path(__file__).parent)))]
    preloaded = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *preloaded, *tests],
        plugins=[plugin],
    )
    if code == pytest.ExitCode.NO_TESTS_COLLECTED or (
        code == pytest.ExitCode.USAGE_ERROR and isinstance(plugin, Costs)
    ):
        os._exit(2)
    if code == pytest.ExitCode.USAGE_ERROR:
        plugin.seen["by"] = "import of tests/conftest.py"
    plugin.seen["outcome"] = "passed" if code == 0 else "failed"
    answer.write_text(json.dumps(plugin.seen))
    os._exit(0)  # threads of a mutant may never end


def end_children() -> None:
    """End the tests' process and what it left behind; this process has no other children."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


class Report:
    """A pytest plugin that notes which test failed."""

    answer: Path
    """The file in which the process says what came of it."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"by": None, "seconds": {}, "lines": {}, "waits": {}}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if not self.takes(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def takes(self, item: pytest.Item) -> bool:
        return not LEFT_OUT.search(item.name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seen["seconds"][report.nodeid] = self.seen["seconds"].get(report.nodeid, 0) + report.duration
        if report.failed:
            self.seen["by"] = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.seen["by"] = f"import of {report.nodeid}"


class Order(Report):
    """Runs these tests only: files by their cost, then tests by theirs. Ends the process if one takes far too long."""

    def __init__(self, covering: set[str], seconds: dict[str, float], waits: dict[str, float]) -> None:
        super().__init__()
        self.covering, self.costs, self.waits = covering, seconds, waits
        self.files: dict[str, float] = {}
        for test in covering:
            self.files[_file(test)] = self.files.get(_file(test), 0) + seconds[test]

    def takes(self, item: pytest.Item) -> bool:
        return item.nodeid in self.covering

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        super().pytest_collection_modifyitems(config, items)
        items.sort(key=lambda item: (self.files[_file(item.nodeid)], _file(item.nodeid), self.costs[item.nodeid]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        limit = 30 + 5 * (self.costs[item.nodeid] + self.waits[item.nodeid])  # the first test waits for the fixtures
        timer = threading.Timer(limit, self._end, (item.nodeid,))
        timer.start()
        try:
            return (yield)
        finally:
            timer.cancel()

    def _end(self, test: str) -> None:
        self.answer.write_text(json.dumps({"outcome": "timeout", "by": test}))
        os._exit(0)


def _file(test: str) -> str:
    return test.partition("::")[0]


class Costs(Report):
    """Notes which lines of some files each test runs, its fixtures included, and which tests start processes."""

    def __init__(self, copy: Path, paths: set[str]) -> None:
        super().__init__()
        self._names = {str(copy / path): path for path in paths}
        self._lines: set[str] = set()
        self._shared: dict[str, set[str]] = {}
        self._waits: dict[str, float] = {}
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: Any) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            self._lines.add(ELSEWHERE)

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        path = self._names.get(frame.f_code.co_filename)
        if path is None:
            return None
        self._lines.add(f"{path}:{frame.f_lineno}")
        return self._trace

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """What a fixture of many tests runs once, counts for each of them."""
        before, self._lines, started = self._lines, set(), time.monotonic()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._waits[fixturedef.argname] = time.monotonic() - started
                server = {ELSEWHERE} if fixturedef.scope == "session" else set()  # it runs no line of ours
                self._shared[fixturedef.argname] = self._lines - server
            self._lines = before | self._lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Iterator[None]:
        self._lines = set()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            shared = [self._shared.get(name, set()) for name in item.fixturenames]
            self.seen["lines"][item.nodeid] = sorted(self._lines.union(*shared))
            self.seen["waits"][item.nodeid] = sum(self._waits.get(name, 0) for name in item.fixturenames)


if __name__ == "__main__":
    main()
