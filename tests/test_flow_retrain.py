"""A series is retrained night after night: real text, a real store, a real Prefect server, real processes killed."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect_server import PREFECT_WARNS, running_prefect
from task_files import write_tasks

from relora_train import events
from relora_train.checkpoints.lease import hold_series, take_lease
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.series import read_series
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.data.python_sources import stdlib_files
from relora_train.errors import ConfigError, CorpusTooSmallError, RunInUseError
from relora_train.events import Event
from relora_train.runs.evaluations import dataset_of
from relora_train.runs.retraining.interface import RetrainOptions, RetrainSummary
from relora_train.runs.retraining.retrain import plan_retrain
from relora_train.runs.retraining.series_data import read_data, read_decisions
from relora_train.settings.load import load_profile
from relora_train.storage.opening import open_store

pytestmark = PREFECT_WARNS

MODULES_A_NIGHT = 40


class Nights:
    """A series, the directory that its data arrives in, and the store it is kept in."""

    name = "nightly"

    def __init__(self, root: Path) -> None:
        self.incoming, self.store = root / "incoming", open_store(root / "store")
        self.incoming.mkdir()
        self.settings = {
            "launch.threads": 1, "data.source": "jsonl", "data.paths": [str(self.incoming)], "data.name": "nights",
            "data.max_documents": None, "schedule.cycles": 1, "evaluation.final_sequences": 16,
            "evaluation.sample_tokens": 1, "schedule.min_lr_ratio": 1.0,
        }  # fmt: skip

    def arrive(self, night: int, texts: Sequence[str] | None = None) -> None:
        """A file with that night's documents: some modules of the standard library."""
        paths = [file.path for file in stdlib_files()][night * MODULES_A_NIGHT :][:MODULES_A_NIGHT]
        texts = [path.read_text(errors="replace")[:8000] for path in paths] if texts is None else texts
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (self.incoming / f"night-{night:02d}.jsonl").write_text("".join(lines))

    def retrain(self, **options: Any) -> tuple[RetrainSummary, str, list[str]]:
        """The summary, the name of the flow run's state, the stages that were trained."""
        from flows.retrain import retrain

        overrides = {**self.settings, **options.pop("overrides", {})}
        seen: list[Event] = []
        with listening(seen):
            state = retrain(self.name, "smoke", overrides, self.store.uri, **options, return_state=True)
        summary = state.result()
        return summary, state.name, [event["stage"] for event in seen if event["event"] == "stage_started"]

    def plan(self, **options: Any) -> Any:
        settings = load_profile("smoke", self.settings)
        return plan_retrain(self.store, self.name, settings, RetrainOptions(**options))

    @property
    def champion(self) -> str:
        return resolve_checkpoint(f"series:{self.name}", self.store).uri


@contextmanager
def listening(seen: list[Event]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.event)

    handler = Handler()
    events.listen(handler)
    try:
        yield
    finally:
        events.unlisten(handler)


@pytest.fixture(scope="module", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    return Nights(tmp_path_factory.mktemp("nights"))


@pytest.fixture(scope="module")
def first(nights: Nights) -> RetrainSummary:
    """The first retrain of the series."""
    nights.arrive(0)
    summary, state, trained = nights.retrain()
    assert (state, trained) == ("Promoted", ["warm-start", "cycle-1"])
    return summary


def test_the_first_retrain_trains_the_whole_plan_and_is_promoted(first: RetrainSummary, nights: Nights):
    assert first.outcome == "promoted" and first.champion_uri == first.candidate_uri == nights.champion
    assert first.scores["champion_loss"] is None and first.new_parts == 1
    (change,) = read_series(nights.store, "nightly").changes
    assert change.run_id == first.run_id and change.scores.candidate_loss == first.scores["candidate_loss"]
    assert Path(first.report_uri.removeprefix("file://")).is_file()


def test_without_new_data_it_stops_early_and_says_so(first: RetrainSummary, nights: Nights):
    summary, state, trained = nights.retrain()
    assert (state, summary.outcome, trained) == ("NoNewData", "no-new-data", [])
    assert summary.champion_uri == first.champion_uri
    assert len(read_series(nights.store, "nightly").changes) == 1


def test_the_same_content_under_another_name_is_no_new_data(first: RetrainSummary, nights: Nights):
    copied = nights.incoming / "again.jsonl"
    copied.write_bytes((nights.incoming / "night-00.jsonl").read_bytes())
    assert nights.plan() is None
    copied.unlink()


def test_too_little_new_data_waits_for_more(first: RetrainSummary, nights: Nights):
    nights.arrive(50, ["def short(): pass\n"])
    summary, state, trained = nights.retrain(old_data_ratio=0.0)
    assert (state, summary.outcome, trained) == ("NotEnoughData", "not-enough-data", [])
    assert nights.plan().new  # still new
    (nights.incoming / "night-50.jsonl").unlink()
    with pytest.raises(CorpusTooSmallError):  # a series that has nothing to go on from cannot wait
        Nights.retrain(_beside(nights, "tiny", ["def short(): pass\n"]))


def _beside(nights: Nights, name: str, texts: list[str]) -> Nights:
    root = nights.incoming.parent / name
    root.mkdir()
    other = Nights(root)
    other.name = name
    other.arrive(0, texts)
    return other


@pytest.fixture(scope="module")
def refused(first: RetrainSummary, nights: Nights) -> RetrainSummary:
    nights.arrive(1)
    summary, state, trained = nights.retrain(margin=0.9, retry_refused=True)
    assert (state, trained) == ("Refused", ["cycle-2"])
    return summary


def test_a_candidate_below_the_margin_is_refused_and_the_champion_stays(
    refused: RetrainSummary, first: RetrainSummary, nights: Nights
):
    assert refused.outcome == "refused" and "a margin of 90.00%" in refused.reason
    assert nights.champion == first.champion_uri and refused.run_id != first.run_id
    candidate = resolve_checkpoint(refused.candidate_uri, nights.store).manifest
    assert candidate.parent.uri == first.champion_uri and candidate.cycle == 2


def test_a_doubled_retrain_adopts_what_the_first_one_did(refused: RetrainSummary, nights: Nights):
    again, state, trained = nights.retrain(margin=0.9, retry_refused=True)
    assert (again.run_id, again.candidate_uri) == (refused.run_id, refused.candidate_uri)
    assert (state, trained, again.stages_reused) == ("Refused", [], 1)


@pytest.fixture(scope="module")
def gated(refused: RetrainSummary, nights: Nights, tmp_path_factory: pytest.TempPathFactory) -> RetrainSummary:
    """The same candidate, judged by a task that both are as bad at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        gate = {"gate": "echo/exact_match", "gate_include": str(write_tasks(tmp_path_factory.mktemp("tasks")))}
        summary, state, trained = nights.retrain(retry_refused=True, gate_limit=2, **gate)
    assert (state, trained) == ("Refused", [])
    return summary


def test_a_gate_decides_whatever_the_loss_is(gated: RetrainSummary, refused: RetrainSummary):
    assert gated.candidate_uri == refused.candidate_uri
    assert "echo/exact_match 0.0000 against 0.0000, better by 0.0000; a margin of 0.00%" in gated.reason
    assert (gated.scores["candidate_score"], gated.scores["champion_score"]) == (0.0, 0.0)
    assert gated.scores["candidate_loss"] < gated.scores["champion_loss"], "by its loss it would be promoted"


@pytest.fixture(scope="module")
def second(gated: RetrainSummary, nights: Nights) -> RetrainSummary:
    """The same candidate, judged by a margin that it reaches."""
    summary, state, trained = nights.retrain(margin=0.0)
    assert (state, trained) == ("Promoted", [])
    return summary


def test_a_candidate_that_is_better_by_the_margin_is_promoted(
    second: RetrainSummary, refused: RetrainSummary, nights: Nights
):
    assert second.scores["candidate_loss"] < second.scores["champion_loss"]
    assert nights.champion == second.candidate_uri == refused.candidate_uri
    outcomes = [decision.outcome for decision in read_decisions(nights.store, "nightly")]
    assert outcomes == ["promoted", "refused", "refused", "promoted"]
    assert nights.retrain()[1] == "NoNewData"


def test_candidate_and_champion_are_scored_on_old_and_new_held_out_documents_alike(
    second: RetrainSummary, first: RetrainSummary, nights: Nights
):
    ref = resolve_checkpoint(second.candidate_uri, nights.store)
    manifest, before = dataset_of(ref).manifest, dataset_of(resolve_checkpoint(first.champion_uri, nights.store))
    assert manifest.inputs["source"]["old"] == before.manifest.inputs["source"]
    assert manifest.val_documents > 0 and manifest.inputs["tokenizer"].keys() == {"sha256"}
    tokenizers = {e.sha256 for m in (manifest, before.manifest) for e in m.files if e.path == "tokenizer.json"}
    assert len(tokenizers) == 1  # a model keeps its tokenizer, and losses stay comparable


def test_a_fresh_warm_start_takes_all_data_and_the_same_tokenizer(second: RetrainSummary, nights: Nights):
    nights.arrive(2)
    fresh, on = nights.plan(fresh_warm_start=True), nights.plan()
    assert fresh.parent is None and fresh.champion.uri == nights.champion
    assert set(fresh.text.selection.new) == {*on.text.selection.new, *on.text.selection.old}
    assert fresh.new == on.new and len(on.new) == 1
    assert fresh.text.tokenizer == on.text.tokenizer and fresh.run_id != on.run_id
    assert nights.plan(old_data_ratio=0.5).run_id != on.run_id  # another mix is another dataset


def test_a_killed_retrain_is_continued_with_its_own_data_and_skips_nothing(second: RetrainSummary, nights: Nights):
    """Killed with its trainer at work; more data comes before the rerun."""
    nights.arrive(2)
    planned = nights.plan()
    _kill_while_training(nights)
    data, _ = read_data(nights.store, "nightly")
    assert data.pending.run_id == planned.run_id and not set(planned.new) & set(data.seen)
    nights.arrive(3)
    summary, state, trained = nights.retrain()
    assert state in ("Promoted", "Refused") and summary.run_id == planned.run_id
    assert trained == ["cycle-3"] and summary.new_parts == 1
    assert resolve_checkpoint(summary.candidate_uri, nights.store).manifest.parent.uri == second.candidate_uri
    left = nights.plan()
    assert len(left.new) == 1 and left.new != planned.new  # what came meanwhile is next
    assert verify_run(nights.store, summary.run_id).is_clean


def _kill_while_training(nights: Nights) -> None:
    from prefect.settings import PREFECT_API_URL

    program = (
        "import json, logging, sys\n"
        "from relora_train import events\n"
        "from flows.retrain import retrain\n"
        "class Handler(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        if record.event['event'] in ('progress', 'stage_started'):\n"
        "            print(json.dumps(record.event), flush=True)\n"
        "events.listen(Handler())\n"
        f"retrain('nightly', 'smoke', json.loads(sys.argv[1]), {nights.store.uri!r})\n"
    )
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-c", program, json.dumps({**nights.settings, "launch.threads": 1})]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any('"progress"' in line for line in process.stdout)
        finally:
            process.send_signal(signal.SIGKILL)


def test_two_retrains_of_a_series_at_once_do_no_harm(
    first: RetrainSummary, nights: Nights, monkeypatch: pytest.MonkeyPatch
):
    with hold_series(nights.store, "nightly"):
        with pytest.raises(RunInUseError, match="Series 'nightly' is in use"):
            nights.retrain()
        monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "deployed")
        summary, state, trained = nights.retrain()
    assert (state, trained, summary.champion_uri) == ("AlreadyRunning", [], nights.champion), (
        "a schedule's is no failure"
    )


def test_two_prunes_of_a_run_at_once_do_no_harm(first: RetrainSummary, nights: Nights, monkeypatch: pytest.MonkeyPatch):
    from flows.prune import prune

    assert first.run_id is not None
    other = take_lease(nights.store, f"runs/{first.run_id}/prune.json", "The other prune", purpose="prune")
    try:
        with pytest.raises(RunInUseError, match="Pruning of run"):
            prune(store=nights.store.uri, run_id=first.run_id)
        monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "deployed")
        (report,) = prune(store=nights.store.uri, run_id=first.run_id)
    finally:
        other.release()
    assert report.verdicts == () and "in use" in report.notes[0]


def test_the_form_knows_the_bounds_of_every_parameter():
    from flows.retrain import retrain

    fields = retrain.parameters.model_dump()["properties"]
    assert (fields["old_data_ratio"]["minimum"], fields["old_data_ratio"]["exclusiveMaximum"]) == (0, 1)
    assert (fields["margin"]["minimum"], fields["cycles"]["minimum"]) == (0, 1)
    assert fields["margin_kind"]["enum"] == ["relative", "absolute"]
    assert all(field.get("description") for field in fields.values())


def test_settings_that_would_leak_held_out_documents_are_refused(first: RetrainSummary, nights: Nights):
    with pytest.raises(ConfigError, match=r"holds out 0\.1 of its documents"):
        nights.retrain(overrides={"data.validation_fraction": 0.05})
    with pytest.raises(ConfigError, match="there is no gate"):
        nights.retrain(gate_limit=3)
    with pytest.raises(ConfigError, match="nowhere, where tasks are to be included from, is no directory"):
        nights.retrain(gate="a/b", gate_include="/nowhere")
    with pytest.raises(ConfigError, match="must be below 1"):
        nights.retrain(margin=2.0)
    with pytest.raises(ParameterTypeError, match="series: String should match pattern"):
        Nights.retrain(_named(nights, "../escape"))


def _named(nights: Nights, name: str) -> Nights:
    other = object.__new__(Nights)
    other.__dict__.update(nights.__dict__)
    other.name = name
    return other
