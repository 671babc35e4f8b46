"""HTML pages from templates/. Values are escaped. A page loads nothing from elsewhere, and runs charts.js at most."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from relora_train import text
from relora_train.reports import text as report_text
from relora_train.reports import work
from relora_train.reports.charts import tick_text
from relora_train.runs.divergence import divergence_text

TEMPLATES = Path(__file__).parent / "templates"
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Return the page. The same values give the same text; a name that is not given is an error.

    filters: those of the template's own, beside the common ones below.
    """
    environment = _environment().overlay(loader=FileSystemLoader([template.parent, TEMPLATES]))
    environment.filters = {**environment.filters, **(filters or {})}
    script = (TEMPLATES / "charts.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"with_charts": False, "script": Markup(script), "script_digest": f"sha256-{digest}", **values}  # noqa: S704  # our file
    return environment.get_template(template.name).render(**values)


def printable(text: str) -> str:
    """Return the text with a replacement character for controls, and for marks that change its direction."""
    return _UNPRINTABLE.sub("\ufffd", text)


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "attempts": work.attempts_text,
        "capitalized": text.capitalized,
        "change": report_text.change,
        "count": text.count,
        "data_url": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}",
        "decimal": text.decimal,
        "divergence_text": divergence_text,
        "duration": text.duration,
        "estimate": report_text.estimate_text,
        "flops": report_text.flops_text,
        "headline": report_text.headline_text,
        "in_training": report_text.in_training_text,
        "machine": work.machine_text,
        "percent": text.percent,
        "scientific": text.scientific,
        "score": report_text.score,
        "scores_change": report_text.scores_change,
        "signed_estimate": report_text.signed_estimate_text,
        "size": text.size,
        "stage_steps": lambda row: text.steps_text(row.start_step, row.end_step),
        "tick": tick_text,
        "unique_text": dict.fromkeys,
        "waited": work.waited,
    }
    return environment
