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
    """Return the layers of each kind and shape, in the order in which the kinds first appear."""
    groups: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = {}
    for spectrum in spectra:
        groups.setdefault((kind_of(spectrum.name), spectrum.shape), []).append(spectrum)
    return groups


def kind_means(spectra: Iterable[LayerSpectrum]) -> tuple[KindSpectrum, ...]:
    """Return the averages of each kind of layer."""
    return tuple(_mean(kind, shape, layers) for (kind, shape), layers in by_kind(spectra).items())


def _mean(kind: str, shape: tuple[int, int], layers: list[LayerSpectrum]) -> KindSpectrum:
    averaged = ("below_threshold", "effective_rank", "stable_rank", "numerical_rank", "relative_update_norm")
    means = {name: float(np.mean([getattr(layer, name) for layer in layers])) for name in averaged}
    values = np.mean([layer.values for layer in layers], axis=0)
    return KindSpectrum(kind=kind, shape=shape, layers=len(layers), values=values, **means)
