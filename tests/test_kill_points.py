"""SIGKILL at every write of the protocol, one flow a write: the same command then ends with the same bytes, all clean.

The writes are those that an undisturbed run and an undisturbed prune make, by name (dying_flow.py). The normal suite
takes those that decide something and some of the others. All of them, and then on another machine too:
`python -m pytest -m slow tests/test_kill_points.py -s`.
"""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from dying_flow import RUN, Order
from seaweed import Seaweed
from test_kill_storm import attempts_of, weights_of
from tiny_data import write_tiny_dataset

from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.storage.opening import open_store

Points = Sequence[str]
_DECIDES = re.compile(
    r"(-> store|(before|after) PUT) \S*(manifest|claim|head|lease|deleted)\.json|-> cache.*manifest\.json"
)


class Flows:
    """Flows of one dataset, each in a process of its own; a trial is one store and what its machines have in theirs."""

    def __init__(self, server: subprocess.Popen[str], directory: Path) -> None:
        self.server, self.directory = server, directory
        self.environment: dict[str, str] = {}
        self.stores: Callable[[Path], str] = lambda trial: str(trial / "store")
        write_tiny_dataset(directory / "dataset", train_tokens=2000, val_tokens=400)

    def order(self, trial: Path, verb: str = "train", *, machine: str = "one", die_at: str | None = None) -> Order:
        return Order(
            verb, self.stores(trial), str(trial / machine), str(self.directory / "dataset"), str(trial / "log"),
            self.environment, die_at,
        )  # fmt: skip

    def live(self, order: Order) -> int:
        """The exit code of such a flow."""
        assert self.server.stdin is not None and self.server.stdout is not None
        Path(order.log).parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps(dataclasses.asdict(order)), file=self.server.stdin, flush=True)
        return int(json.loads(self.server.stdout.readline()))

    def points(self, order: Order) -> Points:
        """The writes of a flow that nothing disturbs, and where it can leave a file half written."""
        assert self.live(order) == 0
        names = Path(order.log).read_text().splitlines()
        midst = [f"{name}, half written" for before, name in itertools.pairwise(names) if before.startswith("open ")]
        return [*names, *midst]

    def verified(self, order: Order, point: str) -> dict[str, str]:
        """The digests of what the run came to, if nothing of it is damaged, missing or left over."""
        found = verify_run(open_store(order.store), RUN)
        assert found.is_clean, f"{point}: {found.findings}"
        assert not [path for path in Path(order.cache).glob("work/*/*") if path.is_dir()], point
        return weights_of(order.store, RUN)


def trials(flows: Flows, points: Iterable[str]) -> Iterator[tuple[str, Path]]:
    for number, point in enumerate(points):
        trial = flows.directory / f"trial-{number}"
        yield point, trial
        shutil.rmtree(trial)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flows]:
    command = [sys.executable, str(Path(__file__).with_name("dying_flow.py"))]
    directory = tmp_path_factory.mktemp("flows")
    with (
        (directory / "stderr").open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        assert server.stdout is not None and server.stdin is not None
        assert server.stdout.readline() == '"ready"\n', (directory / "stderr").read_text()
        yield Flows(server, directory)
        server.stdin.close()


@pytest.fixture
def flows(server: Flows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flows:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "of-the-test"))
    server.environment, server.stores = {}, lambda trial: str(trial / "store")
    return server


@pytest.fixture
def flows_over_s3(flows: Flows, seaweed: Seaweed, s3_store_uri: str) -> Flows:
    flows.environment = seaweed.environment
    flows.stores = lambda trial: f"{s3_store_uri}/{trial.name}"
    return flows


def some(points: Points, *, of_the_rest: int) -> Points:
    """Those that decide something, and so many others, evenly."""
    rest = [point for point in points if not _DECIDES.search(point)]
    return [point for point in points if _DECIDES.search(point)] + rest[:: len(rest) // of_the_rest]


def storm_over_training(flows: Flows, choose: Callable[[Points], Points], *, machines: Sequence[str]) -> int:
    """Die at each point, go on on one machine after another; the number of deaths."""
    undisturbed = flows.order(flows.directory / "undisturbed")
    points, deaths = choose(flows.points(undisturbed)), 0
    expected = flows.verified(undisturbed, "nowhere")
    assert len(expected) == 4
    shutil.rmtree(flows.directory / "undisturbed")
    for machine, (point, trial) in zip(itertools.cycle(machines), trials(flows, points), strict=False):
        died = flows.live(flows.order(trial, die_at=point))
        assert died in (0, -signal.SIGKILL), point
        committed = attempts_of(flows.stores(trial), RUN)
        again = flows.order(trial, machine=machine)
        assert flows.live(again) == 0, point
        assert committed.items() <= attempts_of(again.store, RUN).items(), f"{point}: a stage was done again"
        assert flows.verified(again, point) == expected, point
        deaths += died == -signal.SIGKILL
    sys.stdout.write(f"training: died at {deaths} of {len(points)} points, all survived\n")
    assert deaths > 0.95 * len(points)  # threads: now and then one does not come
    return deaths


def storm_over_prune(flows: Flows, choose: Callable[[Points], Points]) -> int:
    """Prune a trained run, die at each point, prune again; then the run is still as it should be."""
    trained, undisturbed = flows.directory / "trained", flows.directory / "pruned"
    assert flows.live(flows.order(trained)) == 0
    shutil.copytree(trained, undisturbed)
    points, deaths = choose(flows.points(flows.order(undisturbed, "prune"))), 0
    expected = flows.verified(flows.order(undisturbed), "nowhere")
    assert len(expected) == 2
    for point, trial in trials(flows, points):
        shutil.copytree(trained, trial)
        deaths += flows.live(flows.order(trial, "prune", die_at=point)) == -signal.SIGKILL
        assert flows.live(flows.order(trial)) == 0, point  # a flow between the two trains nothing again
        assert flows.live(flows.order(trial, "prune")) == 0, point
        assert flows.verified(flows.order(trial), point) == expected, point
    shutil.rmtree(trained)
    shutil.rmtree(undisturbed)
    sys.stdout.write(f"prune: died at {deaths} of {len(points)} points, all survived\n")
    assert deaths == len(points)
    return deaths


def test_a_run_survives_a_kill_at_the_writes_that_decide(flows: Flows):
    storm_over_training(flows, lambda points: some(points, of_the_rest=15), machines=["one"])


def test_a_prune_survives_a_kill_at_the_writes_that_decide(flows: Flows):
    storm_over_prune(flows, lambda points: some(points, of_the_rest=6))


def test_a_second_kill_on_another_machine_leaves_nothing_of_either(flows: Flows):
    """The first leaves plain names promised to bytes nobody will have again, the second a commit not cleaned up."""
    trial, place = flows.directory / "twice", "store/runs/run/checkpoints/step-00000008-*"
    first = f"os.link {place}/.tmp-* -> {place}/manifest.json #1"
    second = f"os.remove {place}/config.json #1"
    assert flows.live(flows.order(trial, die_at=first)) == -signal.SIGKILL
    kept = [info.key for info in open_store(flows.stores(trial)).list(f"runs/{RUN}/snapshots/")]
    assert any(key.endswith("manifest.json") for key in kept), "snapshots went before their stage was committed"
    assert flows.live(flows.order(trial, machine="two", die_at=second)) == -signal.SIGKILL
    assert not verify_run(open_store(flows.stores(trial)), RUN).is_clean
    assert flows.live(flows.order(trial, machine="two")) == 0
    assert len(flows.verified(flows.order(trial, machine="two"), second)) == 4


def test_a_run_over_s3_survives_a_kill_at_some_writes(flows_over_s3: Flows):
    commit = "after PUT runs/run/checkpoints/step-00000008-*/manifest.json #1"
    clearing = "after DELETE runs/run/snapshots/*/step-00000006-*/manifest.json #1"
    storm_over_training(flows_over_s3, lambda points: [p for p in points if p in (commit, clearing)], machines=["one"])


@pytest.mark.parametrize("kind", ["flows", "flows_over_s3"])
def test_no_name_is_given_before_its_bytes_are_on_the_disk(kind: str, request: pytest.FixtureRequest):
    flows: Flows = request.getfixturevalue(kind)
    trial = flows.directory / "traced"
    assert flows.live(flows.order(trial, "trace")) == 0
    assert (trial / "log").read_text().splitlines() == []
    shutil.rmtree(trial)


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_a_run_and_a_prune_survive_a_kill_at_every_write(flows: Flows):
    storm_over_training(flows, list, machines=["one", "two"])
    storm_over_prune(flows, list)


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_a_run_over_s3_survives_a_kill_before_and_after_every_request(flows_over_s3: Flows):
    storm_over_training(
        flows_over_s3, lambda points: [p for p in points if p.startswith(("before", "after"))], machines=["two"]
    )
