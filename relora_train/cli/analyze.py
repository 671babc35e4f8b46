"""`relora analyze`: what a run changed in the weights, as tables, JSON and figures."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.text import Text

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.cli.options import AsJson, CheckpointName, Store, answer, resolve
from relora_train.cli.output import BLANK, View, console_for_people, facts, require_writable, table, tell
from relora_train.reports.ranks.analysis import Layers, RankAnalysis
from relora_train.reports.ranks.analysis import analyze as analyze_line
from relora_train.reports.ranks.cycles import CycleHistory
from relora_train.reports.ranks.layers import kind_of
from relora_train.reports.ranks.measures import KindSpectrum, LayerSpectrum, json_value, kind_means
from relora_train.runs.run import line_of
from relora_train.storage.workspace import checkpoint_cache
from relora_train.text import decimal


def analyze(
    checkpoint: CheckpointName,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Any checkpoint of the same model; the last one before the first merge when absent.",
        ),
    ] = None,
    modules: Annotated[
        list[str] | None, typer.Option("--module", metavar="NAME", help="Only these, e.g. q_proj. Repeatable.")
    ] = None,
    few: Annotated[bool, typer.Option("--few", help="Only some layers of the first, middle and last block.")] = False,
    every_layer: Annotated[bool, typer.Option("--layers", help="Show each layer, not the means of each kind.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Nothing from cycle to cycle: spectra only.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write figures and all numbers as JSON there.")
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show what training changed in the weights: ranks and spectra of the update, its growth, the cycles' overlap."""
    if output is not None:
        require_writable(output, "--output")
    ref = resolve(checkpoint, store)
    with console_for_people(to_stderr=True).status("fetching and verifying weights …") as status:
        analysis = analyze_line(
            line_of(ref),
            files_in_stores(checkpoint_cache(ref.manifest.run_id)),
            against=resolve(against, store) if against else None,
            layers=Layers(tuple(modules or ()), few),
            with_history=not no_history,
            on_layer=lambda name: status.update(Text(name)),
        )
    about = {"start": analysis.start, "start_uri": analysis.start_uri, "end": analysis.end, "end_uri": analysis.end_uri}
    numbers = {
        "kinds": [kind.record() for kind in kind_means(analysis.spectra)],
        "layers": [spectrum.record() for spectrum in analysis.spectra],
        "cycle_history": analysis.history and analysis.history.record(),
        "note": analysis.note,
    }
    record = {key: json_value(value) for key, value in (about | numbers).items()}
    if output is not None:
        _write(analysis, record, output)
    measured = analysis.spectra if every_layer else kind_means(analysis.spectra)
    rows = [
        (
            *([each.kind, str(each.layers)] if isinstance(each, KindSpectrum) else [each.name.removesuffix(".weight")]),
            f"{each.shape[0]} × {each.shape[1]}",
            f"{each.below_threshold:,.4g} of {min(each.shape):,}",
            decimal(each.effective_rank, 1),
            decimal(each.stable_rank, 1),
            decimal(each.numerical_rank, 0 if every_layer else 1),
            decimal(each.relative_update_norm, 4),
        )
        for each in measured
    ]
    first = ("layer",) if every_layer else ("kind", "layers")
    spectra = table((*first, "shape", "below 0.1", "effective rank", "stable rank", "rank", "‖ΔW‖/‖W‖"), rows)
    legend = Text("below 0.1: singular values of the update, of as many as the shorter side.", style="dim")
    parts: View = [facts({"from": analysis.start, "to": analysis.end}), BLANK, spectra, legend]
    if analysis.history is not None:
        parts += [BLANK, *_history(analysis.history)]
    answer(as_json, record, lambda: [*parts, BLANK, Text(analysis.note)] if analysis.note else parts)


def _write(analysis: RankAnalysis, record: dict[str, Any], directory: Path) -> None:
    """Write analysis.json, spectra.png, and growth.png where there is a history."""
    from relora_train.reports.plot_style import to_png
    from relora_train.reports.plots import rank_figures

    history = analysis.history
    ranks = [] if history is None else [rank for rank in history.growth_ranks if rank is not None]
    cycle_rank, total_rank = (ranks[0], ranks[-1]) if ranks else (None, None)
    figures = rank_figures(analysis.spectra, history, cycle_rank=cycle_rank, total_rank=total_rank)
    contents = {"analysis.json": (json.dumps(record, indent=1) + "\n").encode()}
    for name, content in (contents | {name: to_png(figure, dpi=160) for name, figure in figures.items()}).items():
        (directory / name).write_bytes(content)
        tell(f"Wrote {directory / name}")


def _history(history: CycleHistory) -> View:
    kinds: dict[str, list[tuple[LayerSpectrum, ...]]] = {}
    for layer in history.growth:
        kinds.setdefault(kind_of(layer[0].name), []).append(layer)
    growth = []
    for kind, layers in kinds.items():
        means = np.mean([[spectrum.effective_rank for spectrum in spectra] for spectra in layers], axis=0)
        growth.append((kind, *(decimal(float(mean), 1) for mean in means)))
    if all(rank is not None for rank in history.growth_ranks):
        growth.append(("at most", *map(str, history.growth_ranks)))
    parts: View = [table(("effective rank of all so far", *history.growth_stages), growth)]
    if history.overlap:
        titles = {"columns": "column spaces (what is written)", "rows": "row spaces (what is read)"}
        rows = [(titles[side], *(decimal(number, 4) for number in pair)) for side, pair in history.overlap.items()]
        parts += [BLANK, table(("overlap of successive cycles", "mean cos²", "by chance"), rows)]
    return parts
