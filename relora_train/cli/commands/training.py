"""Commands that train: run, retrain, compare, join, retry, and serve for those that a server starts."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from relora_train.cli.commands.options import (
    AsJson,
    CheckpointName,
    ProfileName,
    SeriesName,
    Sets,
    Store,
    Verbose,
    echo_json,
    resolve,
)
from relora_train.cli.output import console_for_people, tell


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
    verbose: Verbose = False,
) -> None:
    """Train a profile from wherever its run stands: tokenize, warm start, cycles, evaluation, report."""
    from relora_train.cli.run import run_profile

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
    from relora_train.cli.summary import print_summary

    print_summary(console, summary, seconds=time.monotonic() - started)


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
    verbose: Verbose = False,
) -> None:
    """Train a series on what its source holds more than last time; promote the result if it is better."""
    from relora_train.cli.retrain import print_retrain, retrain_series

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
    verbose: Verbose = False,
) -> None:
    """Run an experiment, every arm at every seed, from wherever it stands; table with errors, differences, report."""
    from relora_train.cli.compare import parse_seeds, print_comparison, print_measured, run_experiment
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
    from relora_train.runs.joining import join_run

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


def retry(
    checkpoint: CheckpointName,
    replace: Annotated[
        bool, typer.Option("--replace", help="If it comes out otherwise, let the run go on from the new attempt.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint's stage again from its parent, compare the bytes, and say what becomes of its descendants."""
    from relora_train.cli.retry import retry_checkpoint, retry_record, retry_view
    from relora_train.cli.tables import show as show_view

    console = console_for_people(to_stderr=as_json)
    outcome = retry_checkpoint(resolve(checkpoint, store), console, replace=replace)
    if as_json:
        echo_json(retry_record(outcome))
    else:
        show_view(console, retry_view(outcome))


def serve(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FLOW/NAME]...", help="Deployments to serve; all when absent.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Runs at a time; the others wait.")] = 1,
    poll: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often the server is asked.")] = 5,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Serve deployments of a work pool too; given back to it at the end.")
    ] = False,
) -> None:
    """Run the deployments of deploy/prefect.yaml from here, for the Prefect server that $PREFECT_API_URL names."""
    from relora_train.cli.serve import serve as serve_deployments

    serve_deployments(names or (), console_for_people(), limit=limit, poll_seconds=poll, take_over=take_over)
