"""The change of a run's weights, from its checkpoints in any store: spectra, ranks, growth and overlaps by cycle.

One weight at a time is in memory, or one layer's low-rank factors over all cycles; no model is ever loaded. A file is
used only when its size and SHA-256 are its manifest's, and a digest covers a whole file. So whole files are fetched,
but only those with a tensor that is needed. Source of the measures: arXiv 2307.05695.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from relora_train.checkpoints.fetch import FetchFiles
from relora_train.checkpoints.lineage import CheckpointRef
from relora_train.errors import CheckpointCorruptError, ConfigError, ModelError
from relora_train.reports.ranks.cycles import (
    ADAPTER_FILES,
    AdapterDirectory,
    CycleHistory,
    cycle_history,
    growth_points,
    history_operations,
)
from relora_train.reports.ranks.layers import block_matrices, named_by, representative_layers
from relora_train.reports.ranks.measures import LayerSpectrum
from relora_train.reports.ranks.weights import INDEX_NAME, WEIGHTS_NAME, WeightDirectory, update_spectra

INITIAL = "initial weights"
_WEIGHTS = re.compile(r"model(-[^/]+)?\.safetensors")

REPORT_WEIGHT_BYTES = 12 * 10**9
"""A report reads the weights of two checkpoints up to this size together."""
REPORT_ADAPTER_BYTES = 2 * 10**9
REPORT_OPERATIONS = 3e11
"""About half a minute on one core."""

OnLayer = Callable[[str], None]
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Layers:
    """The choice of weights; without `modules` the matrices of all blocks."""

    modules: tuple[str, ...] = ()
    """Ends of module names, whole segments, as in relora.target_modules."""
    few: bool = False
    """If True, only the layers that `representative_layers` chooses from these."""

    def named(self, names: Sequence[str]) -> Sequence[str]:
        """Return the weights chosen by their names alone, before any shape is known."""
        return named_by(self.modules, names) if self.modules else block_matrices(names)

    def choose(self, shapes: Shapes) -> Sequence[str]:
        """Return the chosen matrices of `shapes`. Raises ModelError if there is none."""
        found = self.named(tuple(shapes))
        if self.few:
            found = representative_layers({name: shapes[name] for name in found})
        if not found:
            wanted = f"called {' or '.join(self.modules)}" if self.modules else "in a numbered block of layers"
            known = ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in shapes})) or "none"
            raise ModelError(f"No matrix that both checkpoints have is {wanted}. Their matrices are called: {known}.")
        return found


@dataclass(frozen=True, eq=False)
class RankAnalysis:
    """The update from one checkpoint to another, and the cycles between them where they lie on one line."""

    start: str
    """'tale@warm-start', or INITIAL."""
    end: str
    start_uri: str | None
    end_uri: str
    spectra: tuple[LayerSpectrum, ...]
    history: CycleHistory | None
    note: str
    """Why there is no history, or what it leaves out; '' when there is nothing to say."""


def analyze(
    line: Sequence[CheckpointRef],
    fetch_files: FetchFiles,
    *,
    against: CheckpointRef | None = None,
    layers: Layers | None = None,
    with_history: bool = True,
    on_layer: OnLayer = lambda name: None,
) -> RankAnalysis:
    """Compare the last checkpoint of a line with `against`, any checkpoint of the same model.

    Without `against`: with `start_of_line`. `on_layer` hears what is at work. History comes from adapters where the
    stages between are low-rank ones, else from the weights of every checkpoint between. ConfigError when there is only
    one checkpoint to look at, or `against` is the end itself; ModelError for models that differ.
    """
    layers, end = layers or Layers(), line[-1]
    start = against or start_of_line(line)
    if start is not None and start.uri == end.uri:
        raise ConfigError(
            f"{end.uri} would be compared with itself. Name another checkpoint of the same model with --against."
        )
    on_line = start is None or any(start.uri == one.uri for one in line)
    stages, gap = low_rank_stages(line, start) if on_line else ((), None)
    if start is None:
        if gap:
            raise ConfigError(f"The initial weights are not stored, and {gap}. Name a checkpoint with --against.")
        cycles = fetch_cycles(stages, fetch_files)
        grown = cycle_history(cycles, layers.choose(_shapes_in_all(cycles)), on_layer)
        note = (
            "From the adapters: the initial weights are not stored, and in these layers a low-rank stage changes "
            f"nothing else.{_thinned(len(cycles))}"
        )
        total = tuple(spectra[-1] for spectra in grown.growth)
        return RankAnalysis(INITIAL, name_of(end), None, end.uri, total, grown, note)
    before, after = (fetch_weights(ref, fetch_files, layers.named) for ref in (start, end))
    held, there = WeightDirectory(after), set(WeightDirectory(before).held)
    shapes = {name: held.shape(name) for name in held.held if name in there}
    names = layers.choose({name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2})
    spectra: list[LayerSpectrum] = []
    for name in names:
        on_layer(name)
        spectra.extend(update_spectra(before, after, [name]))
    history, note = None, ""
    if not stages:
        note = f"{name_of(start)} is not on the line that led to {name_of(end)}: there are no cycles between them."
    elif with_history and gap is None:
        cycles = fetch_cycles(stages, fetch_files)
        updated = _shapes_in_all(cycles)
        known = [name for name in names if name in updated]
        if known:
            history = cycle_history(cycles, known, on_layer)
            few = f"Growth and overlaps are of the {len(known)} layers that every cycle updated, of {len(names)}."
            note = ((few if len(known) < len(names) else "") + _thinned(len(cycles))).strip()
        else:
            note = "No cycle-to-cycle growth: none of these layers has a low-rank update in every cycle."
    elif with_history:
        chosen = [stages[point - 1] for point in growth_points(len(stages))]
        directories = [fetch_weights(ref, fetch_files, layers.named) for ref in chosen]
        growth = []
        for name in names:
            on_layer(name)
            growth.append(tuple(next(update_spectra(before, directory, [name])) for directory in directories))
        history = CycleHistory(tuple(ref.manifest.stage for ref in chosen), (None,) * len(chosen), tuple(growth))
        note = f"Growth is from the weights of each checkpoint, without overlaps: {gap}."
    return RankAnalysis(name_of(start), name_of(end), start.uri, end.uri, tuple(spectra), history, note)


def name_of(ref: CheckpointRef) -> str:
    """Return 'tale@cycle-3'."""
    return f"{ref.manifest.run_id}@{ref.manifest.stage}"


def history_for_report(line: Sequence[CheckpointRef], fetch_files: FetchFiles) -> tuple[CycleHistory | None, str]:
    """Return growth and overlaps of representative layers, if that is cheap; else None and a reason."""
    start = start_of_line(line)
    stages, gap = low_rank_stages(line, start)
    if gap or not stages:
        return None, f"No growth from cycle to cycle: {gap}." if gap and any(map(has_adapter, stages)) else ""
    advice = f"`relora analyze {line[-1].manifest.run_id}` takes the time."
    adapters = [entry for ref in stages for entry in ref.manifest.files if entry.path in ADAPTER_FILES]
    if sum(entry.size_bytes for entry in adapters) > REPORT_ADAPTER_BYTES:
        return None, f"The adapters are too large to be read for every report. {advice}"
    cycles = fetch_cycles(stages, fetch_files)
    shapes = _shapes_in_all(cycles)
    names = representative_layers(shapes)
    if not names:
        return None, ""
    ranks = [cycle.factors(names[0]).rank for cycle in cycles]
    if history_operations([shapes[name] for name in names], ranks) > REPORT_OPERATIONS:
        return None, f"Growth and overlaps of layers this large are not computed for every report. {advice}"
    return cycle_history(cycles, names), ""


def spectra_for_report(
    start: CheckpointRef, end: CheckpointRef, fetch_files: FetchFiles
) -> tuple[tuple[LayerSpectrum, ...], str]:
    """Return the spectra of representative layers; none, and the reason, for weights above REPORT_WEIGHT_BYTES."""
    weights = [entry for ref in (start, end) for entry in ref.manifest.files if _WEIGHTS.fullmatch(entry.path)]
    if sum(entry.size_bytes for entry in weights) > REPORT_WEIGHT_BYTES:
        advice = f"`relora analyze {end.manifest.run_id} --few` takes the time."
        return (), f"The weights are too large to be read for every report. {advice}"
    before, after = (fetch_weights(ref, fetch_files, block_matrices) for ref in (start, end))
    return tuple(update_spectra(before, after)), ""


def _shapes_in_all(cycles: Sequence[AdapterDirectory]) -> Shapes:
    """Return the shapes of the weights that every cycle updated; branches may wrap other modules."""
    first, *others = cycles
    return {name: first.shape(name) for name in first.names if all(name in other.names for other in others)}


def _thinned(cycles: int) -> str:
    points = len(growth_points(cycles))
    return f" Growth is shown after {points} of {cycles} cycles." if points < cycles else ""


def fetch_weights(
    ref: CheckpointRef, fetch_files: FetchFiles, choose: Callable[[Sequence[str]], Sequence[str]]
) -> Path:
    """Return a directory with the index, if there is one, and the files that hold the chosen weights."""
    held = {entry.path for entry in ref.manifest.files}
    if INDEX_NAME not in held:
        return fetch_files(ref, [WEIGHTS_NAME])
    directory = fetch_files(ref, [INDEX_NAME])
    try:
        weight_map: dict[str, str] = json.loads((directory / INDEX_NAME).read_bytes())["weight_map"]
        files = sorted({weight_map[name] for name in choose(tuple(weight_map))})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(f"{ref.uri}/{INDEX_NAME} cannot be read: {error}. Use another one.") from None
    return fetch_files(ref, [INDEX_NAME, *files])


def has_adapter(ref: CheckpointRef) -> bool:
    """Return True if the checkpoint keeps the update that it merged."""
    return set(ADAPTER_FILES) <= {entry.path for entry in ref.manifest.files}


def fetch_cycles(refs: Sequence[CheckpointRef], fetch_files: FetchFiles) -> list[AdapterDirectory]:
    """Return the adapters of these checkpoints, each of which has one."""
    cycles = []
    for ref in refs:
        layers = ref.manifest.merge_report.get("layers", {})
        norms = {name: float(layer["weight_norm"]) for name, layer in layers.items() if "weight_norm" in layer}
        cycles.append(AdapterDirectory(fetch_files(ref, ADAPTER_FILES), ref.manifest.stage, norms))
    return cycles


def start_of_line(line: Sequence[CheckpointRef]) -> CheckpointRef | None:
    """Return where a run's total update begins: the last checkpoint before its first merge, else its first checkpoint.

    None stands for the initial weights, which are nowhere stored: where the first stage of all is a low-rank one that
    kept its adapter. All that a run without a warm start has changed in those layers is the sum of its adapters.
    """
    before = [ref for ref in line if ref.manifest.cycle == 0]
    merged = len(before) < len(line)
    if before:
        return before[-1] if merged else before[0]
    return None if line[0].manifest.parent is None and has_adapter(line[0]) else line[0]


def low_rank_stages(
    line: Sequence[CheckpointRef], start: CheckpointRef | None
) -> tuple[Sequence[CheckpointRef], str | None]:
    """Return the stages of a line after `start`, and why their adapters are not its whole update (None: they are)."""
    after = list(line)
    if start is not None:
        after = list(line[[ref.uri for ref in line].index(start.uri) + 1 :])
    before = start
    for ref in after:
        if not has_adapter(ref):
            return after, f"{ref.manifest.stage} is no low-rank stage, or keeps no adapter"
        parent = ref.manifest.parent
        if before is not None and parent is not None and parent.fingerprint != before.fingerprint:
            return after, f"the checkpoint that {ref.manifest.stage} started from was removed"
        before = ref
    return after, None
