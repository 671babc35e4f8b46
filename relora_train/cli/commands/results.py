"""Commands that make something of a checkpoint: evaluate, export, report, analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from relora_train.cli.commands.options import AsJson, CheckpointName, RunName, Store, echo_json, open_named, resolve
from relora_train.cli.output import console_for_people, require_writable, say, tell
from relora_train.errors import StorageError


def evaluate(checkpoint: CheckpointName, store: Store = None, as_json: AsJson = False) -> None:
    """Score a checkpoint on its dataset's validation split and sample from it; recorded scores are reused."""
    from relora_train.cli.run import evaluate_checkpoint
    from relora_train.cli.tables import evaluation_view
    from relora_train.cli.tables import show as show_view

    console = console_for_people(to_stderr=as_json)
    outcome = evaluate_checkpoint(resolve(checkpoint, store), console)
    if as_json:
        echo_json({**outcome.record, "reused": outcome.reused})
    else:
        show_view(console, evaluation_view(outcome.record, reused=outcome.reused))


def export(
    checkpoint: CheckpointName,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes: new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model in a directory that is not empty.")] = False,
    as_adapter: Annotated[
        bool,
        typer.Option("--as-adapter", help="Write a PEFT adapter for the checkpoint that the stage began from."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; as the weights were that the run began from when absent."),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write the merged model of a checkpoint for transformers, every byte verified."""
    from relora_train.checkpoints.manifest import Dtype
    from relora_train.cli.export import export_adapter, export_model, unfinished_stages
    from relora_train.errors import ConfigError
    from relora_train.text import size

    refused = ["--force"] * force + [f"--dtype {dtype}"] * (dtype not in (None, "float32"))
    if as_adapter and refused:
        given = " and ".join(refused)
        raise ConfigError(f"--as-adapter writes float32 to a new directory. Leave {given} out, or --as-adapter.")
    if dtype not in (None, *get_args(Dtype)):
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}.")
    ref, parent = resolve(checkpoint, store), None
    if as_adapter:
        written, parent = export_adapter(ref, directory)
    else:
        written = export_model(ref, directory, force=force, dtype=cast(Dtype | None, dtype))
    unfinished = unfinished_stages(ref)
    for kept in filter(None, (ref, parent)):
        _record_export(kept, written.directory)
    if as_json:
        names = [entry.path for entry in written.files]
        about = {"stage": ref.manifest.stage, "step": ref.step, "unfinished_stages": unfinished}
        origin = {"directory": str(written.directory), "checkpoint_uri": written.checkpoint_uri}
        echo_json({**origin, **about, "dtype": written.dtype, "files": names})
        return
    what = f"{ref.manifest.run_id}@{ref.manifest.stage}, step {ref.step}"
    say(f"{what}: {len(written.files)} files, {size(written.size_bytes)}, in {written.directory}")
    if dtype is None and not as_adapter:
        why = "those were that the run began from" if ref.manifest.source_dtype else "the checkpoint holds them"
        hint = "" if written.dtype == "float32" else "; --dtype float32 rounds nothing"
        say(f"The weights are {written.dtype}, as {why}{hint}.")
    if unfinished:
        say(f"The run is not finished: its settings plan {', '.join(unfinished)} after this.")
    if as_adapter:
        base = parent.uri if parent else "the model.pretrained of its run"
        say(f'Load it with PeftModel.from_pretrained(model, "{written.directory}"), model being {base}.')
    else:
        say(f'Load it with AutoModelForCausalLM.from_pretrained("{written.directory}").')


def report(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """Write the report of a run again from its checkpoints and recorded evaluations."""
    from relora_train.cli.run import write_report
    from relora_train.cli.summary import place

    console = console_for_people(to_stderr=as_json)
    written = write_report(resolve(run, store), console)
    if as_json:
        echo_json({"report_uri": written.html_uri, "picture_uris": written.picture_uris, "summary": written.summary})
    else:
        say(f"Report: {place(written.html_uri)}")


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
    from relora_train.cli import analyze as ranks
    from relora_train.cli.tables import show as show_view

    if output is not None:
        require_writable(output, "--output", directory=True)
    analysis = ranks.analyze_checkpoint(
        resolve(checkpoint, store),
        resolve(against, store) if against else None,
        modules=tuple(modules or ()),
        few=few,
        with_history=not no_history,
        console=console_for_people(to_stderr=True),
    )
    if output is not None:
        for path in ranks.write_analysis(analysis, output):
            tell(f"Wrote {path}")
    if as_json:
        echo_json(ranks.analysis_record(analysis))
    else:
        show_view(console_for_people(), ranks.analysis_view(analysis, every_layer=every_layer))


def _record_export(ref: Any, directory: Path) -> None:
    """Best effort: a store that can only be read still exports."""
    from relora_train.checkpoints.pins import record_export

    if not ref.prefix:
        return
    try:
        record_export(open_named(ref.store_uri), ref, directory)
    except StorageError as error:
        tell(f"The export is not recorded, so a prune may remove its checkpoint: {error}")
