"""`relora compare`: an experiment, or the list of those that are shipped."""

from typing import Annotated, Any

import typer
from rich.text import Text

from relora_train.cli.options import AsJson, Pages, Sets, Store, Verbose, answer, open_named, overrides_of
from relora_train.cli.output import BLANK, View, place, table, tell
from relora_train.cli.run import check_inputs, run_shown
from relora_train.errors import ConfigError
from relora_train.experiments.experiment import list_experiments, load_experiment
from relora_train.experiments.measured import MeasuredSummary, is_measured, load_measured
from relora_train.experiments.records import ComparisonSummary
from relora_train.runs.model_check import check_settings
from relora_train.runs.task_scores import check_tasks
from relora_train.settings.objectives import LOSS
from relora_train.text import counted, duration


def compare(
    experiment: Annotated[
        str | None, typer.Argument(help="Name of a shipped experiment, or path of a TOML file; their list when absent.")
    ] = None,
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
    pages: Pages = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run an experiment, every arm at every seed, from wherever it stands; table with errors, differences, report."""
    if experiment is None:
        if sets or seeds or deployment:
            raise ConfigError(
                "--set, --seeds and --deployment are for an experiment. Name one; `relora compare` lists them."
            )
        _list_experiments(as_json=as_json)
        return
    if deployment is not None and not deployment.startswith("pretrain/"):
        raise ConfigError(
            f"--deployment {deployment!r} is no deployment of the flow pretrain: write it as pretrain/NAME."
        )
    parts = [part.strip() for part in seeds.split(",")] if seeds is not None else None
    if parts and not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {seeds!r} is not a list of numbers; write it as 0,1,2.")
    overrides, chosen = overrides_of(sets), None if parts is None else [int(part) for part in parts]
    planned = None
    if is_measured(experiment):
        load_measured(experiment, overrides, chosen)
    else:
        planned = load_experiment(experiment, overrides, chosen)
    opened = open_named(store)
    opened.preflight()
    if planned is not None:
        if measure := planned.runs[0].measure:
            check_tasks(measure.selection)
        for run in planned.runs:
            check_settings(run.profile)
        check_inputs(planned.runs[0].profile)
        arms, starts = counted(len(planned.config.arms), "arm"), counted(len(planned.warm_starts), "warm start")
        shared = f", branching from {starts}" if planned.warm_starts else ""
        each = f"{arms} x {counted(len(planned.seeds), 'seed')} of {planned.budget_tokens:,} tokens"
        tell(f"{planned.name}: {each}{shared}")
        if planned.budget_tokens != planned.config.budget_tokens:
            tell(f"The experiment's own budget is {planned.config.budget_tokens:,} tokens; --set changed it.")
        for key, own in planned.unreached.items():
            tell(f"--set {key} does not reach {', '.join(own)}.")
    parameters: dict[str, Any] = {
        "experiment": experiment,
        "overrides": overrides,
        "seeds": chosen,
        "store": opened.uri,
        "deployment": deployment,
    }
    run_shown("compare", parameters, view=summary_view, pages=pages, as_json=as_json, verbose=verbose)


def _list_experiments(*, as_json: bool) -> None:
    described: list[dict[str, Any]] = []
    for path in list_experiments():
        about: dict[str, Any]
        if is_measured(path.stem):
            about = {"title": load_measured(path.stem).config.title, "profile": None, "arms": [], "seeds": []}
        else:
            config = load_experiment(path.stem).config
            about = {"title": config.title, "profile": config.profile, "arms": [*config.arms], "seeds": [*config.seeds]}
        comments = path.read_text(encoding="utf-8").splitlines()
        takes = next((line.partition("# Time:")[2].strip() for line in comments if line.startswith("# Time:")), "")
        described.append({"name": path.stem, **about, "time": takes, "path": str(path)})
    rows = ((each["name"], str(len(each["arms"]) or "–"), each["title"]) for each in described)
    answer(as_json, described, lambda: [table(("experiment", "arms", "title"), rows, left=("title",))])


def summary_view(summary: ComparisonSummary | MeasuredSummary, seconds: float) -> View:
    """Return the tables of an experiment and the places of everything."""
    places = [f"Report: {place(summary.html_uri)}", f"JSON:   {place(summary.json_uri)}"]
    parts: View = []
    if isinstance(summary, MeasuredSummary):
        name = summary.experiment
        for each in summary.measured.tables:
            parts += [BLANK, table(each.header, each.rows, title=each.title), Text(each.note, style="dim")]
        places.insert(0, summary.measured.headline)
    else:
        from relora_train.experiments.comparison import arm_cells, arm_header
        from relora_train.reports.text import signed_estimate_text

        data = summary.comparison
        parts = [BLANK, table(arm_header(data), [arm_cells(data, row) for row in data.arms])]
        judged, shown = data.measures.judged, list(dict.fromkeys((LOSS, data.measures.headline)))
        paired = [
            (data.label(each.arm), *(signed_estimate_text(each.score(measure)) for measure in shown), str(score.count))
            for each in data.differences
            if each.arm != data.reference and (score := each.score(judged)) is not None
        ]
        if paired:
            columns = (f"less {data.label(data.reference)}", *(measure.name for measure in shown), "pairs")
            parts += [BLANK, table(columns, paired)]
        name = data.experiment
        if summary.reused:
            places.append(f"Reused: {summary.reused} of {len(summary.comparison.runs)} runs")
    return [*parts, BLANK, *map(Text, places), Text(f"Experiment {name} finished in {duration(seconds)}.")]
