"""The `relora` command. Its start is light: torch, Prefect and boto3 are imported by the commands that need them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from relora_train.console.output import complain, console_for_people, describe_fault, tell, was_interrupted
from relora_train.errors import CheckpointError, ReLoRAError, StorageError, TrainerInterruptedError

_EXIT_CODES = """
[bold]Exit codes[/bold]

0 done · 1 an unexpected fault · 2 a command line, profile or setting

3 a corpus or tokenizer · 4 a model · 5 a store · 6 a checkpoint, or verify found something · 7 training

130 stopped by Ctrl-C · 143 stopped by SIGTERM

With --json standard output is JSON alone; progress and messages go to standard error.
"""

app = typer.Typer(
    name="relora",
    help="Train language models with ReLoRA: a warm start at full rank, then low-rank cycles, each merged into the "
    "weights. Every stage ends in a checkpoint that is complete or absent; the same command goes on from there.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting over the profile, e.g. relora.rank=16. Repeatable."),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="A directory, file:// or s3://bucket/prefix. Without it $RELORA_STORE, else ./relora-store.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ProfileName = Annotated[str, typer.Argument(help="Name of a shipped profile, or path of a TOML file.")]
CheckpointName = Annotated[
    str,
    typer.Argument(
        help="RUN, RUN@latest, RUN@warm-start, RUN@cycle-2, RUN@step-400, series:NAME, or a checkpoint's URI or "
        "directory."
    ),
]
SeriesName = Annotated[str, typer.Argument(help="Name of the series, as `relora series` shows it.")]
RunName = Annotated[str, typer.Argument(help="Run id, as `relora runs` shows it.")]


@app.callback(invoke_without_command=True)
def relora(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"relora-train {version_of('relora-train')}")
        raise typer.Exit


@app.command()
def run(
    profile: ProfileName,
    sets: Sets = None,
    run_id: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name continues it. Derived from the settings when absent."),
    ] = None,
    store: Store = None,
    resume_from: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Start from this checkpoint of any run; other settings make a branch."),
    ] = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log in place of the progress.")] = False,
) -> None:
    """Train a profile from wherever its run stands: tokenize, warm start, cycles, evaluation, report."""
    from relora_train.console.run import run_profile

    started = time.monotonic()
    console = console_for_people(to_stderr=as_json)
    summary = run_profile(
        profile,
        sets or (),
        run_id=run_id,
        store_uri=store,
        resume_from=resume_from,
        console=console,
        verbose=verbose,
    )
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
        return
    from relora_train.console.summary import print_summary

    print_summary(console, summary, seconds=time.monotonic() - started)


@app.command()
def retrain(
    series: SeriesName,
    profile: ProfileName,
    sets: Sets = None,
    cycles: Annotated[int, typer.Option(min=1, help="Cycles added to the champion's.")] = 1,
    margin: Annotated[float, typer.Option(min=0, help="By how much the validation loss must fall.")] = 0.0,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="The margin is in nats per token, not a share of the champion's loss.")
    ] = False,
    old_data_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training text that is old data mixed in; below 1.")
    ] = 0.25,
    fresh_warm_start: Annotated[
        bool, typer.Option("--fresh-warm-start", help="Train the whole plan anew on all data.")
    ] = False,
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="A refused candidate's data stays new for the next retrain.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log in place of the progress.")] = False,
) -> None:
    """Train a series on what its source holds more than last time; promote the result if it is better."""
    from relora_train.console.retrain import print_retrain, retrain_series

    console = console_for_people(to_stderr=as_json)
    summary = retrain_series(
        series,
        profile,
        sets or (),
        {
            "cycles": cycles,
            "margin": margin,
            "margin_kind": "absolute" if absolute else "relative",
            "old_data_ratio": old_data_ratio,
            "fresh_warm_start": fresh_warm_start,
            "retry_refused": retry_refused,
        },
        store_uri=store,
        console=console,
        verbose=verbose,
    )
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
    else:
        print_retrain(console, summary)


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="Name of a shipped experiment, or path of a TOML file.")],
    sets: Sets = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Instead of the experiment's.", show_default=False)
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            metavar="pretrain/NAME",
            help="Have the runs made side by side by this deployment of the server in PREFECT_API_URL.",
        ),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log in place of the progress.")] = False,
) -> None:
    """Run an experiment, every arm at every seed, from wherever it stands; table with errors, differences, report."""
    from relora_train.console.compare import parse_seeds, print_comparison, print_measured, run_experiment
    from relora_train.experiments.measured import MeasuredSummary

    started = time.monotonic()
    console = console_for_people(to_stderr=as_json)
    summary = run_experiment(
        experiment,
        sets or (),
        seeds=parse_seeds(seeds),
        store_uri=store,
        deployment=deployment,
        console=console,
        verbose=verbose,
    )
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
    elif isinstance(summary, MeasuredSummary):
        print_measured(console, summary, seconds=time.monotonic() - started)
    else:
        print_comparison(console, summary, seconds=time.monotonic() - started)


@app.command()
def experiments(as_json: AsJson = False) -> None:
    """List the shipped experiments."""
    from relora_train.console.compare import describe_experiments, print_experiments

    described = describe_experiments()
    if as_json:
        _echo_json(described)
    else:
        print_experiments(console_for_people(), described)


@app.command()
def join(
    rdzv_endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="The profile's launch.rdzv_endpoint.")],
    nnodes: Annotated[int, typer.Option(min=2, help="Its launch.nnodes.")],
    node_rank: Annotated[
        int,
        typer.Option(
            min=1,
            envvar=["NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"],
            help="This machine's number; the flow's has 0.",
        ),
    ],
    nproc_per_node: Annotated[str, typer.Option(help="Its launch.nproc_per_node: a number, or gpu.")] = "1",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    wait_seconds: Annotated[int, typer.Option(min=1, help="Leave when no stage has begun for so long.")] = 600,
) -> None:
    """Train along on another machine, stage after stage, with a run that was started with launch.nnodes above 1."""
    from relora_train.parallel.joining import join_run

    joined = join_run(
        rdzv_endpoint=rdzv_endpoint,
        nnodes=nnodes,
        node_rank=node_rank,
        nproc_per_node=nproc_per_node,
        device=device,
        wait_seconds=wait_seconds,
        tell=tell,
    )
    tell(f"This machine took part in {joined} of the run's stages.")


@app.command()
def plan(profile: ProfileName, sets: Sets = None, as_json: AsJson = False) -> None:
    """Show what a profile comes to before anything starts: stages, tokens, parameters, memory, FLOPs."""
    from relora_train.console.tables import plan_view
    from relora_train.console.tables import show as show_view
    from relora_train.plan import plan as plan_profile
    from relora_train.profiles import load_profile

    planned = plan_profile(load_profile(profile, sets or ()))
    if as_json:
        typer.echo(planned.model_dump_json(indent=1))
    else:
        show_view(console_for_people(), plan_view(planned))


@app.command()
def profiles(as_json: AsJson = False) -> None:
    """List the shipped profiles."""
    from relora_train.console.tables import add_row, table
    from relora_train.profiles import list_profiles

    described = [{"name": path.stem, "about": _first_comment(path), "path": str(path)} for path in list_profiles()]
    if as_json:
        _echo_json(described)
        return
    made = table("profile", "about", left=("about",))
    for item in described:
        add_row(made, item["name"], item["about"])
    console_for_people().print(made, highlight=False)


@app.command()
def runs(
    tree: Annotated[bool, typer.Option("--tree", help="Show which run branched from which, and where.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a store, or draw how they descend from each other."""
    from relora_train.checkpoint_store import list_runs
    from relora_train.console.tables import runs_view
    from relora_train.console.tables import show as show_view

    opened = _open(store)
    if tree:
        _print_tree(opened, as_json=as_json)
        return
    found = list_runs(opened)
    if as_json:
        _echo_json([{**vars(info), "modified_at": info.modified_at.isoformat()} for info in found])
    elif found:
        show_view(console_for_people(), [Text(f"In {opened.uri}"), *runs_view(found)])
    else:
        _say_empty(opened)


@app.command()
def checkpoints(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """List the committed checkpoints of a run."""
    from relora_train.checkpoint_resolve import resolve_checkpoint
    from relora_train.checkpoint_store import CheckpointStore, line_to
    from relora_train.console.tables import checkpoints_view
    from relora_train.console.tables import show as show_view
    from relora_train.errors import CheckpointAmbiguousError, CheckpointCorruptError

    held = CheckpointStore(_open(store), run)
    refs, faults = held.survey()
    if not refs and not faults:
        resolve_checkpoint(f"{run}@latest", held.store)  # raises what is to be said of a run without checkpoints
    try:
        latest = held.latest()
    except (CheckpointAmbiguousError, CheckpointCorruptError):
        latest = None
    line = line_to(latest, refs) if latest else ()
    if as_json:
        _echo_json([{**_checkpoint_json(ref), "on_line": ref in line} for ref in refs])
    else:
        show_view(console_for_people(), checkpoints_view(refs, line))
    for fault in faults:
        complain(str(fault))
    if faults:
        raise typer.Exit(CheckpointError.exit_code)


@app.command()
def show(
    checkpoint: CheckpointName,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it first.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a checkpoint: scores, lineage, files, merge."""
    from relora_train.bundle import verify_bundle
    from relora_train.console.lineage_view import lineage_record, lineage_view
    from relora_train.console.tables import checkpoint_view
    from relora_train.console.tables import show as show_view
    from relora_train.lineage import draw_lineage, read_checkpoints, read_heads
    from relora_train.run import line_of

    ref = _resolve(checkpoint, store)
    if verify:
        verify_bundle(_open(ref.store_uri), ref.prefix, ref.manifest)
    line = line_of(ref)
    known = [*read_checkpoints(_open(ref.store_uri)), *line]
    heads = read_heads(_open(ref.store_uri), known)
    roots = [
        root
        for root in draw_lineage(known, heads)
        if any(ref.uri == one.uri for part in root.all_lines() for one in part.checkpoints)
    ]
    if as_json:
        lineage = [{"stage": one.manifest.stage, "step": one.step, "uri": one.uri} for one in line]
        _echo_json({**_checkpoint_json(ref), "lineage": lineage, "tree": lineage_record(roots[0]), "verified": verify})
        return
    verified = [Text("Every file is as its manifest says.")] if verify else []
    tree = [Text(""), Text("Runs it belongs with", style="bold"), *lineage_view(roots, heads, marked=ref.uri)]
    show_view(console_for_people(), [*checkpoint_view(ref, line), *(tree if roots[0].branches else []), *verified])


@app.command()
def retry(
    checkpoint: CheckpointName,
    replace: Annotated[
        bool, typer.Option("--replace", help="If it comes out otherwise, let the run go on from the new attempt.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint's stage again from its parent, compare the bytes, and say what becomes of its descendants."""
    from relora_train.console.retry import retry_checkpoint, retry_record, retry_view
    from relora_train.console.tables import show as show_view

    console = console_for_people(to_stderr=as_json)
    outcome = retry_checkpoint(_resolve(checkpoint, store), console, replace=replace)
    if as_json:
        _echo_json(retry_record(outcome))
    else:
        show_view(console, retry_view(outcome))


@app.command()
def evaluate(checkpoint: CheckpointName, store: Store = None, as_json: AsJson = False) -> None:
    """Score a checkpoint on its dataset's validation split and sample from it; recorded scores are reused."""
    from relora_train.console.run import evaluate_checkpoint
    from relora_train.console.tables import evaluation_view
    from relora_train.console.tables import show as show_view

    console = console_for_people(to_stderr=as_json)
    outcome = evaluate_checkpoint(_resolve(checkpoint, store), console)
    if as_json:
        _echo_json({**outcome.record, "reused": outcome.reused})
    else:
        show_view(console, evaluation_view(outcome.record, reused=outcome.reused))


@app.command()
def bench(
    shapes: Annotated[list[str] | None, typer.Argument(metavar="SHAPE", help="9m, 20m, 35m, 130m … llama_1b.")] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="On the input of A, in every arm.")] = 0.1,
    rank: Annotated[int | None, typer.Option(min=1, help="Instead of the shape's.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Instead of the shape's.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="In a step, instead of the shape's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each, all arms take their turn.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of an arm in a round.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an arm.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile, in every arm.")] = False,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Only this one; give it again for more.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the numbers as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this library's training step beside full rank, the paper's ReLoRA and peft: speed, FLOPs, memory."""
    from relora_train.console import bench as benchmark
    from relora_train.console.tables import show as show_view
    from relora_train.errors import ConfigError

    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"--precision {precision!r} is not float32 or bfloat16.")
    record = benchmark.bench(
        shapes or benchmark.DEFAULT_SHAPES,
        precision=precision,  # type: ignore[arg-type]  # checked above
        dropout=dropout,
        rank=rank,
        sequence_length=sequence_length,
        sequences=sequences,
        rounds=rounds,
        steps=steps,
        threads=threads,
        compiled=compiled,
        arms=arms or (),
        console=console_for_people(to_stderr=True),
    )
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n")
    if as_json:
        _echo_json(record)
    else:
        show_view(console_for_people(), benchmark.bench_view(record))


@app.command()
def export(
    checkpoint: CheckpointName,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes: new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model in a directory that is not empty.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write the merged model of a checkpoint for transformers, every byte verified."""
    from relora_train.console.export import export_model
    from relora_train.units import size_text

    ref = _resolve(checkpoint, store)
    written = export_model(ref, directory, force=force)
    _record_export(ref, written.directory)
    if as_json:
        names = [entry.path for entry in written.files]
        _echo_json({"directory": str(written.directory), "checkpoint_uri": written.checkpoint_uri, "files": names})
        return
    typer.echo(f"{len(written.files)} files, {size_text(written.size_bytes)}, in {written.directory}")
    typer.echo(f'Load it with AutoModelForCausalLM.from_pretrained("{written.directory}").')


@app.command()
def report(run: RunName, store: Store = None, as_json: AsJson = False) -> None:
    """Write the report of a run again from its checkpoints and recorded evaluations."""
    from relora_train.console.run import write_report
    from relora_train.console.summary import place

    console = console_for_people(to_stderr=as_json)
    written = write_report(_resolve(run, store), console)
    if as_json:
        _echo_json({"report_uri": written.html_uri, "picture_uris": written.picture_uris, "summary": written.summary})
    else:
        typer.echo(f"Report: {place(written.html_uri)}")


@app.command(name="analyze")
def analyze_ranks(
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
    from relora_train.console import analyze
    from relora_train.console.tables import show as show_view

    analysis = analyze.analyze_checkpoint(
        _resolve(checkpoint, store),
        _resolve(against, store) if against else None,
        modules=tuple(modules or ()),
        few=few,
        with_history=not no_history,
        console=console_for_people(to_stderr=True),
    )
    if output is not None:
        for path in analyze.write_analysis(analysis, output):
            tell(f"Wrote {path}")
    if as_json:
        _echo_json(analyze.analysis_record(analysis))
    else:
        show_view(console_for_people(), analyze.analysis_view(analysis, every_layer=every_layer))


@app.command()
def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FLOW/NAME]...", help="Deployments to serve; all when absent.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Runs at a time; the others wait.")] = 1,
    poll: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often the server is asked.")] = 5,
) -> None:
    """Run the deployments of deploy/prefect.yaml from here, for the Prefect server that $PREFECT_API_URL names."""
    from relora_train.console.serve import serve as serve_deployments

    serve_deployments(names or (), console_for_people(), limit=limit, poll_seconds=poll)


@app.command()
def prune(
    run: RunName,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Of every line keep the last so many.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Also keep every so many-th cycle.")] = None,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Leftovers of killed writers go when untouched for so long.")
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go and why the rest stays.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints that neither the policy (these options, else the profile's) nor anything else keeps."""
    from relora_train.console import upkeep
    from relora_train.console.tables import show as show_view

    report = upkeep.prune(
        _open(store), run, keep_last=keep_last, keep_every=keep_every, grace_hours=grace_hours, dry_run=dry_run
    )
    if as_json:
        _echo_json(upkeep.prune_json(report))
    else:
        show_view(console_for_people(), upkeep.prune_view(report))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run id, or any name of a checkpoint.")],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and name what is missing, damaged or unreferenced; exit code 0 only for nothing."""
    from relora_train.console import upkeep
    from relora_train.console.tables import show as show_view

    found = upkeep.verify(_open(store), name)
    if as_json:
        _echo_json(found.to_json())
    else:
        show_view(console_for_people(), upkeep.verify_view(found))
    if not found.is_clean:
        raise typer.Exit(CheckpointError.exit_code)


@app.command()
def pin(
    checkpoint: CheckpointName,
    name: Annotated[str | None, typer.Option(help="Name of the pin; made from the checkpoint's when absent.")] = None,
    store: Store = None,
) -> None:
    """Keep a checkpoint from every prune until it is unpinned."""
    from relora_train.upkeep import pins

    ref = _resolve(checkpoint, store)
    typer.echo(f"{ref.uri} is pinned as {pins.pin(_open(ref.store_uri), ref, name)}.")


@app.command()
def unpin(
    checkpoint: CheckpointName,
    name: Annotated[str | None, typer.Option(help="Only this pin; all of the checkpoint's when absent.")] = None,
    store: Store = None,
) -> None:
    """Remove the pins and export marks of a checkpoint."""
    from relora_train.upkeep import pins

    ref = _resolve(checkpoint, store)
    removed = pins.unpin(_open(ref.store_uri), ref, name)
    typer.echo(f"{ref.uri} is no longer pinned as {', '.join(removed)}.")


@app.command()
def series(
    name: Annotated[str | None, typer.Argument(metavar="SERIES", help="Its history; all series when absent.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the series of a store with what they have promoted, or show the history of one."""
    from relora_train.console import series as console_series
    from relora_train.console.tables import show as show_view

    opened = _open(store)
    if as_json:
        _echo_json(console_series.series_json(opened, name) if name else console_series.all_series_json(opened))
    else:
        view = console_series.series_view(opened, name) if name else console_series.all_series_view(opened)
        show_view(console_for_people(), view)


@app.command()
def promote(
    series: SeriesName,
    checkpoint: CheckpointName,
    reason: Annotated[str, typer.Option(help="For the history.")] = "promoted by hand",
    store: Store = None,
) -> None:
    """Make a checkpoint the champion of a series; the next retrain goes on from it."""
    from relora_train.console.series import change_line
    from relora_train.retraining.series import promote as promote_checkpoint

    opened = _open(store)
    made = promote_checkpoint(opened, series, _resolve(checkpoint, opened.uri), reason=reason)
    typer.echo(change_line(opened, series, made))


@app.command()
def rollback(
    series: SeriesName,
    to: Annotated[
        int | None, typer.Option(min=1, help="Number of the change to go back to; the champion before when absent.")
    ] = None,
    data_again: Annotated[
        bool, typer.Option("--data-again", help="What the promotions taken back were trained on is new data again.")
    ] = False,
    reason: Annotated[str, typer.Option(help="For the history.")] = "rolled back by hand",
    store: Store = None,
) -> None:
    """Make an earlier champion of a series the champion again."""
    from relora_train.console import series as console_series

    for line in console_series.roll_back_lines(_open(store), series, to, reason=reason, data_again=data_again):
        typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console entry point. Ends with a documented exit code; an error of ours is one message and no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        typer.main.get_command(app)(given, prog_name="relora")
    except TrainerInterruptedError as error:
        tell(str(error))
        sys.exit(error.exit_code)
    except ReLoRAError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if was_interrupted(error):
            tell("Stopped by Ctrl-C. Every committed stage is kept; the same command goes on from there.")
            sys.exit(TrainerInterruptedError.exit_code)
        complain(describe_fault(error, verbose="--verbose" in given))
        sys.exit(1)
    sys.exit(0)


def _open(uri: str | None) -> Any:
    from relora_train.run import default_store_uri
    from relora_train.storage.opening import open_store

    return open_store(uri or default_store_uri())


def _print_tree(store: Any, *, as_json: bool) -> None:
    from relora_train.console.lineage_view import lineage_record, lineage_view
    from relora_train.console.tables import show as show_view
    from relora_train.lineage import draw_lineage, read_checkpoints, read_heads

    refs = read_checkpoints(store)
    heads = read_heads(store, refs)
    lines = draw_lineage(refs, heads)
    if as_json:
        _echo_json([lineage_record(line) for line in lines])
    elif lines:
        show_view(console_for_people(), [Text(f"In {store.uri}"), *lineage_view(lines, heads)])
    else:
        _say_empty(store)


def _say_empty(store: Any) -> None:
    inside = store.local_path("runs")
    missing = inside is not None and not inside.parent.is_dir()
    typer.echo(f"No run has a checkpoint in {store.uri} yet{': there is no such directory' if missing else ''}.")


def _resolve(name: str, store: str | None) -> Any:
    from relora_train.checkpoint_resolve import resolve_checkpoint

    return resolve_checkpoint(name, _open(store))


def _record_export(ref: Any, directory: Path) -> None:
    """Best effort: a store that can only be read still exports."""
    from relora_train.upkeep.pins import record_export

    if not ref.prefix:
        return
    try:
        record_export(_open(ref.store_uri), ref, directory)
    except StorageError as error:
        tell(f"The export is not recorded, so a prune may remove its checkpoint: {error}")


def _checkpoint_json(ref: Any) -> dict[str, Any]:
    return {"uri": ref.uri, **ref.manifest.model_dump(mode="json")}


def _echo_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


if __name__ == "__main__":
    main()
