"""The spectrum of what a training changed in each weight: W_end − W_start of two checkpoint directories.

Streams: at most one layer is in memory, and of a large one (short side above GRAM_ABOVE) only a block of rows and its
Gram matrix. Everything is computed in float64 from the stored values. numpy and safetensors only: imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from relora_train.errors import ModelError
from relora_train.reports.ranks.layers import representative_layers
from relora_train.reports.ranks.measures import (
    GRAM_ABOVE,
    LayerSpectrum,
    Matrix,
    gram_matrix,
    gram_singular_values,
    rounding_tolerance,
    singular_values,
)
from relora_train.reports.ranks.weights import WeightDirectory


def update_spectra(start_dir: Path, end_dir: Path, names: Sequence[str] | None = None) -> Iterator[LayerSpectrum]:
    """Return the spectrum of W_end − W_start of each named weight, one layer in memory at a time.

    Without names: `representative_layers` of the matrices both checkpoints have. Directories are in Hugging Face
    layout, one file or sharded. ModelError names a weight that is missing, reshaped, no matrix or not finite.
    """
    start, end = WeightDirectory(start_dir), WeightDirectory(end_dir)
    if names is None:
        shared = {name: start.shape(name) for name in start.names if name in end.names}
        names = representative_layers(shared)
    for name in names:
        yield _layer_spectrum(start, end, name)


def _layer_spectrum(start: WeightDirectory, end: WeightDirectory, name: str) -> LayerSpectrum:
    shape = start.shape(name)
    if shape != end.shape(name) or len(shape) != 2:
        raise ModelError(
            f"{name} has shape {shape} in {start.directory} and {end.shape(name)} in {end.directory}; "
            "a spectrum needs two matrices of one shape. Compare checkpoints of the same model."
        )
    short = min(shape)
    pieces: list[Matrix] = []
    gram = np.zeros((short, short) if short > GRAM_ABOVE else (0, 0))
    start_square = end_square = 0.0
    for before, after in zip(start.blocks(name), end.blocks(name), strict=True):  # (rows, short)
        start_square += float(np.sum(before**2))
        end_square += float(np.sum(after**2))
        if short > GRAM_ABOVE:
            gram += gram_matrix(after - before)
        else:
            pieces.append(after - before)
    if not math.isfinite(start_square + end_square):
        raise ModelError(f"{name} holds values that are not finite in {start.directory} or {end.directory}.")
    values = gram_singular_values(gram) if short > GRAM_ABOVE else singular_values(np.concatenate(pieces))
    weight_rms = math.sqrt(end_square / math.prod(shape))
    update_rms = math.sqrt(float(np.sum(values**2)) / math.prod(shape))
    tolerance = rounding_tolerance(
        (shape[0], shape[1]), largest=float(values[0]), weight_rms=weight_rms, update_rms=update_rms
    )
    return LayerSpectrum(name, (shape[0], shape[1]), values, tolerance, math.sqrt(start_square))
