"""The deployments of deploy/prefect.yaml, served without a work pool. Light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from relora_train.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def deployments_file() -> Path:
    """Return the file that ships with the project: in deploy/ of a checkout, inside the wheel when installed."""
    inside_wheel = _PACKAGE / "_deploy" / "prefect.yaml"
    return inside_wheel if inside_wheel.is_file() else _PACKAGE.parent / "deploy" / "prefect.yaml"


def read_deployments() -> list[dict[str, Any]]:
    """Return every deployment as Prefect's own `deploy` reads it, with `full_name`: pretrain/quickstart."""
    content = yaml.safe_load(deployments_file().read_text(encoding="utf-8"))
    return [{**each, "full_name": full_name(each)} for each in content["deployments"]]


def full_name(deployment: dict[str, Any]) -> str:
    """FLOW/NAME: our flows are named as their functions."""
    return f"{deployment['entrypoint'].rpartition(':')[2]}/{deployment['name']}"


def choose_deployments(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the deployments of these names, all of them for none. Raises ConfigError for one that does not exist."""
    known = {each["full_name"]: each for each in read_deployments()}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"There is no deployment {unknown[0]!r}. There are: {', '.join(known)}.")
    return [each for name, each in known.items() if not names or name in names]
