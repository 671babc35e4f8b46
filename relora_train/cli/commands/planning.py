"""Commands to read before anything starts: plan, profiles, experiments."""

from __future__ import annotations

from pathlib import Path

import typer

from relora_train.cli.commands.options import AsJson, ProfileName, Sets, echo_json
from relora_train.cli.output import console_for_people


def plan(profile: ProfileName, sets: Sets = None, as_json: AsJson = False) -> None:
    """Show what a profile comes to before anything starts: stages, tokens, parameters, memory, FLOPs."""
    from relora_train.cli.tables import plan_view
    from relora_train.cli.tables import show as show_view
    from relora_train.runs.plan import plan as plan_profile
    from relora_train.settings.load import load_profile

    planned = plan_profile(load_profile(profile, sets or ()))
    if as_json:
        typer.echo(planned.model_dump_json(indent=1))
    else:
        show_view(console_for_people(), plan_view(planned))


def profiles(as_json: AsJson = False) -> None:
    """List the shipped profiles."""
    from relora_train.cli.tables import add_row, table
    from relora_train.settings.load import list_profiles

    described = [{"name": path.stem, "about": _first_comment(path), "path": str(path)} for path in list_profiles()]
    if as_json:
        echo_json(described)
        return
    made = table("profile", "about", left=("about",))
    for item in described:
        add_row(made, item["name"], item["about"])
    console_for_people().print(made, highlight=False)


def experiments(as_json: AsJson = False) -> None:
    """List the shipped experiments."""
    from relora_train.cli.compare import describe_experiments, print_experiments

    described = describe_experiments()
    if as_json:
        echo_json(described)
    else:
        print_experiments(console_for_people(), described)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
