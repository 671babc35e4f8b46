"""A run's update from its checkpoints in a store, and the command that shows it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stage_runs import tiny_profile
from stored_runs import Workshop
from synthetic_run import DATASET, commit_run, llama_weights, synthetic_profile

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.checkpoints.manifest import CheckpointManifest, describe_files
from relora_train.checkpoints.run import CheckpointStore
from relora_train.errors import CheckpointCorruptError, ConfigError, ModelError
from relora_train.method.stages import plan_stages
from relora_train.reports.collect import collect_run_data
from relora_train.reports.ranks.analysis import (
    INITIAL,
    Layers,
    analyze,
    history_for_report,
    low_rank_stages,
    spectra_for_report,
    start_of_line,
)
from relora_train.reports.ranks.measures import kind_means
from relora_train.runs.run import line_of
from relora_train.settings.method import ModelConfig, ReLoRAConfig, ScheduleConfig
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store


@pytest.fixture
def store(request):
    return MemoryStore.shared(f"analysis-{request.node.name}")


@pytest.fixture
def line(store, tmp_path) -> list[CheckpointRef]:
    return commit_run(store, "tale", synthetic_profile(), tmp_path / "scratch")


@pytest.fixture
def fetch(tmp_path):
    return files_in_stores(tmp_path / "cache")


def test_adapters_and_weights_tell_the_same_of_the_total_update(line, fetch):
    """By two ways that share nothing but the measures: W_end − W_start, and the sum of the updates as factors."""
    analysis = analyze(line, fetch)
    assert (analysis.start, analysis.end) == ("tale@warm-start", "tale@cycle-3")
    assert len(analysis.spectra) == 18 and analysis.note == ""  # all six matrices of all three blocks
    growth = {layer[0].name: layer for layer in analysis.history.growth}
    for spectrum in analysis.spectra:
        after = growth[spectrum.name]
        assert [one.numerical_rank for one in after] == [4, 8, 12]
        assert spectrum.numerical_rank == 12
        np.testing.assert_allclose(after[-1].values, spectrum.values, atol=spectrum.tolerance)
    assert analysis.history.growth_ranks == (4, 8, 12)
    assert set(analysis.history.overlap) == {"columns", "rows"}


def test_any_two_checkpoints_can_be_compared(line, fetch):
    analysis = analyze(line[:3], fetch, against=line[1], layers=Layers(("q_proj",)))
    assert [spectrum.name for spectrum in analysis.spectra] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)
    ]
    assert {spectrum.numerical_rank for spectrum in analysis.spectra} == {4}
    assert analysis.history.growth_stages == ("cycle-2",) and not analysis.history.overlap


def test_a_checkpoint_of_another_run_has_a_spectrum_and_no_cycles_between(store, line, fetch, tmp_path):
    other = commit_run(store, "other", synthetic_profile(seed=7), tmp_path / "b")
    analysis = analyze(line, fetch, against=other[-1], layers=Layers(few=True))
    assert len(analysis.spectra) == 12 and analysis.history is None
    assert "not on the line" in analysis.note
    assert {spectrum.numerical_rank for spectrum in analysis.spectra} == {32}


def test_averages_are_the_means_of_their_layers(line, fetch):
    spectra = analyze(line, fetch, with_history=False).spectra
    for kind in kind_means(spectra):
        layers = [one for one in spectra if f".{kind.kind}.weight" in one.name]
        assert kind.layers == len(layers) == 3
        assert kind.effective_rank == pytest.approx(sum(one.effective_rank for one in layers) / 3)
        assert kind.below_threshold == pytest.approx(sum(one.below_threshold for one in layers) / 3)
        np.testing.assert_allclose(kind.values, sum(one.values for one in layers) / 3)


def test_a_run_without_a_warm_start_is_counted_from_its_initial_weights(store, fetch, tmp_path):
    profile = synthetic_profile(
        schedule=ScheduleConfig(
            warm_start_steps=0, cycles=2, cycle_length=40, warmup_steps=4, restart_warmup_steps=4
        )
    )  # fmt: skip
    initial = llama_weights(profile)
    line = commit_run(store, "cold", profile, tmp_path / "scratch", weights=initial)
    analysis = analyze(line, fetch)
    assert (analysis.start, analysis.start_uri) == (INITIAL, None) and "not stored" in analysis.note
    end = fetch(line[-1], ["model.safetensors"])
    final = load_file(end / "model.safetensors")
    for spectrum in analysis.spectra:
        expected = np.linalg.svd((final[spectrum.name] - initial[spectrum.name]).astype(float), compute_uv=False)
        np.testing.assert_allclose(spectrum.values, expected, atol=1e-6)
        assert spectrum.numerical_rank == 8
    data = collect_run_data(line, fetch)
    assert data.spectra_between == (INITIAL, "cycle-2") and len(data.spectra) == 12


def test_full_rank_growth_comes_from_the_weights(store, fetch, tmp_path):
    line = commit_run(store, "full", synthetic_profile(method="full"), tmp_path / "scratch")
    analysis = analyze(line, fetch, layers=Layers(few=True))
    assert analysis.history.growth_stages == ("full-2", "full-3", "full-4")
    assert analysis.history.growth_ranks == (None, None, None) and not analysis.history.overlap
    assert "from the weights" in analysis.note
    for layer, spectrum in zip(analysis.history.growth, analysis.spectra, strict=True):
        np.testing.assert_array_equal(layer[-1].values, spectrum.values)


def test_a_cycle_that_was_removed_is_no_gap_in_silence(line, fetch):
    """Without cycle-2's adapter the sum of the adapters is not the update: weights are read, and a report says why."""
    gone = [line[0], line[1], line[3]]
    analysis = analyze(gone, fetch)
    assert analysis.history.growth_stages == ("cycle-1", "cycle-3")
    assert [one.numerical_rank for one in analysis.history.growth[0]] == [4, 12]
    assert "was removed" in analysis.note
    history, note = history_for_report(gone, fetch)
    assert history is None and "cycle-3 started from was removed" in note


def test_layers_that_not_every_cycle_updated_have_no_growth(store, line, fetch, tmp_path):
    narrow = synthetic_profile(relora=ReLoRAConfig(rank=4, target_modules=("q_proj",)))
    stages = plan_stages(narrow)[2:]
    branch = commit_run(store, "branch", narrow, tmp_path / "b", parent=line[1], stages=stages)
    analysis = analyze([*line[:2], *branch], fetch)
    assert [layer[0].name for layer in analysis.history.growth] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)
    ]
    assert len(analysis.spectra) == 18 and "3 layers that every cycle updated, of 18" in analysis.note
    history, note = history_for_report([*line[:2], *branch], fetch)
    assert len(history.growth) == 3 and note == ""


def test_only_files_with_a_wanted_tensor_are_fetched(store, fetch, tmp_path):
    weights = llama_weights(synthetic_profile())
    start, end = (_sharded(store, name, weights, tmp_path) for name in ("a", "b"))
    for ref in (start, end):
        store.delete(f"{ref.prefix}/model-00001-of-00002.safetensors")
    analysis = analyze([end], fetch, against=start, layers=Layers(("down_proj",)))
    assert len(analysis.spectra) == 3
    assert not list(tmp_path.glob("cache/*/model-00001*"))
    with pytest.raises(CheckpointCorruptError):
        store.put_bytes(f"{end.prefix}/model-00002-of-00002.safetensors", b"damaged")
        analyze([end], files_in_stores(tmp_path / "fresh"), against=start, layers=Layers(("down_proj",)))


def _sharded(store, run_id: str, weights: dict[str, np.ndarray], tmp_path: Path) -> CheckpointRef:
    """A checkpoint in two shards, of which the second holds every down_proj."""
    directory = tmp_path / f"sharded-{run_id}"
    directory.mkdir()
    shards = {name: f"model-0000{1 + ('down_proj' in name)}-of-00002.safetensors" for name in weights}
    for file in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    manifest = CheckpointManifest(
        files=describe_files(directory), attempt="a", run_id=run_id, profile="p", stage="full-1", step=1, cycle=0,
        tokens_seen=1, fingerprint=run_id * 64, fingerprint_settings={}, parent=None, dataset_id=DATASET,
        dataset_uri="memory://none",
    )  # fmt: skip
    return CheckpointStore(store, run_id).commit(directory, manifest)


def test_reports_skip_what_is_too_large_and_say_so(line, fetch, monkeypatch):
    monkeypatch.setattr("relora_train.reports.ranks.analysis.REPORT_OPERATIONS", 1e3)
    assert "`relora analyze tale`" in history_for_report(line, fetch)[1]
    monkeypatch.setattr("relora_train.reports.ranks.analysis.REPORT_ADAPTER_BYTES", 10)
    assert "adapters are too large" in history_for_report(line, fetch)[1]
    monkeypatch.setattr("relora_train.reports.ranks.analysis.REPORT_WEIGHT_BYTES", 10)
    assert spectra_for_report(line[0], line[-1], fetch)[0] == ()
    data = collect_run_data(line, fetch)
    assert data.history is None and data.spectra == () and len(data.spectra_notes) == 2


def test_where_a_line_starts(store, line, tmp_path):
    assert start_of_line(line) == line[0]
    assert start_of_line(line[1:]) == line[1], "its parent is elsewhere, so nothing before it is known"
    full = commit_run(store, "full", synthetic_profile(method="full"), tmp_path / "full")
    assert start_of_line(full) == full[0]
    assert start_of_line([*full, *line[1:]]) == full[-1], "full rank counts as the warm start of what branches from it"
    assert low_rank_stages(line, line[0]) == (line[1:], None)


def test_what_cannot_be_compared_is_refused(line, fetch, store, tmp_path):
    with pytest.raises(ConfigError, match="compared with itself"):
        analyze(line, fetch, against=line[-1])
    with pytest.raises(ModelError, match="called nothing"):
        analyze(line, fetch, layers=Layers(("nothing",)))
    wider = synthetic_profile(model=ModelConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=3))
    other = commit_run(store, "wide", wider, tmp_path / "wide")
    with pytest.raises(ModelError, match="same model"):
        analyze(line, fetch, against=other[0])


@pytest.fixture
def trained(tmp_path):
    """A run of real stages, trained in this process."""
    with pytest.MonkeyPatch.context() as patch:
        workshop = Workshop(tmp_path / "store", patch)
        patch.setenv("RELORA_STORE", workshop.store_uri)
        yield workshop.train(tiny_profile())


def test_the_command_shows_a_real_run(trained, tmp_path, relora):
    rank = trained[-1].manifest.fingerprint_settings["relora.rank"]
    code, out, err = relora("analyze", "tiny", "--json", "--output", str(tmp_path / "out"))
    record = json.loads(out)
    assert code == 0 and record["start"] == "tiny@warm-start"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "analysis.json", "spectra.png", "growth.png",
    }  # fmt: skip
    assert err.count("Wrote ") == 3
    assert json.loads((tmp_path / "out/analysis.json").read_text()) == record
    merges = len(trained) - 1
    for layer, growth in zip(record["layers"], record["cycle_history"]["growth"], strict=True):
        assert growth["after"][0]["numerical_rank"] <= rank
        assert layer["numerical_rank"] == growth["after"][-1]["numerical_rank"] <= merges * rank
        assert layer["effective_rank"] == pytest.approx(growth["after"][-1]["effective_rank"], rel=1e-3)
        first = trained[1].manifest.merge_report["layers"][layer["name"]]
        assert growth["after"][0]["effective_rank"] == pytest.approx(first["effective_rank"], rel=1e-3)
        assert growth["after"][0]["relative_update_norm"] == pytest.approx(first["relative_update_norm"], rel=1e-4)


def test_the_command_names_kinds_layers_and_two_checkpoints(trained, relora):
    code, out, _ = relora("analyze", "tiny")
    assert code == 0 and "self_attn.q_proj" in out and "by chance" in out and "at most" in out
    code, out, _ = relora("analyze", "tiny@cycle-2", "--against", "tiny@cycle-1", "--layers", "--no-history")
    assert code == 0 and "model.layers.0.self_attn.q_proj" in out and "by chance" not in out
    code, _, err = relora("analyze", "tiny@warm-start")
    assert code == 2 and "compared with itself" in err


def test_a_line_in_a_store_is_found_as_the_flow_finds_it(tmp_path):
    store = open_store(tmp_path / "store")
    line = commit_run(store, "tale", synthetic_profile(), tmp_path / "scratch")
    analysis = analyze(line_of(line[2]), files_in_stores(tmp_path / "cache"), layers=Layers(few=True))
    assert analysis.end == "tale@cycle-2"
    assert not (tmp_path / "cache").exists(), "a store on this disk is read in place"
