"""What cannot go away by waiting is found before anything is tokenized or trained, in a deployed flow too."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from prefect_server import PREFECT_WARNS, running_prefect
from stage_runs import ignore, stage_request, tiny_profile
from test_flow_pretrain import listening
from test_pretrained import bert, edit_tensors, saved, without_a_weight
from tiny_models import tiny_llama
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import (
    ConfigError,
    DeviceError,
    ModelUnsuitableError,
    NoTargetModulesError,
    ReLoRAError,
    SequenceTooLongError,
    UntrainedLayerError,
)
from relora_train.events import Event
from relora_train.method.stages import plan_stages
from relora_train.runs.model_check import check_run, check_settings
from relora_train.runs.run import Run
from relora_train.runs.workers import Worker
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store
from relora_train.training.model_check_worker import check_model
from relora_train.training.requests import ModelCheckRequest
from relora_train.training.trainer import run_stage

pytestmark = PREFECT_WARNS


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Here:
    """As Worker, without the seconds that a process takes to import; the tests of flows start real ones."""

    def run(self, module: str, request: ModelCheckRequest, path: Path, *, on_event: Any) -> None:
        assert module == "relora_train.training.model_check_worker" and path.parent.is_dir()
        check_model(ModelCheckRequest.model_validate_json(request.model_dump_json()), ignore)


@pytest.fixture
def worker() -> Any:
    return Here()


def mistral(**changes: Any) -> PreTrainedModel:
    """A family whose layers are not known without torch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, vocab_size=300, **changes))


ATTENTION = {"target_modules": ("q_proj", "v_proj")}

LATE: dict[str, tuple[dict[str, Any], type[ReLoRAError], str]] = {
    "a name of nothing": (
        {"relora": {"target_modules": ("q_proj", "c_attn")}}, NoTargetModulesError, r"names 'c_attn' \(no module"),
    "the head": ({"relora": {"target_modules": ("q_proj", "lm_head")}}, NoTargetModulesError, r"'lm_head' \(the out"),
    "a rank above a side": ({"relora": {**ATTENTION, "rank": 17}}, ConfigError, r"relora\.rank 17 exceeds 16, the "),
    "a long sequence": ({"relora": ATTENTION, "batch": {"sequence_length": 64}}, SequenceTooLongError, "32 positions"),
}  # fmt: skip


def run_of(profile: Profile, store: Path, worker: Any) -> Run:
    return Run("checked", open_store(store).uri, profile, worker=worker or Worker())


def check(profile: Profile, store: Path, worker: Any) -> None:
    check_run(run_of(profile, store, worker), plan_stages(profile), None, on_event=lambda event: None)


@pytest.mark.parametrize("kind", LATE)
def test_what_only_the_loaded_model_tells_is_found(kind: str, dataset: Path, tmp_path: Path, worker: Any):
    sections, error, said = LATE[kind]
    model = {"pretrained": str(saved(mistral(max_position_embeddings=32), tmp_path / "model"))}
    with pytest.raises(error, match=said) as raised:
        check(tiny_profile(model=model, tokenizer={"path": str(dataset)}, **sections), tmp_path / "store", worker)
    assert type(raised.value) is error and not raised.value.retryable


def test_so_is_a_model_that_does_not_load_or_looks_ahead(dataset: Path, tmp_path: Path, worker: Any):
    incomplete = saved(mistral(), tmp_path / "incomplete")
    edit_tensors(incomplete, without_a_weight)
    encoder = saved(bert(is_decoder=False), tmp_path / "encoder")
    for directory, said in ((incomplete, "they lack"), (encoder, "look ahead")):
        for method in ("relora", "full"):
            model, relora = {"pretrained": str(directory)}, {"target_modules": ("query",)}
            profile = tiny_profile(model=model, tokenizer={"path": str(dataset)}, relora=relora, method=method)
            with pytest.raises(ModelUnsuitableError, match=said):
                check(profile, tmp_path / "store", worker)


@pytest.mark.parametrize("relora", [ATTENTION, {}])
def test_a_model_that_can_be_trained_passes(relora: dict[str, Any], dataset: Path, tmp_path: Path, worker: Any):
    model = {"pretrained": str(saved(mistral(), tmp_path / "model"))}
    check(tiny_profile(model=model, tokenizer={"path": str(dataset)}, relora=relora), tmp_path / "store", worker)


def test_a_layer_whose_weight_is_read_past_its_forward_is_refused_by_name(dataset: Path, tmp_path: Path, worker: Any):
    model = {"pretrained": str(saved(family_model("mamba", vocab_size=300), tmp_path / "model"))}
    profile = tiny_profile(model=model, tokenizer={"path": str(dataset)}, relora={"rank": 2})
    with pytest.raises(UntrainedLayerError, match=r"layers\.0\.mixer\.dt_proj, .* to in_proj, out_proj, x_proj\."):
        check(profile, tmp_path / "store", worker)


@pytest.mark.parametrize("launch", [{"device": "cuda"}, {"nproc_per_node": "gpu"}])
def test_so_are_devices(launch: dict[str, Any], tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="torch sees no"):
        check(tiny_profile(launch=launch), tmp_path / "store", worker)


def no_process(*args: Any, **options: Any) -> None:
    raise AssertionError("a process was started")


def test_of_a_model_of_ours_and_of_known_families_layers_are_known_without_a_process(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where the tokenizer lies on a hub."""
    monkeypatch.setattr("relora_train.runs.workers.run_worker", no_process)
    for tokenizer in ({}, {"path": "somebody/tokenizer"}):
        check(tiny_profile(tokenizer=tokenizer), tmp_path / "store", None)
        with pytest.raises(NoTargetModulesError, match="names 'embed_tokens'"):
            relora = {"target_modules": ("q_proj", "embed_tokens")}
            check(tiny_profile(relora=relora, tokenizer=tokenizer), tmp_path / "store", None)
    llama = tiny_llama()
    llama.resize_token_embeddings(300)
    model = {"pretrained": str(saved(llama, tmp_path / "llama"))}
    with pytest.raises(ConfigError, match=r"relora\.rank 33 exceeds the smaller side of self_attn\.q_proj"):
        profile = tiny_profile(model=model, tokenizer={"path": str(dataset)}, relora={"rank": 33})
        check(profile, tmp_path / "store", None)


def test_a_run_that_has_trained_a_stage_does_not_load_its_first_model_again(
    warm_start: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.runs.workers.run_worker", no_process)
    model = {"pretrained": str(saved(mistral(), tmp_path / "model"))}
    profile = tiny_profile(model=model, tokenizer={"path": str(dataset)}, relora=ATTENTION)
    run = run_of(profile, tmp_path / "store", None)
    with pytest.raises(AssertionError):
        check(profile, tmp_path / "store", None)
    manifest = CheckpointManifest.model_validate_json((warm_start / "manifest.json").read_bytes())
    run.checkpoints.commit(warm_start, manifest.model_copy(update={"run_id": "checked"}))
    check(profile, tmp_path / "store", None)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_run_that_starts_from_a_checkpoint_is_checked_on_that_ones_layers(
    family: str, dataset: Path, tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
):
    """Without a download of its weights; of a family that is known without torch, without a process."""
    sections = {"model": {"pretrained": str(saved(mistral(), tmp_path / "model"))}} if family == "mistral" else {}
    profile = tiny_profile(schedule={"warm_start_steps": 2, "cycles": 1}, **sections)
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "made"), ignore)
    manifest = CheckpointManifest.model_validate_json((tmp_path / "made" / "manifest.json").read_bytes())
    parent = CheckpointStore(open_store(tmp_path / "store"), "tiny").commit(tmp_path / "made", manifest)
    (tmp_path / "store" / parent.prefix / "model.safetensors").unlink()
    if family == "llama":
        monkeypatch.setattr(worker, "run", no_process)
    stages = plan_stages(profile)[1:]
    for relora, said in (({"target_modules": ("nothing",)}, "names 'nothing'"), (ATTENTION, None)):
        run = run_of(tiny_profile(relora=relora), tmp_path / "store", worker)
        if said is None:
            check_run(run, stages, parent, on_event=lambda event: None)
            continue
        with pytest.raises(NoTargetModulesError, match=said):
            check_run(run, stages, parent, on_event=lambda event: None)


# --- in the flows


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_prefect(tmp_path_factory.mktemp("prefect")):
        yield


class Retries(logging.Handler):
    """What Prefect says of tasks that it will try again."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Retry" in record.getMessage() or "retry" in record.getMessage():
            self.lines.append(record.getMessage())


def settings(directory: Path, dataset: Path, **more: Any) -> dict[str, Any]:
    return {
        "launch.threads": 1,
        "model.pretrained": str(directory),
        "tokenizer.path": str(dataset / "tokenizer.json"),
        **more,
    }


def test_a_flow_refuses_a_model_before_it_tokenizes_and_at_once(prefect: None, dataset: Path, tmp_path: Path):
    from flows.pretrain import pretrain
    from flows.retrain import retrain

    directory = saved(mistral(), tmp_path / "model")
    seen: list[Event] = []
    retries = Retries()
    logging.getLogger("prefect.task_runs").addHandler(retries)
    store = tmp_path / "store"
    try:
        with listening(seen.append):
            overrides = settings(directory, dataset, **{"relora.target_modules": ["c_attn"]})
            with pytest.raises(NoTargetModulesError, match="c_attn"):
                pretrain("smoke", overrides=overrides, store=str(store), run_id="refused", stop_after="warm-start")
            (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "a b c"}) + "\n")
            series = {"data.source": "jsonl", "data.paths": [str(tmp_path / "docs.jsonl")], "data.name": "docs"}
            with pytest.raises(NoTargetModulesError, match="c_attn"):
                retrain("nightly", "smoke", overrides | series | {"data.max_documents": None}, str(store))
    finally:
        logging.getLogger("prefect.task_runs").removeHandler(retries)
    assert not retries.lines
    assert not [event for event in seen if event["event"] in ("tokenize_progress", "dataset_ready", "stage_started")]
    assert not list(open_store(store).list("datasets/"))


def test_a_comparison_refuses_the_settings_of_any_arm_before_its_first_run(prefect: None, tmp_path: Path):
    from flows.compare import compare

    (tmp_path / "arms.toml").write_text(
        """
title = "Arms"
profile = "smoke"
budget_tokens = 30_720
seeds = [0]
reference = "lora"
[base]
launch.threads = 1
[arms.lora]
label = "LoRA"
set.method = "lora"
[arms.heads]
label = "Heads"
set.relora.target_modules = ["q_proj", "lm_head"]
"""
    )
    seen: list[Event] = []
    with listening(seen.append), pytest.raises(NoTargetModulesError, match="names 'lm_head'"):
        compare(str(tmp_path / "arms.toml"), store=str(tmp_path / "store"))
    assert not seen and not list(open_store(tmp_path / "store").list("runs/"))


def test_settings_that_are_known_to_work_need_no_look_at_the_model():
    assert check_settings(tiny_profile()) and check_settings(tiny_profile(method="full"))
