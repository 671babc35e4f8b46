"""`relora deploy`: a deployment of one's own profile as a file for `prefect deploy`, and the shipped files."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer
import yaml

from relora_train.checkpoints.layout import check_name
from relora_train.checkpoints.series_record import check_series
from relora_train.cli.options import Sets, overrides_of
from relora_train.cli.output import require_writable, say
from relora_train.cli.serve import choose_deployments, deployments_file
from relora_train.errors import ConfigError
from relora_train.settings.keys import layered
from relora_train.settings.load import list_profiles, load_profile
from relora_train.settings.profile import Profile

SHIPPED = (
    "prefect.yaml", "automations.yaml", "automations.sh", "systemd/relora-server.service",
    "systemd/relora-worker.service",
)  # fmt: skip
"""The files of deploy/ that a machine without a checkout needs; the wheel brings them."""

_CRON = (("minute", 59), ("hour", 23), ("day", 31), ("month", 12), ("weekday", 7))
_PROGRAMS = "/opt/relora/bin"  # of the shipped units


def deploy(
    profile: Annotated[
        str | None, typer.Argument(help="Name of a shipped profile, or path of a TOML file.", show_default=False)
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="Retrain this series. With --cron it is named as the profile when absent.")
    ] = None,
    cron: Annotated[
        str | None, typer.Option(metavar="'M H D M W'", help="Retrain then: minute hour day month weekday.")
    ] = None,
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone of --cron, such as Europe/Berlin.")] = "UTC",
    sets: Sets = None,
    show: Annotated[bool, typer.Option("--print", help="Print the file instead of writing it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that was changed by hand.")] = False,
    init: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the shipped deployments, automations and systemd units there."),
    ] = None,
) -> None:
    """Write the deployment of a profile, or of a series that is retrained on a schedule, for `prefect deploy`."""
    if init is not None:
        if profile is not None:
            raise ConfigError(
                f"--init writes the shipped files and takes no profile (got {profile!r}). Give one of both."
            )
        write_shipped(init, force=force)
        return
    if profile is None:
        raise ConfigError("Name the profile to deploy, or give --init DIR for the shipped files.")
    made = deployment_of(profile, series=series, cron=cron, timezone=timezone, overrides=overrides_of(sets))
    flow = made["entrypoint"].rpartition(":")[2]
    path = Path(f"{made['name']}.prefect.yaml")
    register = f"prefect --no-prompt deploy --all --prefect-file {path}"
    head = (
        f"# {flow}/{made['name']}, made by `relora deploy`. Set RELORA_WORK_POOL to your work pool, then register it:\n"
    )
    text = f"{head}#     {register}\n{yaml.safe_dump({'deployments': [made]}, sort_keys=False, width=110)}"
    if show:
        say(text.rstrip())
        return
    _write(path, text, force=force)
    when = f"at {cron!r} ({timezone})" if cron else "when you start a run"
    say(f"{path}: {flow}/{made['name']}, {when}. Register it:\n    {register}")


def deployment_of(
    profile: str, *, series: str | None, cron: str | None, timezone: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return the deployment of a profile in Prefect's terms, with the job settings of the shipped ones.

    A series, or a schedule, makes it one of the flow retrain, otherwise it is one of pretrain.
    Raises ConfigError, also for what only this directory makes readable: a deployed run starts in another one.
    """
    settings = load_profile(profile, overrides)
    _refuse_relative_paths(settings, profile)
    if profile not in {path.stem for path in list_profiles()}:
        profile = str(Path(profile).absolute())
    parameters = {"profile": profile, **({"overrides": layered(overrides)} if overrides else {})}
    if series is None and cron is not None:
        series = settings.name
    if series is None:
        (like,) = choose_deployments(["pretrain/quickstart"])
        name, description = check_name(settings.name, "name of a deployment"), f"Train the profile {settings.name}."
    else:
        (like,) = choose_deployments(["retrain/nightly"])
        name, description = (
            check_series(series),
            f"Look for new data of the series {series}; train on it and promote what is better.",
        )
        parameters = {"series": series, **parameters}
    made = {key: like[key] for key in ("entrypoint", "pull", "version", "tags", "work_pool")}
    made = {"name": name, "description": description, **made, "parameters": parameters}
    if cron is not None:
        made["schedules"] = [{"slug": "relora", **_checked(cron, timezone)}]
    return made


def _refuse_relative_paths(settings: Profile, profile: str) -> None:
    given = [path for part in settings.data.parts() for path in (*part.paths, *part.validation_paths)]
    names = [name for name in (settings.tokenizer.path, settings.model.pretrained) if name and Path(name).exists()]
    for path in [path for path in given if "://" not in path and not path.startswith("file:")] + names:
        if not Path(path).expanduser().is_absolute():
            raise ConfigError(
                f"{profile} names {path!r}, relative to this directory, and a deployed run starts in another one. "
                f"Write the whole path, {str(Path(path).absolute())!r}, or an s3:// address."
            )


def _checked(cron: str, timezone: str) -> dict[str, str]:
    if len(cron.split()) != 5:
        raise ConfigError(
            f"--cron {cron!r} has {len(cron.split())} parts and needs five: minute, hour, day, month, weekday. "
            "Each night at a quarter past two is '15 2 * * *'."
        )
    for part, (name, most) in zip(cron.split(), _CRON, strict=True):
        if any(int(number) > most for number in re.findall(r"\d+", part)):
            raise ConfigError(f"--cron {cron!r} has {part!r} as its {name}, which is {most} at most.")
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError):  # ZoneInfoNotFoundError is a KeyError
        raise ConfigError(f"--timezone {timezone!r} is no zone of this machine. Write it as Europe/Berlin.") from None
    return {"cron": cron, "timezone": timezone}


def write_shipped(directory: Path, *, force: bool) -> None:
    """Write the shipped files; the units start the programs of this environment. Raises ConfigError, see _write."""
    require_writable(directory, "--init")
    programs = str(Path(sys.executable).parent)
    for name in SHIPPED:
        text = (deployments_file().parent / name).read_text(encoding="utf-8")
        _write(directory / name, text.replace(_PROGRAMS, programs), force=force)
        say(str(directory / name))


def _write(path: Path, text: str, *, force: bool) -> None:
    if path.exists() and not force and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path} is there with other content. --force replaces it; --print only shows it.")
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Run this in another directory.") from None
