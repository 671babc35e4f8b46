"""A retrain's decision: which data count as seen, and the same end wherever it was killed."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from test_series import line_of_run, promoted

from relora_train.checkpoints.lease import hold_series
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import DatasetManifest
from relora_train.checkpoints.series import find_champion, promote, read_series
from relora_train.data.selection import Selection
from relora_train.runs.datasets import TextSettings
from relora_train.runs.retraining import retrain
from relora_train.runs.retraining.interface import RetrainOptions, summarize
from relora_train.runs.retraining.retrain import RetrainPlan, conclude, plan_retrain, start
from relora_train.runs.retraining.series_data import read_data, read_decisions
from relora_train.runs.run import DatasetRef, StageOutcome
from relora_train.settings.data import DataConfig, TokenizerConfig
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from tasks.series import retrain_markdown


def plan_for(store: ObjectStore, champion: CheckpointRef | None, new: tuple[str, ...] = ("f" * 64,), **options: Any):
    return RetrainPlan(
        series="s", store_uri=store.uri, options=RetrainOptions(**options), profile=Profile(), champion=champion,
        text=TextSettings(DataConfig(), TokenizerConfig(), Selection(new=new)), new=new, run_id="run",
    )  # fmt: skip


def decide(plan: RetrainPlan, candidate: CheckpointRef, loss: float, champion_loss: float | None):
    manifest = DatasetManifest.model_construct(name="x", dataset_id="d")
    dataset = DatasetRef("memory://d", manifest)
    theirs = None if champion_loss is None else {"val_loss": champion_loss}
    return conclude(plan, candidate, {"val_loss": loss}, theirs, dataset, provenance={})


def test_data_counts_as_seen_when_its_candidate_is_decided_and_not_before(memory: ObjectStore, files: Path):
    one, two, three = line_of_run(memory, files, 3)
    plan = plan_for(memory, None, ("a" * 64,))
    start(plan)
    data = read_data(memory, "s")[0]
    assert data.seen == () and data.pending.new == ("a" * 64,)
    assert decide(plan, one, 3.0, None).outcome == "promoted"
    assert read_data(memory, "s")[0].seen == ("a" * 64,) and read_data(memory, "s")[0].pending is None
    refused = decide(plan_for(memory, one, ("b" * 64,)), two, 3.5, 3.0)
    assert refused.outcome == "refused" and promoted(memory) == "cycle-1"
    assert read_data(memory, "s")[0].seen == ("a" * 64, "b" * 64)
    again = decide(plan_for(memory, one, ("c" * 64,), retry_refused=True), three, math.inf, 3.0)
    assert again.outcome == "refused" and read_data(memory, "s")[0].seen == ("a" * 64, "b" * 64)
    assert [d.scores["candidate_loss"] for d in read_decisions(memory, "s")] == [3.0, 3.5, "inf"]


def test_a_gate_decides_in_place_of_the_loss_and_both_are_kept(memory: ObjectStore, files: Path):
    one, two, _ = line_of_run(memory, files, 3)
    dataset = DatasetRef("memory://d", DatasetManifest.model_construct(name="x", dataset_id="d"))
    decide(plan_for(memory, None), one, 3.0, None)
    for score, outcome in ((0.2, "refused"), (0.5, "promoted")):
        plan = plan_for(memory, one, gate="arc/acc", retry_refused=True)
        ours, theirs = {"val_loss": 2.0, "gate_score": score}, {"val_loss": 3.0, "gate_score": 0.3}
        made = conclude(plan, two, ours, theirs, dataset, provenance={})
        assert made.outcome == outcome and f"arc/acc {score:.4f} against 0.3000" in made.reason
        assert made.scores == {
            "candidate_loss": 2.0, "champion_loss": 3.0, "dataset_uri": dataset.uri,
            "gate": "arc/acc", "candidate_score": score, "champion_score": 0.3,
        }  # fmt: skip
        assert f"| score of the candidate | {score:.4f} |" in retrain_markdown(
            summarize(memory, "s", made.outcome, made.reason, scores=made.scores, candidate_uri=two.uri)
        )


def test_the_data_of_a_promotion_taken_back_can_be_trained_on_again(files: Path, tmp_path: Path, relora):
    store = open_store(tmp_path)
    one, two = line_of_run(store, files, 2)
    decide(plan_for(store, None, ("a" * 64,)), one, 3.0, None)
    plan = dataclasses.replace(plan_for(store, one, ("b" * 64, "c" * 64)), run_id="second")
    decide(plan, two, 2.0, 3.0)
    again = relora("promote", "s", "--rollback", "--data-again", "--store", str(tmp_path))
    assert "2 parts of the source are new again" in again.out
    assert read_data(store, "s")[0].seen == ("a" * 64,) and promoted(store) == "cycle-1"
    with hold_series(store, "s"):  # a retrain is under way
        refused = relora("promote", "s", "--rollback", "--to", "2", "--data-again", "--store", str(tmp_path))
    assert refused.code == 2 and promoted(store) == "cycle-1"


def test_a_champion_that_moved_meanwhile_leaves_candidate_and_data_for_later(memory: ObjectStore, files: Path):
    one, two, three = line_of_run(memory, files, 3)
    decide(plan_for(memory, None, ("a" * 64,)), one, 3.0, None)
    plan = plan_for(memory, one, ("b" * 64,))
    start(plan)
    promote(memory, "s", two, reason="by hand, while it trained")
    assert decide(plan, three, 1.0, 3.0).outcome == "overtaken"
    assert promoted(memory) == "cycle-2"
    data = read_data(memory, "s")[0]
    assert data.seen == ("a" * 64,) and data.pending is None


class KilledError(Exception):
    pass


@pytest.mark.parametrize("step", ["promote", "record_decision", "end"])
@pytest.mark.parametrize("done", [False, True])
def test_a_decision_killed_anywhere_comes_out_the_same(
    memory: ObjectStore, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, done: bool
):
    """Killed before or after each of its writes; the next retrain finds what is left to do and does it once."""
    corpus = tmp_path / "night.jsonl"
    corpus.write_text('{"text": "something"}\n')
    settings = Profile.model_validate({"data": {"source": "jsonl", "paths": [str(corpus)]}})
    (candidate,) = line_of_run(memory, files, 1)
    plan = dataclasses.replace(plan_retrain(memory, "s", settings, RetrainOptions()), run_id="run")
    start(plan)
    real = getattr(retrain, step)

    def killed(*arguments: Any, **named: Any) -> Any:
        if done:
            real(*arguments, **named)
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(retrain, step, killed)
        decide(plan, candidate, 3.0, None)
    planned = plan_retrain(memory, "s", settings, RetrainOptions())
    if find_champion(memory, "s") is None:
        assert planned.new == plan.new  # nothing is seen, nothing is skipped
        decide(plan, candidate, 3.0, None)
    else:
        assert planned is None  # what was promoted is not trained on twice
    (made,) = read_series(memory, "s").changes
    (decision,) = read_decisions(memory, "s")
    assert made.checkpoint == candidate.prefix and decision.outcome == "promoted"
    assert read_data(memory, "s")[0].seen == plan.new and read_data(memory, "s")[0].pending is None


def test_the_report_of_a_decision_says_what_to_do_next(memory: ObjectStore, files: Path):
    one, two = line_of_run(memory, files, 2)
    for plan, ref, losses, advice in (
        (plan_for(memory, None), one, (3.0, None), "relora promote s --rollback"),
        (plan_for(memory, one), two, (3.5, 3.0), f"relora promote s {two.uri}"),
    ):
        decision = decide(plan, ref, *losses)
        made = {"candidate_uri": ref.uri, "report_uri": "file:///r.html"}
        stages = [StageOutcome(ref, reused=False)]
        summary = summarize(memory, "s", decision.outcome, decision.reason, plan=plan, stages=stages, **made)
        markdown = retrain_markdown(summary)
        assert advice in markdown and decision.outcome in markdown and "file:///r.html" in markdown
    assert summary.champion_uri == one.uri and summary.stages_trained == 1
