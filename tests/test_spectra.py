import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from relora_train.errors import CheckpointCorruptError, ModelError, ModelNotFoundError
from relora_train.reports.ranks.layers import representative_layers
from relora_train.reports.ranks.measures import GRAM_ABOVE, LayerSpectrum, rounding_tolerance, singular_values
from relora_train.reports.ranks.weights import WeightDirectory, update_spectra

Q = "model.layers.0.self_attn.q_proj.weight"


def matrix_with(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """H1 diag(values) H2 with Householder reflections H = I − 2vvᵀ, which are orthogonal: the spectrum is `values`."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((rows, columns))
    np.fill_diagonal(matrix, values)
    left, right = rng.normal(size=rows), rng.normal(size=columns)
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    matrix -= 2 * np.outer(left, left @ matrix)
    return matrix - 2 * np.outer(matrix @ right, right)


def weights_at(directory: Path, **weights: np.ndarray) -> Path:
    directory.mkdir()
    save_file({name.replace("__", "."): value for name, value in weights.items()}, directory / "model.safetensors")
    return directory


def llama_dir(directory: Path, weight: np.ndarray) -> Path:
    return weights_at(directory, **{Q.replace(".", "__"): weight})


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (20, 20)])
def test_singular_values_are_those_the_matrix_was_made_of(shape):
    expected = np.linspace(3, 0.01, min(shape))
    found = singular_values(matrix_with(expected, *shape))
    np.testing.assert_allclose(found, expected, atol=1e-13)  # a few ε₆₄ σ_max


def test_a_large_matrix_goes_through_the_gram_matrix_within_the_stated_error():
    rows, columns = GRAM_ABOVE + 60, GRAM_ABOVE + 2
    expected = np.geomspace(1, 1e-10, columns)
    found = singular_values(matrix_with(expected, rows, columns))
    eps = np.finfo(np.float64).eps
    assert np.abs(found**2 - expected**2).max() <= columns * eps
    floor = rounding_tolerance((rows, columns), largest=1.0, weight_rms=0.0)
    reliable = expected > 100 * floor
    np.testing.assert_allclose(found[reliable], expected[reliable], rtol=1e-4)  # ½ (floor / σ)²
    assert (found > floor).sum() == pytest.approx((expected > floor).sum(), abs=columns * 0.02)


def test_a_large_layer_streamed_from_files_has_the_rank_it_was_given(tmp_path):
    rng = np.random.default_rng(0)
    rows, columns, rank = 300 + GRAM_ABOVE, GRAM_ABOVE + 1, 5
    update = rng.integers(-2, 3, (columns, rank)) @ rng.integers(-2, 3, (rank, rows))  # wide; exact in float32
    start = llama_dir(tmp_path / "start", np.zeros((columns, rows), np.float32))
    end = llama_dir(tmp_path / "end", update.astype(np.float32))
    (spectrum,) = update_spectra(start, end)
    assert spectrum.shape == (columns, rows)
    assert spectrum.numerical_rank == rank
    assert spectrum.update_norm == pytest.approx(np.linalg.norm(update), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "effective", "stable", "below"),
    [
        ([2.0] * 6, 6, 6, 0),  # equal values: every direction counts
        ([5.0, 0.0, 0.0], 1, 1, 2),  # one direction
        ([0.0, 0.0], 0, 0, 2),  # no update
        ([1.0, 1.0, 0.1, 0.0999], None, None, 1),  # strictly below 0.1
        ([1.0, 0.5], np.exp(np.log(3) - 2 / 3 * np.log(2)), 1.25, 0),  # shares 2/3 and 1/3
    ],
)
def test_measures_have_their_closed_forms(values, effective, stable, below):
    spectrum = LayerSpectrum("w", (len(values), len(values)), np.array(values), tolerance=0.0, start_norm=1.0)
    if effective is not None:
        assert spectrum.effective_rank == pytest.approx(effective)
        assert spectrum.stable_rank == pytest.approx(stable)
    assert (spectrum.below_threshold, spectrum.at_threshold) == (below, len(values) - below)


def test_merges_rounded_to_float32_add_up_to_the_sum_of_their_ranks(tmp_path):
    rng = np.random.default_rng(1)
    start = rng.normal(0, 0.02, (160, 96)).astype(np.float32)
    end, cycles, rank = start, 12, 6
    for _ in range(cycles):
        end = (end + rng.normal(0, 0.02, (160, rank)) @ rng.normal(0, 0.02, (rank, 96))).astype(np.float32)
    (spectrum,) = update_spectra(llama_dir(tmp_path / "a", start), llama_dir(tmp_path / "b", end))
    assert spectrum.numerical_rank == cycles * rank
    assert spectrum.relative_update_norm == pytest.approx(np.linalg.norm(end - start) / np.linalg.norm(start), rel=1e-6)


def test_wide_updates_multiplied_in_float32_add_no_rank_by_their_rounding(tmp_path):
    """Three updates larger than the weight, of rank 128: the product's own rounding is above that of the sum."""
    rng = np.random.default_rng(4)
    start = rng.normal(0, 0.02, (600, 900)).astype(np.float32)
    end = start
    for _ in range(3):
        B, A = (rng.normal(0, 0.08, shape).astype(np.float32) for shape in ((600, 128), (128, 900)))
        end = end + B @ A  # in float32, as a merge does
    (spectrum,) = update_spectra(llama_dir(tmp_path / "a", start), llama_dir(tmp_path / "b", end))
    assert spectrum.numerical_rank == 3 * 128
    assert spectrum.values[3 * 128] < spectrum.tolerance < spectrum.values[3 * 128 - 1] / 100


def test_rounding_alone_has_rank_zero(tmp_path):
    rng = np.random.default_rng(2)
    start = rng.normal(0, 0.02, (64, 200)).astype(np.float32)
    end, update = start, np.outer(rng.normal(size=64), rng.normal(size=200)).astype(np.float32) * np.float32(0.02)
    for _ in range(3):
        end = (end + update) - update
    assert (end != start).any()
    (spectrum,) = update_spectra(llama_dir(tmp_path / "a", start), llama_dir(tmp_path / "b", end))
    assert spectrum.numerical_rank == 0


def test_an_unchanged_weight_has_no_spectrum(tmp_path):
    start = llama_dir(tmp_path / "a", np.ones((4, 6), np.float32))
    (spectrum,) = update_spectra(start, start)
    assert spectrum.values.tolist() == [0.0] * 4
    assert (spectrum.effective_rank, spectrum.stable_rank, spectrum.numerical_rank) == (0, 0, 0)
    assert spectrum.relative_update_norm == 0


def test_shards_read_as_one_file_does(tmp_path):
    rng = np.random.default_rng(3)
    weights = {f"model.layers.{i}.mlp.up_proj.weight": rng.normal(size=(5, 3)).astype(np.float32) for i in range(3)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file(weights, whole / "model.safetensors")
    shards = {name: f"model-0000{i + 1}-of-00003.safetensors" for i, name in enumerate(weights)}
    for name, shard in shards.items():
        save_file({name: weights[name]}, parts / shard)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert WeightDirectory(parts).names == WeightDirectory(whole).names
    for spectrum in update_spectra(whole, parts):
        assert spectrum.update_norm == 0


def test_bfloat16_weights_read_as_their_exact_values(tmp_path):
    values = np.array([[1.0, -2.5, 0.15625], [3.0e38, 2.0**-120, 0.0]], np.float32)  # all bfloat16 numbers
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = {"decoy": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    header[Q] = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [2, 14]}
    text = json.dumps(header).encode()
    payload = len(text).to_bytes(8, "little") + text + b"\x01\x02" + bits.tobytes()
    (tmp_path / "model.safetensors").write_bytes(payload)
    found = np.concatenate(list(WeightDirectory(tmp_path).blocks(Q)))
    expected = np.array(bits, np.uint32) << 16
    np.testing.assert_array_equal(found.T, expected.view(np.float32).astype(np.float64))


def test_errors_name_what_is_wrong(tmp_path):
    good = llama_dir(tmp_path / "good", np.eye(3, dtype=np.float32))
    other = llama_dir(tmp_path / "other", np.eye(4, dtype=np.float32))
    broken = llama_dir(tmp_path / "broken", np.full((3, 3), np.nan, np.float32))
    cut = llama_dir(tmp_path / "cut", np.eye(3, dtype=np.float32))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(ModelError, match="no weight 'nowhere'"):
        list(update_spectra(good, good, ["nowhere"]))
    with pytest.raises(ModelError, match=r"\(3, 3\).*\(4, 4\)"):
        list(update_spectra(good, other, [Q]))
    with pytest.raises(ModelError, match=f"{Q} holds values that are not finite"):
        list(update_spectra(good, broken))
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        list(update_spectra(good, cut))
    with pytest.raises(ModelNotFoundError, match="neither"):
        list(update_spectra(tmp_path, good))


FAMILIES = {
    "llama": (
        "model.layers.{}.self_attn.{q_proj,k_proj,v_proj,o_proj}|model.layers.{}.mlp.{gate_proj,up_proj,down_proj}",
        ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "gpt-neox": (
        "gpt_neox.layers.{}.attention.{query_key_value,dense}|gpt_neox.layers.{}.mlp.{dense_h_to_4h,dense_4h_to_h}",
        ("attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": (
        "h.{}.attn.{c_attn,c_proj}|h.{}.mlp.{c_fc,c_proj}",
        ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"),
    ),
    "opt": (
        "model.decoder.layers.{}.self_attn.{k_proj,v_proj,q_proj,out_proj}|model.decoder.layers.{}.{fc1,fc2}",
        ("self_attn.q_proj", "self_attn.v_proj", "fc1", "fc2"),
    ),
    "bert": (
        "bert.encoder.layer.{}.attention.self.{query,key,value}|bert.encoder.layer.{}.attention.output.{dense,x}"
        "|bert.encoder.layer.{}.{intermediate.dense,output.dense}",
        ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense"),
    ),
    "t5": (
        "decoder.block.{}.layer.{0.SelfAttention,1.EncDecAttention}.q|decoder.block.{}.layer.0.SelfAttention.{k,v,o}"
        "|decoder.block.{}.layer.2.DenseReluDense.{wi_0,wi_1,wo}",
        tuple(
            f"layer.{name}"
            for name in ["0.SelfAttention.q", "0.SelfAttention.v", "2.DenseReluDense.wi_1", "2.DenseReluDense.wo"]
        ),
    ),
    "unknown": ("net.{}.{b,a,e,d,c}", ("a", "b", "c", "d")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_middle_and_last_block_stand_for_a_model_of_any_family(family):
    pattern, roles = FAMILIES[family]
    shapes = {"embed.weight": (50, 8), "norm.weight": (8,), "lm_head.weight": (50, 8)}
    for block in range(12):  # 12: block 10 must come after block 9
        for group in pattern.replace("{}", str(block)).split("|"):
            head, _, rest = group.partition("{")
            choices, _, tail = rest.partition("}")
            shapes |= {f"{head}{choice}{tail}.weight": (8, 8) for choice in choices.split(",")}
        shapes[f"{pattern.partition('{')[0]}{block}.norm.weight"] = (8,)
    prefix = pattern.partition("{")[0]
    expected = tuple(f"{prefix}{block}.{role}.weight" for block in (0, 6, 11) for role in roles)
    assert representative_layers(shapes) == expected
    assert representative_layers(dict(reversed(shapes.items()))) == expected


def test_a_model_without_blocks_has_no_representative_layers():
    assert representative_layers({"weight": (3, 3), "layers.0.norm.weight": (3,)}) == ()


def test_analysis_and_report_import_no_torch_and_no_pyplot():
    modules = "relora_train.cli.analyze, relora_train.reports.collect, relora_train.reports.report"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "matplotlib.figure" in loaded
    assert not {"torch", "boto3", "prefect", "transformers", "matplotlib.pyplot"} & set(loaded)
