"""matmul_precision = 'auto': what is fast and inexact is refused, and a run keeps what it began with, to the bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import checkpoint_manifest, dataset_manifest
from pydantic import ValidationError
from safetensors.torch import load_file
from stage_runs import CPU, ignore, manifest_of, metrics_of, run_all, stage_request, tiny_profile
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import TrainingError
from relora_train.method.bfloat16_adamw import BFloat16AdamW, _Noise, round_at_random, round_trained_matrices
from relora_train.method.stages import fingerprint_settings, plan_stages
from relora_train.method.wrap import apply_relora
from relora_train.runs.evaluations import recorded_evaluation
from relora_train.runs.run import DatasetRef
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore, put_json
from relora_train.training import end_of_cycle as merging
from relora_train.training import precision
from relora_train.training.build import prepare_stage
from relora_train.training.files import SavedOptimizerState, read_tensor, read_training_state
from relora_train.training.precision import Product, choose_precision, keeps_accuracy, product_error, products_of
from relora_train.training.snapshot import read_snapshot_state
from relora_train.training.trainer import run_stage

DEVICE = torch.device("cpu")
PRODUCTS = {Product(96, 256, 200), Product(96, 200, 16)}
FILES = ("model.safetensors", "optimizer.safetensors", "metrics.jsonl")


@pytest.mark.parametrize("error", [3e-4, 2e-3, 1.2e-5, 1.3e-6], ids=["TF32", "bfloat16", "three bfloat16", "4.3 times"])
def test_what_rounds_more_than_float32_is_refused(monkeypatch: pytest.MonkeyPatch, error: float):
    for medium, chosen in ((error, "highest"), (6e-7, "medium")):
        errors = {"highest": 3e-7, "medium": medium}
        monkeypatch.setattr(precision, "product_error", lambda products, device, name, errors=errors: errors[name])
        assert choose_precision(PRODUCTS, DEVICE, recorded=None) == chosen


def test_an_inaccurate_base_excuses_nothing(monkeypatch: pytest.MonkeyPatch):
    """Were "highest" itself in TF32 by some override, four times its error would be no float32."""
    monkeypatch.setattr(precision, "product_error", lambda *_: 3e-4)
    assert choose_precision(PRODUCTS, DEVICE, recorded=None) == "highest"


def test_errors_are_those_of_the_products():
    assert 1e-8 < product_error(PRODUCTS, DEVICE, "highest") < 1e-6
    before = torch.get_float32_matmul_precision()
    state = torch.get_rng_state()
    assert keeps_accuracy(PRODUCTS, DEVICE, "highest")
    assert torch.get_float32_matmul_precision() == before and torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):  # stands for a device that multiplies float32 so
        assert 1e-3 < product_error(PRODUCTS, DEVICE, "highest") < 1e-2


def test_products_are_those_of_the_models_matrices():
    model = tiny_llama()
    config: Any = model.config
    d, ff, kv = config.hidden_size, config.intermediate_size, model.model.layers[0].self_attn.k_proj.out_features
    expected = {(d, config.vocab_size), (d, d), (d, kv), (d, ff), (ff, d)}
    assert products_of(model, rows=64) == {Product(64, *sides) for sides in expected}
    apply_relora(model, rank=3, alpha=3, dropout=0.0, target_modules=["q_proj"], seed=0)
    assert products_of(model, rows=64) == {Product(64, *sides) for sides in expected | {(d, 3), (3, d)}}
    assert not products_of(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)), rows=8)


def made_medium_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which "medium" is bfloat16: the real probe, with such an error for that precision."""
    real = product_error
    monkeypatch.setattr(
        precision,
        "product_error",
        lambda products, device, name: 2e-3 if name == "medium" else real(products, device, name),
    )


def test_a_recorded_choice_is_taken_over_and_given_up_where_it_is_inexact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for recorded in ("highest", "high", "medium"):
        exact = keeps_accuracy(PRODUCTS, DEVICE, recorded)
        assert choose_precision(PRODUCTS, DEVICE, recorded=recorded) == (recorded if exact else "highest")
    caplog.clear()
    made_medium_inexact(monkeypatch)
    assert choose_precision(PRODUCTS, DEVICE, recorded="medium") == "highest"
    assert "began with matmul precision 'medium'" in caplog.text


# --- a run


@pytest.fixture(autouse=True)
def restored_precision() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


WIDE: dict[str, Any] = {  # wide enough that "medium" is another path on a DEVICE that has one
    "model": {"hidden_size": 256, "intermediate_size": 256},
    "schedule": {"warm_start_steps": 3, "cycles": 1, "cycle_length": 4, "warmup_steps": 1, "restart_warmup_steps": 1},
    "relora": {"dropout": 0.1},
}


def auto_profile(setting: str, **sections: Any) -> Any:
    return tiny_profile(**WIDE, precision={"matmul_precision": setting}, **sections)


def let_the_check_choose(monkeypatch: pytest.MonkeyPatch, chosen: str) -> list[str | None]:
    """Have every later check of a new run end with this choice; return what runs had recorded when they asked."""
    asked: list[str | None] = []

    def choose(products: object, device: object, *, recorded: str | None) -> str:
        asked.append(recorded)
        return recorded or chosen

    monkeypatch.setattr(precision, "choose_precision", choose)
    return asked


def trained(profile: Any, dataset: Path, directory: Path) -> tuple[Path, Path]:
    first, second = directory / "warm-start", directory / "cycle-1"
    run_stage(stage_request(profile, "warm-start", dataset, first), ignore)
    run_stage(stage_request(profile, "cycle-1", dataset, second, first), ignore)
    return first, second


@pytest.mark.parametrize("choice", ["highest", "medium"])
def test_auto_has_the_bits_of_the_setting_it_chose_and_chooses_once_a_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
):
    if not keeps_accuracy([Product(256, 256, 256)], DEVICE, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    asked = let_the_check_choose(monkeypatch, choice)
    auto = trained(auto_profile("auto"), dataset, tmp_path / "auto")
    assert asked == [None, choice]
    explicit = trained(auto_profile(choice), dataset, tmp_path / "explicit")
    for ours, theirs in zip(auto, explicit, strict=True):
        assert read_training_state(ours).matmul_precision == choice
        assert read_training_state(theirs).matmul_precision is None
        for name in FILES[:2]:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_resumed_stage_takes_the_choice_from_its_snapshot(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not keeps_accuracy([Product(256, 256, 256)], DEVICE, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    let_the_check_choose(monkeypatch, "medium")
    profile = auto_profile("auto", snapshots={"every_steps": 2, "every_seconds": None})
    request = stage_request(profile, "warm-start", dataset, tmp_path / "whole")
    events: list[dict[str, Any]] = []
    kept = request.model_copy(update={"snapshots_directory": tmp_path / "snapshots"})
    run_stage(kept, lambda event, **fields: events.append({"event": event, **fields}))
    started = next(event for event in events if event["event"] == "stage_started")
    assert started["matmul"] == "medium"
    [snapshot] = (tmp_path / "snapshots").iterdir()
    assert read_snapshot_state(snapshot).matmul_precision == "medium"
    asked = let_the_check_choose(monkeypatch, "highest")
    resumed = request.model_copy(update={"output_directory": tmp_path / "resumed", "snapshot_directory": snapshot})
    run_stage(resumed, ignore)
    assert asked == ["medium"] and torch.get_float32_matmul_precision() == "medium"
    for name in FILES[:2]:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_in_bfloat16_there_is_nothing_to_choose(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = let_the_check_choose(monkeypatch, "medium")
    profile = tiny_profile(precision={"matmul_precision": "auto", "dtype": "bfloat16"})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "out"), ignore)
    assert not asked and read_training_state(tmp_path / "out").matmul_precision == "highest"


def test_state_from_before_the_choice_reads_as_none(dataset: Path, tmp_path: Path):
    run_stage(stage_request(tiny_profile(), "warm-start", dataset, tmp_path / "out"), ignore)
    path = tmp_path / "out" / "training_state.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "matmul_precision"}
    path.write_text(json.dumps(older))
    assert read_training_state(tmp_path / "out").matmul_precision is None


# --- the check of a merge


@pytest.mark.parametrize("inexact", [False, True])
def test_a_merge_may_change_the_output_by_what_the_products_really_round(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inexact: bool
):
    """By measurement, whatever the setting is called: 'medium' in float32 has float32's tolerance."""
    if inexact:
        made_medium_inexact(monkeypatch)
    elif not keeps_accuracy([Product(256, 256, 256)], DEVICE, "medium"):
        pytest.skip("on this CPU 'medium' is no float32")
    monkeypatch.setattr(merging, "relative_change", lambda before, after: 1e-3)
    profile = tiny_profile(precision={"matmul_precision": "medium"})
    run_stage(stage_request(profile, "warm-start", dataset, tmp_path / "parent"), ignore)
    request = stage_request(profile, "cycle-1", dataset, tmp_path / "out", tmp_path / "parent")
    if inexact:
        run_stage(request, ignore)
        assert (tmp_path / "out" / "manifest.json").is_file()
    else:
        with pytest.raises(TrainingError, match=r"by 0\.001 .* more than rounding can \(0\.0001\)"):
            run_stage(request, ignore)


# --- trained matrices in bfloat16: right on average, exact where they are merged and saved

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
PURE = {"precision": {"dtype": "pure-bfloat16"}}


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_all(tiny_profile(**PURE), dataset, tmp_path_factory.mktemp("run"))


def noise(seed: int = 0) -> _Noise:
    return _Noise(seed, torch.device("cpu"))


@pytest.mark.parametrize("value", [1.003, -1.003, 3e-39, 65_000.3, 0.0])
def test_rounding_gives_the_neighbours_and_their_mean_is_the_value(value: float):
    exact = torch.full((200_000,), value)
    rounded = round_at_random(exact, noise()).double()
    spacing = 2.0 ** (max(math.frexp(value)[1] - 1, -126) - 7) if value else 0.0
    assert ((rounded - exact.double()).abs() <= spacing).all()
    assert len(rounded.unique()) <= 2
    # The mean of n draws is off by at most half a spacing / sqrt(n) a standard deviation; five of them.
    assert abs(rounded.mean().item() - exact[0].double().item()) <= 2.5 * spacing / math.sqrt(len(exact))


def test_what_bfloat16_can_hold_stays_and_so_does_what_is_not_finite():
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(exact.float(), noise()), exact)
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN, as a GPU writes it
    odd = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), all_ones])
    rounded = round_at_random(odd, noise())
    assert rounded[:2].tolist() == [math.inf, -math.inf] and rounded[2:].isnan().all()


def test_on_float32_parameters_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    optimizers = BFloat16AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for _ in range(20):
        gradient = torch.randn(40, 30)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_updates_too_small_for_bfloat16_arrive_and_torch_loses_them():
    """Weights of one, 400 updates of 1e-4: each is a 78th of the spacing of bfloat16 below one's."""
    moved = {}
    for kind, settings in ((BFloat16AdamW, {}), (torch.optim.AdamW, {"foreach": False})):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0, **settings)
        for step in range(400):
            if isinstance(optimizer, BFloat16AdamW):
                optimizer.rounding_seed = step
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
        moved[kind] = 1 - weight.detach().float().mean().item()
    assert moved[BFloat16AdamW] == pytest.approx(0.04, rel=0.05)
    assert moved[torch.optim.AdamW] == 0


def test_the_second_moment_decays_as_in_float32():
    """beta2 = 0.999: rounded to the nearest, a tenth of a percent a step would be lost for ever."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = BFloat16AdamW([weight], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(501):
        optimizer.rounding_seed = step
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    found = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert found == pytest.approx(0.001 * 0.999**500, rel=0.02)


def test_matrices_their_gradients_and_moments_are_bfloat16_and_vectors_float32(
    checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
):
    request = stage_request(tiny_profile(**PURE), "cycle-1", dataset, tmp_path, checkpoints["warm-start"])
    training = prepare_stage(request, CPU)
    training.update(7)
    assert {p.dtype for p in training.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for parameter in training.trainable:
        expected = torch.bfloat16 if parameter.ndim >= 2 else torch.float32
        state = training.optimizer.state[parameter]
        assert {t.dtype for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])} == {expected}


def test_checkpoints_are_float32_and_open_anywhere(checkpoints: dict[str, Path]):
    for checkpoint in checkpoints.values():
        tensors = load_file(checkpoint / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        opened = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert all(torch.equal(opened[name], tensor) for name, tensor in tensors.items())
        for entries in SavedOptimizerState(checkpoint / "optimizer.safetensors").values():
            assert {tensor.dtype for tensor in entries.values()} == {torch.float32}


def test_a_merge_adds_the_exact_product_to_the_exact_weight(checkpoints: dict[str, Path]):
    adapter = load_file(checkpoints["cycle-2"] / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.o_proj"
    A, B = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    parent, merged = (read_tensor(checkpoints[stage], f"{module}.weight") for stage in ("cycle-1", "cycle-2"))
    assert torch.equal(A, A.bfloat16().float()) and torch.equal(B, B.bfloat16().float())
    torch.testing.assert_close(merged, parent + B @ A, rtol=0, atol=1e-7)  # scaling is 1; |W| is below 0.1
    assert not torch.equal(merged, merged.bfloat16().float())


def test_it_learns_as_autocast_does(checkpoints: dict[str, Path], dataset: Path, tmp_path: Path):
    autocast = run_all(tiny_profile(precision={"dtype": "bfloat16"}), dataset, tmp_path)
    for stage in checkpoints:
        ours, theirs = (manifest_of(made[stage])["evaluation"]["val_loss"] for made in (checkpoints, autocast))
        assert ours == pytest.approx(theirs, rel=0.02)


def test_cutting_full_rank_training_into_stages_changes_no_bit(dataset: Path, tmp_path: Path):
    schedule = {"warm_start_steps": 0, "warmup_steps": 2, "restart_warmup_steps": 0}
    made = [
        run_all(
            tiny_profile(method="full", schedule={**schedule, "cycles": n, "cycle_length": 8 // n}, **PURE),
            dataset,
            tmp_path / str(n),
        )[f"full-{n}"]
        for n in (1, 2)
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_tied_embeddings_are_written_once(dataset: Path, tmp_path: Path):
    profile = tiny_profile(model={"tie_word_embeddings": True}, **PURE)
    output = tmp_path / "warm-start"
    run_stage(stage_request(profile, "warm-start", dataset, output), ignore)
    tensors = load_file(output / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    assert metrics_of(output)[-1]["loss"] < metrics_of(output)[0]["loss"]


def test_tied_matrices_stay_tied():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    round_trained_matrices(model)
    assert model[1].weight is model[0].weight and model[0].weight.dtype == torch.bfloat16
    assert model[1].bias.dtype == torch.float32


def test_only_a_rounded_residual_is_named_in_the_fingerprint():
    def settings(**precision: str) -> dict[str, Any]:
        profile = Profile.model_validate({"precision": precision})
        return fingerprint_settings(profile, plan_stages(profile)[0], "d" * 64)

    plain = settings(dtype="bfloat16")  # as it was before there was a choice
    assert settings(dtype="bfloat16", residual="float32") == plain
    assert settings(dtype="bfloat16", residual="bfloat16") == {**plain, "precision.residual": "bfloat16"}
    with pytest.raises(ValidationError, match="residual 'bfloat16' needs dtype"):
        settings(residual="bfloat16")


def test_scores_recorded_before_there_was_a_residual_are_found_again(memory: ObjectStore, files: Path):
    checkpoint = CheckpointStore(memory, "run").commit(files, checkpoint_manifest(files))
    dataset = DatasetRef(memory.uri, dataset_manifest(files))
    place = f"runs/run/evaluations/step-00000400-{checkpoint.fingerprint[:12]}"
    # The digests are of the settings without the key.
    for dtype, digest in (("float32", "b6e4c81d"), ("bfloat16", "8c246c13")):
        put_json(memory, f"{place}-{digest}.json", {"val_loss": 3.0})
        profile = Profile.model_validate({"precision": {"dtype": dtype}})
        recorded = recorded_evaluation(profile, checkpoint, dataset, memory)
        assert recorded is not None and recorded["val_loss"] == 3.0
    rounded = Profile.model_validate({"precision": {"dtype": "bfloat16", "residual": "bfloat16"}})
    assert recorded_evaluation(rounded, checkpoint, dataset, memory) is None
