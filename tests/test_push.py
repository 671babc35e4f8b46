"""Exports on the hub: a stand-in of its API on loopback holds what was pushed; and the model card of every export."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub_stand_in import Hub, running_hub
from stage_runs import tiny_profile
from stored_runs import Workshop
from transformers import AutoModelForCausalLM

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.pins import pins_in
from relora_train.cli.export import export_model
from relora_train.errors import AccessDeniedError, ConfigError, StorageError, StoreUnavailableError
from relora_train.reports.collect import collect_run_data
from relora_train.reports.model_card import model_card
from relora_train.reports.report import summarize
from relora_train.runs.run import fetch_parent
from relora_train.storage.base import put_json

# The hub's client gives its files to its HTTP client by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCHEDULE = {"warm_start_steps": 2, "cycles": 2, "cycle_length": 3}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop") / "store", patch)


@pytest.fixture(scope="module")
def line(workshop: Workshop) -> list[CheckpointRef]:
    return workshop.train(tiny_profile(schedule=SCHEDULE))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and those it starts find, with a token that may write."""
    with running_hub() as hub:
        for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)  # read once, when it is imported
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
        yield hub


@pytest.fixture
def push(relora: Callable, workshop: Workshop, line: list[CheckpointRef]) -> Callable:
    return lambda to, *more: relora("export", "tiny", *more, "--push", to, "--store", workshop.store_uri)


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_what_the_hub_holds_loads_as_the_same_model(workshop, line, hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "relora_train.cli.app", "export", "tiny@latest", "--push", "Lab/tiny", "--json"]
    made = subprocess.run(
        [*command, "--store", workshop.store_uri],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert (said["pushed"], said["directory"]) == (f"{hub.endpoint}/Lab/tiny/commit/1", None)
    assert hub.private == {"Lab/tiny": True} and hub.messages == ["tiny@cycle-2, step 8"]
    files = hub.repositories["Lab/tiny"]
    assert set(files) == set(said["files"]) >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    (tmp_path / "pulled").mkdir()
    for name, content in files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    ids = torch.arange(12)[None]
    pulled, ours = map(AutoModelForCausalLM.from_pretrained, (tmp_path / "pulled", fetch_parent(line[-1])))
    assert torch.equal(pulled(ids).logits, ours(ids).logits)
    assert any(name.startswith("export-") for name in pins_in(workshop.store, "tiny"))


def test_a_push_replaces_weights_and_leaves_files_of_the_directory_and_the_repository_alone(push, hub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("mine")
    hub.repositories["me/tiny"] = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"theirs"}
    assert push("me/tiny", str(tmp_path / "out"), "--force", "--public").code == 0
    files = hub.repositories["me/tiny"]
    assert files["notes.md"] == b"theirs" and not {"private.txt", "model-00001-of-00002.safetensors"} & set(files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert push("me/open", "--public").code == 0 and hub.private == {"me/open": False}
    refused = push("me/adapter", "--as-adapter")
    assert refused.code == ConfigError.exit_code and "Leave --push out" in refused.err


@pytest.mark.parametrize(
    ("token", "to", "kind", "said"),
    [
        (None, "me/tiny", ConfigError, "no token to push to me/tiny with. Set HF_TOKEN"),
        ("hf_writes", "tiny", ConfigError, "Write it as OWNER/NAME"),
        ("hf_writes", "me/..", ConfigError, "OWNER/NAME"),
        ("hf_writes", "me/a--b", ConfigError, "cannot be the name of a repository"),
        ("hf_writes", "others/tiny", AccessDeniedError, "it may write to me, Lab"),
        ("hf_reads", "me/tiny", AccessDeniedError, "it may only read"),
        ("hf_unknown", "me/tiny", AccessDeniedError, "refuses the token"),
    ],
)
def test_who_may_not_push_is_told_so_before_anything_is_written(
    push, hub, tmp_path, monkeypatch, token, to, kind, said
):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    refused = push(to, str(tmp_path / "out"))
    assert refused.code == kind.exit_code
    assert said in " ".join(refused.err.split()) and "hf_" not in refused.err
    assert not hub.repositories and (kind is ConfigError or not (tmp_path / "out").exists())


def test_a_hub_that_is_away_broken_or_unwilling_and_a_machine_that_is_offline_are_told_apart(push, hub, monkeypatch):
    for part, status, kind, said in (
        ("whoami", 503, StoreUnavailableError, "is unavailable (503"),
        ("repos/create", 403, AccessDeniedError, "refuses the token for"),
        ("preupload", 403, AccessDeniedError, "(403: not today). Use a token that may write there"),
        ("commit/main", 400, StorageError, "refused the upload (400"),
        ("/objects/", 500, StoreUnavailableError, "is unavailable (500"),
    ):
        hub.broken = {part: status}
        refused = push("me/tiny")
        assert refused.code == kind.exit_code, part
        assert said in " ".join(refused.err.split()), part
    assert hub.repositories == {"me/tiny": {}}, "and nothing was committed"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in push("me/tiny").err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    away = push("me/tiny")
    assert away.code == StoreUnavailableError.exit_code and "Check the network and HF_ENDPOINT" in away.err


def test_an_export_without_a_place_is_refused(relora, workshop, line):
    refused = relora("export", "tiny", "--store", workshop.store_uri)
    assert refused.code == ConfigError.exit_code and "--push OWNER/NAME" in refused.err


def test_a_card_tells_lineage_scores_data_and_versions_and_no_place_of_this_machine(workshop, line, tmp_path):
    export_model(line[-1], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert header_of(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["relora"],
        "license": "other", "license_name": "not-chosen-yet",
    }  # fmt: skip
    for ref in line:
        (row,) = [row for row in card.splitlines() if row.startswith(f"| tiny@{ref.manifest.stage} ")]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2:4] == [str(ref.step), f"{ref.manifest.tokens_seen:,}"]
        assert cells[4].endswith(f"{ref.manifest.evaluation['val_perplexity']:,.2f}")
        assert cells[7] == ref.fingerprint[:12]
    manifest, dataset = line[-1].manifest, workshop.dataset.manifest
    for expected in (
        manifest.fingerprint, manifest.dataset_id, f"{dataset.train_tokens:,} tokens", "began from random weights",
        *(f"{name} {number}" for name, number in manifest.versions.items()),
    ):  # fmt: skip
        assert expected in card
    for hidden in (str(tmp_path.parent), str(Path.home()), workshop.store_uri, "file:", "s3:"):
        assert hidden not in card
    export_model(line[-1], tmp_path / "licensed", license_id="apache-2.0")
    assert header_of((tmp_path / "licensed" / "README.md").read_text())["license"] == "apache-2.0"


def test_a_card_names_a_base_of_the_hub_and_hides_a_local_one_and_the_places_of_files(line, monkeypatch):
    def card(pretrained: str, **data: object) -> str:
        profile = tiny_profile(data=data, model={"pretrained": pretrained, "revision": "v2"})
        monkeypatch.setattr("relora_train.reports.model_card.profile_of", lambda ref: profile)
        return model_card(line, license_id=None, with_spectra=False)

    named = card("Lab/base", source="text", paths=["/secret/place/a.txt", "s3://bucket/inner/b.txt"])
    assert header_of(named)["base_model"] == "Lab/base" and "began from Lab/base at revision v2" in named
    assert "Source: text: a.txt, b.txt" in named
    assert not [word for word in ("secret", "bucket", "inner", "s3:") if word in named]
    assert "Source: packages: alpha==1" in card("Lab/base", source="packages", packages=["alpha==1"])
    local = card("/secret/place/base")
    assert "base_model" not in header_of(local) and "began from a local model" in local and "secret" not in local
    monkeypatch.setattr("relora_train.reports.model_card.profile_of", lambda ref: [][0])
    with pytest.raises(IndexError):
        model_card(line, license_id=None, with_spectra=False)


def test_an_export_brings_the_spectra_of_the_report_that_ends_in_its_checkpoint(workshop, line, tmp_path):
    data = collect_run_data(line, files_in_stores(tmp_path / "cache"), spectra=False)
    put_json(workshop.store, "runs/tiny/report/summary.json", summarize(data))
    workshop.store.put_bytes("runs/tiny/report/spectra.png", b"drawn")
    for ref, has_spectra in ((line[-1], True), (line[1], False)):
        export_model(ref, tmp_path / ref.manifest.stage)
        card = (tmp_path / ref.manifest.stage / "README.md").read_text()
        assert ("spectra.png" in card) == (tmp_path / ref.manifest.stage / "spectra.png").exists() == has_spectra


def test_a_readme_by_someone_else_stays_and_a_card_is_replaced(line, tmp_path):
    export_model(line[0], tmp_path)
    export_model(line[-1], tmp_path, force=True)
    assert "tiny@cycle-2" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    export_model(line[-1], tmp_path, force=True)
    assert (tmp_path / "README.md").read_text() == "mine"
