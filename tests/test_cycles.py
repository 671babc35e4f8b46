"""Low-rank updates as factors: spectra of their sums, and the angles between their subspaces."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from relora_train.errors import CheckpointCorruptError, ModelError
from relora_train.reports.ranks.cycles import (
    MAX_GROWTH_POINTS,
    AdapterDirectory,
    Factors,
    cycle_history,
    growth_points,
    principal_cosines,
    singular_values_of_sums,
    subspaces,
    successive_overlaps,
)

Q = "model.layers.0.self_attn.q_proj.weight"


def random_updates(shape: tuple[int, int], rank: int, count: int, seed: int = 0) -> list[Factors]:
    rng = np.random.default_rng(seed)
    return [Factors(rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))) for _ in range(count)]


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def adapter_at(
    directory: Path, left: np.ndarray, right: np.ndarray, *about: object, **config: object
) -> AdapterDirectory:
    (directory / "adapter").mkdir(parents=True)
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    tensors = {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    rounded = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    save_file(rounded, directory / "adapter" / "adapter_model.safetensors")
    settings = {"r": len(right), "lora_alpha": 2 * len(right), "use_rslora": False, **config}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return AdapterDirectory(directory, *about)


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (30, 30)])
def test_sums_have_the_singular_values_of_the_matrices_they_stand_for(shape):
    """Five updates of rank 6: the sum of ranks passes the short side, 17 or 30, on the way or never."""
    updates = random_updates(shape, 6, 5)
    dense, ends = np.zeros(shape), [1, 2, 3, 5]
    found = dict(zip(ends, singular_values_of_sums(updates, ends), strict=True))
    for count, update in enumerate(updates, start=1):
        dense += update.B @ update.A
        if count in found:
            expected = np.linalg.svd(dense, compute_uv=False)
            np.testing.assert_allclose(found[count], expected, atol=1e-13 * expected[0])


def test_growth_counts_directions_that_are_new_and_not_those_that_come_back(tmp_path):
    """Cycle 2 adds two orthogonal directions, cycle 3 strengthens one of the first: ranks 2, 4, 4."""
    left, right = orthonormal(24, 4, seed=1), orthonormal(20, 4, seed=2)
    factors = [(left[:, :2], right[:, :2].T), (left[:, 2:], right[:, 2:].T), (2 * left[:, [0]], right[:, [0]].T)]
    cycles = [
        adapter_at(tmp_path / str(k), B, A, f"cycle-{k}", {Q: 0.02 * math.sqrt(480)}, lora_alpha=len(A))
        for k, (B, A) in enumerate(factors, start=1)
    ]
    history = cycle_history(cycles, [Q])
    spectra = history.growth[0]
    assert history.growth_stages == ("cycle-1", "cycle-2", "cycle-3")
    assert history.growth_ranks == (2, 4, 5)
    assert [spectrum.numerical_rank for spectrum in spectra] == [2, 4, 4]
    for spectrum, known in zip(spectra, ([1, 1], [1, 1, 1, 1], [3, 1, 1, 1]), strict=True):
        np.testing.assert_allclose(spectrum.values[: len(known)], known, atol=1e-6)  # the factors are float32
        assert len(spectrum.values) == 20 and spectrum.below_threshold == 20 - len(known)
    assert spectra[0].effective_rank == pytest.approx(2, abs=1e-4)
    assert spectra[0].relative_update_norm == pytest.approx(math.sqrt(2) / (0.02 * math.sqrt(480)), rel=1e-6)


@pytest.mark.parametrize(("config", "scaling"), [({}, 2.0), ({"use_rslora": True}, 2 * math.sqrt(3))])
def test_the_scaling_of_an_adapter_is_the_one_it_was_merged_with(tmp_path, config, scaling):
    B, A = np.ones((5, 3)), np.eye(3, 4)
    factors = adapter_at(tmp_path, B, A, **config).factors(Q)
    np.testing.assert_allclose(factors.B @ factors.A, scaling * B @ A, rtol=1e-7)
    assert (factors.rank, factors.shape) == (3, (5, 4))


def test_overlap_is_one_for_the_same_subspace_and_zero_for_orthogonal_ones():
    basis, mix = orthonormal(30, 8, seed=0), np.random.default_rng(1).normal(size=(4, 4))
    A = orthonormal(25, 8, seed=2).T
    same = Factors(basis[:, :4] @ mix, mix @ A[:4])
    found = successive_overlaps([Factors(basis[:, :4], A[:4]), same, Factors(basis[:, 4:], A[4:])])
    np.testing.assert_allclose(found[..., 0], [[1, 0], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(found[..., 1], [[4 / 30] * 2, [4 / 25] * 2])


def test_principal_angles_are_those_the_subspaces_were_turned_by():
    basis = orthonormal(12, 6, seed=3)
    angles = np.array([0.0, 0.3, 1.1])
    turned = basis[:, :3] * np.cos(angles) + basis[:, 3:] * np.sin(angles)
    np.testing.assert_allclose(np.arccos(principal_cosines(basis[:, :3], turned)), angles, atol=1e-7)


def test_one_subspace_inside_another_overlaps_wholly():
    basis = orthonormal(20, 9, seed=4)
    np.testing.assert_allclose(principal_cosines(basis, basis[:, 2:5]), np.ones(3), atol=1e-12)


def test_random_subspaces_overlap_as_chance_says():
    """E‖U₁ᵀU₂‖² = d₁ d₂ / n; the mean of 99 pairs has a standard error of about 0.004 here."""
    means = successive_overlaps(random_updates((60, 40), 6, 100)).mean(axis=1)
    np.testing.assert_allclose(means[:, 1], [6 / 60, 6 / 40])
    np.testing.assert_allclose(means[:, 0], means[:, 1], atol=0.01)


def test_a_direction_that_is_only_rounding_is_no_part_of_the_subspace():
    rng = np.random.default_rng(5)
    B = rng.normal(size=(30, 3)).astype(np.float32)
    copies = np.hstack([B, np.float32(1 / 3) * B[:, :1] + np.float32(2 / 7) * B[:, 1:2]]).astype(np.float64)
    left, right = subspaces(Factors(copies, rng.normal(size=(4, 20))))
    assert left.shape == (30, 3) and right.shape == (20, 3)


def test_an_update_of_zero_has_no_subspace_and_no_overlap():
    some = random_updates((10, 8), 2, 2)
    zero = Factors(np.zeros((10, 2)), some[1].A)
    assert np.isnan(successive_overlaps([some[0], zero, some[1]])[..., 0]).all()
    assert np.isfinite(successive_overlaps(some)).all()


@pytest.mark.parametrize("cycles", [1, 2, 12, 13, 40, 500])
def test_growth_is_looked_at_first_last_and_often_enough(cycles):
    points = growth_points(cycles)
    assert points[0] == 1 and points[-1] == cycles
    assert len(points) == min(cycles, MAX_GROWTH_POINTS) == len(set(points))


def test_errors_name_the_adapter_and_what_is_wrong(tmp_path):
    adapter = adapter_at(tmp_path / "good", np.ones((4, 2)), np.ones((2, 3)))
    assert adapter.names == (Q,) and adapter.shape(Q) == (4, 3)
    with pytest.raises(ModelError, match=r"no update of nowhere\.weight"):
        adapter.factors("nowhere.weight")
    broken = adapter_at(tmp_path / "nan", np.full((4, 2), np.nan), np.ones((2, 3)))
    with pytest.raises(ModelError, match="not finite"):
        broken.factors(Q)
    (tmp_path / "good/adapter/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        AdapterDirectory(tmp_path / "good")
