"""What a series has promoted: pointer and history move together, no writer is lost, and nothing promoted is pruned."""

import json
import math
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from bundles import checkpoint_manifest
from hypothesis import given
from hypothesis import strategies as st
from made_up_corpus import made_up_text
from tiny_data import write_tiny_dataset

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.checkpoints.pins import pins_in
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import find_champion, list_series, promote, read_series, roll_back
from relora_train.checkpoints.series_record import Change, Scores, champions_in_order, protected_by
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.retention import RetentionPolicy
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    CorpusTooSmallError,
    PreconditionFailedError,
)
from relora_train.runs.retraining.interface import RetrainOptions
from relora_train.runs.retraining.retrain import judge, plan_retrain, prepare_next
from relora_train.runs.retraining.series_data import Pending, begin, end, read_data
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

EVERYTHING_IS_OLD = timedelta(seconds=-1)


def line_of_run(store: ObjectStore, files: Path, count: int, run_id: str = "run") -> list[CheckpointRef]:
    refs: list[CheckpointRef] = []
    for number in range(1, count + 1):
        parent = refs[-1] if refs else None
        manifest = checkpoint_manifest(
            files, run_id=run_id, step=100 * number, work=f"{run_id} {number}", stage=f"cycle-{number}", parent=parent
        ).model_copy(update={"cycle": number})
        refs.append(CheckpointStore(store, run_id).commit(files, manifest))
    CheckpointStore(store, run_id).set_head(refs[-1])
    return refs


def promoted(store: ObjectStore, name: str = "s") -> str:
    return resolve_checkpoint(f"series:{name}", store).manifest.stage


# --- the pointer and its history ---


def test_a_promotion_moves_the_pointer_and_is_written_down(store: ObjectStore, files: Path):
    one, two = line_of_run(store, files, 2)
    assert find_champion(store, "s") is None and list_series(store) == []
    promote(store, "s", one, reason="the first")
    made = promote(store, "s", two, reason="better", expected=one.prefix)
    assert promoted(store) == "cycle-2" and list_series(store) == ["s"]
    assert resolve_checkpoint("series:s@1", store).uri == one.uri
    assert [(c.number, c.checkpoint, c.replaced, c.reason) for c in read_series(store, "s").changes] == [
        (1, one.prefix, None, "the first"), (2, two.prefix, one.prefix, "better")
    ]  # fmt: skip
    assert made.by.count("@") == 1 and made.at.tzinfo is not None
    assert promote(store, "s", two, reason="again") == made  # safe to repeat
    assert not pins_in(store, "run")  # the mark that protects it on the way is gone


def test_a_candidate_is_not_promoted_over_a_champion_it_was_not_compared_with(store: ObjectStore, files: Path):
    one, two, three = line_of_run(store, files, 3)
    promote(store, "s", one, reason="", expected=None)
    with pytest.raises(PreconditionFailedError, match="was moved to"):
        promote(store, "s", two, reason="", expected=None)
    promote(store, "s", three, reason="by hand")
    with pytest.raises(PreconditionFailedError, match="relora promote s"):
        promote(store, "s", two, reason="", expected=one.prefix)
    assert promoted(store) == "cycle-3" and not pins_in(store, "run")


def test_of_many_writers_at_once_none_is_lost(store: ObjectStore, files: Path):
    refs = line_of_run(store, files, 6)
    together, failures = threading.Barrier(len(refs)), []

    def write(ref: CheckpointRef) -> None:
        together.wait()
        try:
            promote(open_store(store.uri), "s", ref, reason=ref.manifest.stage)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(ref,)) for ref in refs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = read_series(store, "s").changes
    assert not failures and {change.checkpoint for change in changes} == {ref.prefix for ref in refs}
    assert [change.replaced for change in changes] == [None, *(change.checkpoint for change in changes[:-1])]


def test_a_rollback_goes_back_one_champion_at_a_time_or_to_a_number(memory: ObjectStore, files: Path):
    for ref in line_of_run(memory, files, 4):
        promote(memory, "s", ref, reason="")
    assert roll_back(memory, "s", reason="bad").back_to == 3 and promoted(memory) == "cycle-3"
    roll_back(memory, "s", reason="bad too")
    assert promoted(memory) == "cycle-2"  # further back, not forth again
    roll_back(memory, "s", 4, reason="was good after all")
    assert promoted(memory) == "cycle-4"
    roll_back(memory, "s", 5, reason="what change 5 had made")
    assert promoted(memory) == "cycle-3"
    assert len(read_series(memory, "s").changes) == 8  # nothing is ever taken out
    with pytest.raises(ConfigError, match="is the champion of series 's' already"):
        roll_back(memory, "s", 3, reason="")
    with pytest.raises(CheckpointNotFoundError, match="1 to 8, and none numbered 9"):
        roll_back(memory, "s", 9, reason="")


def test_there_must_be_something_to_go_back_to(memory: ObjectStore, files: Path):
    with pytest.raises(CheckpointNotFoundError, match=r"no series 's'.* Series there: none"):
        roll_back(memory, "s", reason="")
    promote(memory, "s", line_of_run(memory, files, 1)[0], reason="")
    with pytest.raises(CheckpointNotFoundError, match="no champion before"):
        roll_back(memory, "s", reason="")
    with pytest.raises(CheckpointNotFoundError, match="none numbered 2"):
        resolve_checkpoint("series:s@2", memory)
    with pytest.raises(ConfigError, match="write series:NAME"):
        resolve_checkpoint("series:../s", memory)


def test_after_a_rollback_the_loss_of_the_champion_is_shown_again(tmp_path: Path, files: Path, relora):
    store = open_store(tmp_path)
    for ref, loss in zip(line_of_run(store, files, 2), (3.25, 3.5), strict=True):
        promote(store, "s", ref, reason="", scores=Scores(candidate_loss=loss, champion_loss=None, dataset_uri="d"))
    roll_back(store, "s", reason="")
    for arguments in (["series"], ["series", "s"]):
        shown = relora(*arguments, "--store", str(tmp_path)).out
        (line,) = [line for line in shown.splitlines() if " 3 " in line and "run@cycle-1" in line]
        assert "3.2500" in line and "–" not in line


def change(number: int, back_to: int | None) -> Change:
    return Change(
        number=number, kind="rollback" if back_to else "promote", fingerprint="f", stage="cycle-1", step=1,
        checkpoint=f"runs/r/checkpoints/step-00000001-{number:012x}", replaced=None, by="me", reason="",
        back_to=back_to, nonce="n",
    )  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=25))
def test_for_any_history_the_last_change_is_the_champion_and_every_champion_was_promoted(draws: list[float]):
    changes: list[Change] = []
    for index, draw in enumerate(draws):
        # Half of the changes go back to any promotion before them.
        earlier = [one.number for one in changes if one.back_to is None]
        back_to = earlier[int(2 * draw * len(earlier)) % len(earlier)] if draw < 0.5 and earlier else None
        changes.append(change(index + 1, back_to))
    line = champions_in_order(changes)
    last = changes[-1]
    assert line[-1].number == (last.back_to or last.number)
    assert len({one.number for one in line}) == len(line) and all(one.back_to is None for one in line)


def test_a_damaged_record_is_named_with_the_way_out_and_nothing_is_pruned(memory: ObjectStore, files: Path):
    one, two = line_of_run(memory, files, 2)
    promote(memory, "s", one, reason="")
    good = json.loads(memory.get_bytes("series/s/promoted.json")[0])
    renumbered = {**good, "changes": [{**good["changes"][0], "number": 2}]}
    for damaged in (b"", b"{", json.dumps({**good, "series": "t"}).encode(), json.dumps(renumbered).encode()):
        memory.put_bytes("series/s/promoted.json", damaged)
        for act in (lambda: promoted(memory), lambda: promote(memory, "s", two, reason="")):
            with pytest.raises(CheckpointCorruptError, match=r"series/s/promoted\.json is damaged.*relora promote s"):
                act()
        if b'"t"' not in damaged:  # a record that was renamed still protects what it names
            with pytest.raises(CheckpointCorruptError, match="nothing is removed"):
                prune_run(memory, "run", RetentionPolicy(keep_last=1), grace=EVERYTHING_IS_OLD)
    memory.put_bytes("series/s/data.json", b"{")
    with pytest.raises(CheckpointCorruptError, match=r"data\.json is damaged"):
        read_data(memory, "s")


def test_a_checkpoint_of_another_store_is_not_promoted(memory: ObjectStore, files: Path, tmp_path: Path):
    (ref,) = line_of_run(open_store(tmp_path / "other"), files, 1)
    with pytest.raises(ConfigError, match="does not lie in a run of memory://"):
        promote(memory, "s", ref, reason="")


# --- pruning ---


def test_the_champion_and_those_it_can_go_back_to_survive_every_prune(store: ObjectStore, files: Path):
    refs = line_of_run(store, files, 7)
    for ref in refs[:6]:
        promote(store, "s", ref, reason="")
    report = prune_run(store, "run", RetentionPolicy(keep_last=1), grace=EVERYTHING_IS_OLD)
    assert [ref.manifest.stage for ref in report.removed] == ["cycle-1", "cycle-2"]
    reasons = {verdict.checkpoint.manifest.stage: verdict.reasons for verdict in report.verdicts}
    assert "promoted in series s" in reasons["cycle-6"] and "series s can go back to it" in reasons["cycle-3"]
    with pytest.raises(CheckpointNotFoundError, match="was removed by `relora prune`"):
        roll_back(store, "s", 2, reason="")
    roll_back(store, "s", reason="")
    assert promoted(store) == "cycle-5"
    kept = protected_by(read_series(store, "s"))
    assert set(kept) == {ref.prefix for ref in refs[1:6]}  # cycle-6 too: a rollback can be taken back
    with pytest.raises(CheckpointNotFoundError):
        promote(store, "s", refs[0], reason="pruned")


def test_a_series_leaves_nothing_that_verify_finds_fault_with(memory: ObjectStore, files: Path):
    one, two = line_of_run(memory, files, 2)
    before = verify_run(memory, "run").findings
    promote(memory, "s", one, reason="")
    promote(memory, "s", two, reason="")
    assert verify_run(memory, "run").findings == before


# --- one retrain's decision ---


@pytest.mark.parametrize(
    ("candidate", "champion", "margin", "kind", "better"),
    [
        (3.0, None, 0.5, "relative", True),
        (2.9, 3.0, 0.0, "relative", True),
        (3.0, 3.0, 0.0, "relative", False),
        (3.1, 3.0, 0.0, "absolute", False),
        (2.98, 3.0, 0.01, "relative", False),
        (2.96, 3.0, 0.01, "relative", True),
        (2.75, 3.0, 0.25, "absolute", True),
        (2.76, 3.0, 0.25, "absolute", False),
        (math.nan, 3.0, 0.0, "relative", False),
        (math.inf, None, 0.0, "relative", False),
        (3.0, math.inf, 0.5, "relative", True),
    ],
)
def test_only_a_loss_lower_by_the_margin_is_better(candidate, champion, margin, kind, better):
    assert judge(candidate, champion, margin, kind)[0] is better


@pytest.mark.parametrize(
    ("candidate", "champion", "margin", "kind", "better"),
    [
        (0.3, None, 0.5, "relative", True),
        (0.31, 0.3, 0.0, "relative", True),
        (0.3, 0.3, 0.0, "absolute", False),
        (0.29, 0.3, 0.0, "relative", False),
        (0.32, 0.3, 0.1, "relative", False),
        (0.34, 0.3, 0.1, "relative", True),
        (0.34, 0.3, 0.1, "absolute", False),
        (0.1, 0.0, 0.5, "relative", True),
        (-1.8, -2.0, 0.2, "relative", False),
        (math.nan, 0.3, 0.0, "relative", False),
    ],
)
def test_only_a_score_higher_by_the_margin_passes_a_gate(candidate, champion, margin, kind, better):
    passed, reason = judge(candidate, champion, margin, kind, gate="arc/acc")
    assert passed is better and "arc/acc" in reason and "loss" not in reason


def test_new_objects_below_an_s3_prefix_are_found_and_tokenized_with_the_champions_tokenizer(
    s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    store = open_store(s3_store_uri)
    incoming = open_store(f"{s3_store_uri}/incoming")
    made = write_tiny_dataset(tmp_path / "tiny")
    champion = line_of_run(store, made, 1)[0]
    promote(store, "s", champion, reason="an existing model begins the series")
    settings = Profile.model_validate(
        {
            "data": {"source": "jsonl", "paths": [f"{s3_store_uri}/incoming/"], "validation_fraction": 0.3},
            "batch": {"sequences": 2, "sequence_length": 16},
            "schedule": {"cycles": 1},
        }
    )

    def arrive(night: int) -> None:
        rows = (json.dumps({"text": f"night {night} document {row} " * 20}) + "\n" for row in range(30))
        incoming.put_bytes(f"{night}.jsonl", "".join(rows).encode())

    arrive(0)
    plan = plan_retrain(store, "s", settings, RetrainOptions(cycles=3))
    assert len(plan.new) == 1 and plan.parent.uri == champion.uri and plan.profile.schedule.cycles == 4
    outcome = prepare_next(plan.run, plan, on_event=lambda event: None)
    sha256 = {entry.path: entry.sha256 for entry in outcome.dataset.manifest.files}["tokenizer.json"]
    assert sha256 in {entry.sha256 for entry in champion.manifest.files}
    end(store, "s", plan.new, replaces=False)
    assert plan_retrain(store, "s", settings, RetrainOptions()) is None
    arrive(1)
    following = plan_retrain(store, "s", settings, RetrainOptions())
    assert len(following.new) == 1 and following.text.selection.old == plan.new
    assert following.run_id != plan.run_id


def test_a_series_needs_documents_of_which_the_rule_holds_some_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A document that was moved by hand one night could be trained on the next."""
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    book, store = tmp_path / "book.txt", open_store(tmp_path / "store")
    book.write_text(" ".join(made_up_text(seed) for seed in range(60)))
    data = {"source": "text", "paths": [str(book)]}
    batch = {"sequences": 2, "sequence_length": 16}
    settings = Profile.model_validate({"data": data, "tokenizer": {"vocab_size": 300}, "batch": batch})
    plan = plan_retrain(store, "s", settings, RetrainOptions())
    with pytest.raises(CorpusTooSmallError, match="needs documents of which the split rule holds some out"):
        prepare_next(plan.run, plan, on_event=lambda event: None)
    named = Profile.model_validate({"data": {**data, "validation_paths": [str(book)]}})
    with pytest.raises(ConfigError, match="validation_paths does not go with it"):
        plan_retrain(store, "s", named, RetrainOptions())


def test_a_hub_revision_is_seen_as_a_whole(memory: ObjectStore):
    first, second = "0" * 40, "1" * 40
    begin(memory, "s", Pending(run_id="r", new=(first,), champion=None), 0.05)
    end(memory, "s", (first,), replaces=True)
    end(memory, "s", (second,), replaces=True)
    assert read_data(memory, "s")[0].seen == (second,)


# --- what people see ---


def test_the_commands_promote_show_and_roll_back(files: Path, tmp_path: Path, relora, monkeypatch: pytest.MonkeyPatch):
    store = open_store(tmp_path / "store")
    one, two = line_of_run(store, files, 2)
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "400")

    def said(*arguments: str) -> str:
        done = relora(*arguments)
        assert done.code == 0, done.err
        return done.out

    assert "No series has promoted" in said("series")
    assert one.uri in said("promote", "s", "run@cycle-1", "--reason", "it is the first")
    said("promote", "s", two.uri)
    assert "run@cycle-2" in said("series")
    history = said("series", "s")
    assert "it is the first" in history and two.uri in history
    assert one.uri in said("promote", "s", "--rollback", "--reason", "it wrote nonsense")
    assert "run@cycle-1" in said("series")
    shown = json.loads(said("series", "s", "--json"))
    assert shown["champion"] == one.uri and shown["changes"][2]["reason"] == "it wrote nonsense"
    assert json.loads(said("series", "--json"))[0]["series"] == "s"
    assert one.uri in said("show", "series:s")
