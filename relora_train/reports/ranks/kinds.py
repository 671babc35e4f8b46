"""Spectra averaged over the layers of one kind: the q_proj of every block, the up_proj of every block, and so on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from relora_train.reports.ranks.layers import kind_of
from relora_train.reports.ranks.measures import LayerSpectrum, Matrix


@dataclass(frozen=True, eq=False)
class KindSpectrum:
    """Means over the layers of one kind and shape."""

    kind: str
    shape: tuple[int, int]
    layers: int
    values: Matrix
    """(min(shape),): the mean of the layers' first values, of their second values, …"""
    below_threshold: float
    effective_rank: float
    stable_rank: float
    numerical_rank: float
    relative_update_norm: float


def by_kind(spectra: Iterable[LayerSpectrum]) -> dict[tuple[str, tuple[int, int]], list[LayerSpectrum]]:
    """The layers of each kind and shape, in the order in which the kinds first appear."""
    groups: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = {}
    for spectrum in spectra:
        groups.setdefault((kind_of(spectrum.name), spectrum.shape), []).append(spectrum)
    return groups


def kind_means(spectra: Iterable[LayerSpectrum]) -> tuple[KindSpectrum, ...]:
    """The averages of each kind of layer."""
    return tuple(_mean(kind, shape, layers) for (kind, shape), layers in by_kind(spectra).items())


def _mean(kind: str, shape: tuple[int, int], layers: list[LayerSpectrum]) -> KindSpectrum:
    def mean(numbers: Iterable[float]) -> float:
        return float(np.mean(list(numbers)))

    return KindSpectrum(
        kind=kind,
        shape=shape,
        layers=len(layers),
        values=np.mean([layer.values for layer in layers], axis=0),
        below_threshold=mean(layer.below_threshold for layer in layers),
        effective_rank=mean(layer.effective_rank for layer in layers),
        stable_rank=mean(layer.stable_rank for layer in layers),
        numerical_rank=mean(layer.numerical_rank for layer in layers),
        relative_update_norm=mean(layer.relative_update_norm for layer in layers),
    )
