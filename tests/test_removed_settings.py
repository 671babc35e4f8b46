"""Keys that were removed: nothing trains by them any more, and what was trained by them is read as before.

removed_keys/ is a store with a warm start and a cycle of an 1,400-parameter model, made by commit 1a88187 with all of
these keys set.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stage_runs import CPU, ignore, manifest_of

from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import ParentRef
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import ConfigError, ProfileInvalidError
from relora_train.method.stages import fingerprint_settings, stage_fingerprint, stages_after
from relora_train.runs.retry import retry_stage
from relora_train.settings.keys import LAST_COMMIT_WITH_REMOVED_KEYS, REMOVED_KEYS
from relora_train.settings.load import load_profile
from relora_train.settings.profile import profile_to_read
from relora_train.storage.opening import open_store
from relora_train.training.build import prepare_stage
from relora_train.training.evaluate import evaluate_checkpoint
from relora_train.training.requests import EvaluationRequest, StageRequest
from relora_train.training.trainer import run_stage

SAMPLE = Path(__file__).parent / "removed_keys"
OTHERS: dict[str, Any] = {
    "rank_allocation": "warm-start-spectrum", "init": "gradient", "merge_dtype": "bfloat16", "low_rank_lr_ratio": 0.5,
    "low_rank_b_lr_ratio": 4.0,
}  # fmt: skip
KEYS = [(section, key) for section, defaults in REMOVED_KEYS.items() for key in defaults]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RELORA_STORE", str(tmp_path / "store"))
    shutil.copytree(SAMPLE, tmp_path / "store")
    for path in (tmp_path / "store").rglob("manifest.json"):
        path.write_text(path.read_text().replace("file:///sample", (tmp_path / "store").as_uri()))
    return tmp_path / "store"


@pytest.fixture
def line(store: Path) -> list[CheckpointRef]:
    return CheckpointStore(open_store(store.as_uri()), "removed").list()


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_removed_key_is_refused_with_the_last_commit_that_had_it(section: str, key: str):
    with pytest.raises(ProfileInvalidError, match=rf"{section}\.{key} = .* removed.*{LAST_COMMIT_WITH_REMOVED_KEYS}"):
        load_profile("smoke", {f"{section}.{key}": OTHERS[key]})
    assert load_profile("smoke", {f"{section}.{key}": REMOVED_KEYS[section][key]}) == load_profile("smoke")


def test_the_sample_has_every_removed_key(line: list[CheckpointRef], store: Path):
    settings = json.loads((store / line[-1].prefix / "profile.json").read_bytes())
    assert {key: settings[section][key] for section, key in KEYS} == {key: OTHERS[key] for _, key in KEYS}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("show removed@latest", "Over all layers: relative update norm 0.7539"),
        ("show removed", "cycle-1"),
        ("runs --tree", "removed"),
        ("verify removed", "in 3 bundles"),
        ("export removed OUT", "step 16"),
        ("report removed", "report.html"),
        ("prune removed --keep-last 1", "warm-start"),
        ("analyze removed", "cycle-1"),
    ],
)
def test_a_checkpoint_that_was_trained_by_removed_keys_is_read(
    store: Path, tmp_path: Path, relora, command: str, words: str
):
    said = relora(*(argument.replace("OUT", str(tmp_path / "out")) for argument in command.split()))
    assert said.code == 0 and words in said.out + said.err, said


def test_it_is_evaluated_to_the_scores_that_it_was_committed_with(line: list[CheckpointRef], store: Path):
    directory = store / line[-1].prefix
    profile = profile_to_read((directory / "profile.json").read_bytes())
    evaluate_checkpoint(
        EvaluationRequest(
            profile=profile, checkpoint_directory=directory, dataset_directory=next((store / "datasets").glob("*/*")),
            result_path=store / "result.json", sequences=profile.evaluation.final_sequences,
        ),
        ignore,
    )  # fmt: skip
    scores = json.loads((store / "result.json").read_bytes())
    assert scores["val_loss"] == pytest.approx(line[-1].manifest.evaluation["val_loss"], rel=1e-5)


def test_a_merge_that_was_rounded_is_no_adapter_of_its_base(store: Path, tmp_path: Path, relora):
    said = relora("export", "removed", str(tmp_path / "out"), "--as-adapter")
    assert said.code == 4 and "rounded (relora.merge_dtype)" in said.err
    assert not (tmp_path / "out").exists()


def test_its_stage_is_not_trained_again(line: list[CheckpointRef]):
    with pytest.raises(ConfigError, match=rf"relora\.init: gradient -> absent .*{LAST_COMMIT_WITH_REMOVED_KEYS}"):
        retry_stage(line[-1], on_event=ignore)


@pytest.mark.parametrize("end", [0, -1], ids=["its warm start", "its cycle"])
def test_another_run_branches_from_it_without_the_keys(
    line: list[CheckpointRef], store: Path, tmp_path: Path, end: int
):
    parent, directory = line[end], store / line[end].prefix
    profile = profile_to_read((directory / "profile.json").read_bytes())
    profile = profile.model_copy(update={"schedule": profile.schedule.model_copy(update={"cycles": 2})})
    stage = stages_after(profile, parent.manifest)[0]
    settings = fingerprint_settings(profile, stage, parent.manifest.dataset_id)
    request = StageRequest(
        run_id="branch", profile=profile, stage=stage, fingerprint_settings=settings,
        fingerprint=stage_fingerprint(settings, parent.fingerprint),
        parent=ParentRef(uri=parent.uri, fingerprint=parent.fingerprint, step=parent.step), parent_directory=directory,
        dataset_uri=parent.manifest.dataset_uri, dataset_id=parent.manifest.dataset_id,
        dataset_directory=next((store / "datasets").glob("*/*")), output_directory=tmp_path / "out",
    )  # fmt: skip
    moments = prepare_stage(request, CPU).optimizer.state
    assert bool(moments) == (end == -1), "embedding and norms go on; A and B of another rank begin anew"
    run_stage(request, ignore)
    assert manifest_of(tmp_path / "out")["stage"] == stage.name
