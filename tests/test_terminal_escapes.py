"""Nothing that a store holds steers the terminal that shows it."""

import json
import logging
import os
import unicodedata
import uuid
from pathlib import Path
from typing import Any

import pytest
from bundles import checkpoint_manifest, write_files

from relora_train.checkpoints.manifest import (
    ParentRef,
)
from relora_train.checkpoints.pins import pin
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.series import promote as promote_checkpoint
from relora_train.checkpoints.status import RunStatus, status_key
from relora_train.cli.output import Warnings, harmless, say
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

STEERING = "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\x08\x9b1A\u202egnp\u2066"
"""Sets a title, clears the screen, colours, overwrites a line, and shows text backwards."""


def steering_characters(text: str) -> list[str]:
    """By what Unicode says of them."""
    reorders = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    controls = [each for each in text if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    return controls + [each for each in text if unicodedata.bidirectional(each) in reorders]


SHOWN = [
    ["runs"], ["runs", "--tree"], ["show", "run"], ["show", "run@latest"], ["verify", "run"],
    ["watch", "run"], ["watch", "run", "--once"], ["runs", "--failed"],
    ["verify", "run@latest"], ["prune", "run", "--dry-run", "--keep-last", "1"], ["series", "nightly"],
    ["promote", "nightly", "--rollback"], ["pin", "run@latest"], ["pin", "run@latest", "--remove"],
    ["retry", "run@latest"],    ["evaluate", "run@latest"], ["export", "run@latest", "out"], ["report", "run@latest"],
    ["show", "run@no-such-stage"], ["run", "smoke", "--resume-from", "run@latest"],
]  # fmt: skip


@pytest.fixture
def steering_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A run and a series whose every free text tries to steer a terminal."""
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RELORA_STORE", f"memory://steering-{uuid.uuid4().hex}")
    monkeypatch.chdir(tmp_path)
    store = open_store(os.environ["RELORA_STORE"])
    made, parent = checkpoint_manifest(write_files(tmp_path / "files", "a")), None
    for step, settings in ((400, {"x": "a"}), (500, {"x": STEERING, STEERING: 1})):
        update = {
            "step": step, "stage": f"cycle-{step}{STEERING}", "profile": STEERING, "versions": {STEERING: STEERING},
            "fingerprint": f"{step:064x}", "fingerprint_settings": settings, "dataset_uri": f"memory://x/{STEERING}",
            "dataset_id": STEERING, "parent": parent, "provenance": {STEERING: STEERING},
            "evaluation": {STEERING: 1.0, "val_loss": 1.0}, "merge_report": {STEERING: 1.0, "layers": {STEERING: {}}},
            "divergence": {
                "attempts": 1, "learning_rate": 1.0, "learning_rate_factor": 0.5, "profile_learning_rate": 2.0,
                "failures": [STEERING],
            },
        }  # fmt: skip
        ref = CheckpointStore(store, "run").commit(tmp_path / "files", made.model_copy(update=update))
        parent = parent or ParentRef(uri=f"{ref.uri}{STEERING}", fingerprint=ref.fingerprint, step=step)
    pin(store, ref, "kept", note=STEERING)
    promote_checkpoint(store, "nightly", ref, reason=STEERING)
    store.put_bytes("runs/damaged/checkpoints/step-00000001-0123456789ab/manifest.json", json.dumps(STEERING).encode())
    status = RunStatus(state="failed", profile=STEERING, stages={STEERING: 600}, stage=STEERING, message=STEERING)
    store.put_bytes(status_key("run"), status.to_bytes())
    return store


@pytest.mark.parametrize("command", SHOWN, ids=" ".join)
def test_nothing_in_a_store_steers_the_terminal(command: list[str], steering_store: ObjectStore, relora):
    said = relora(*command)
    assert said.out + said.err
    assert steering_characters(said.out + said.err) == []


@pytest.mark.parametrize("command", [["runs"], ["show", "run"], ["show", "run@latest"]], ids=" ".join)
def test_json_is_printed_as_it_is(command: list[str], steering_store: ObjectStore, relora):
    out = relora(*command, "--json").out
    assert "\x1b" not in out and STEERING in _texts(json.loads(out))


def _texts(value: Any) -> str:
    """All strings of a JSON value, one after the other."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_texts(each)}" for key, each in value.items())
    return " ".join(map(_texts, value)) if isinstance(value, list) else str(value)


def test_a_warning_that_nobody_shows_and_a_line_of_a_result_steer_nothing(capsys: pytest.CaptureFixture[str]):
    Warnings().handle(logging.LogRecord("relora_train", logging.WARNING, "", 0, "is %s", (STEERING,), None))
    say(f"is {STEERING}")
    for said in capsys.readouterr():
        assert said.startswith("is ") and steering_characters(said) == []


def test_what_people_write_is_shown_as_it_is():
    text = "Ünïcode — “quotes” 漢字 🎉 a\tb\nc \u200d"
    assert harmless(text) == text
