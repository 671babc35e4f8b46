"""HTML pages from templates/. Every value is escaped; a page may load nothing from elsewhere and run nothing."""

import base64
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from relora_train import text
from relora_train.reports import text as report_text
from relora_train.runs.divergence import divergence_text

TEMPLATES = Path(__file__).parent / "templates"
# Controls, and marks that change the direction of text: a replacement character stands in their place.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Return the page. The same values give the same text; a name that is not given is an error.

    filters: those of the template's own, beside the common ones below.
    """
    environment = _environment().overlay(loader=FileSystemLoader([template.parent, TEMPLATES]))
    environment.filters = {**environment.filters, **(filters or {})}
    return environment.get_template(template.name).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _UNPRINTABLE.sub("\ufffd", str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "capitalized": text.capitalized,
        "change": report_text.change,
        "count": text.count,
        "data_url": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}",
        "decimal": text.decimal,
        "divergence_text": divergence_text,
        "duration": text.duration,
        "estimate": report_text.estimate_text,
        "headline": report_text.headline_text,
        "percent": text.percent,
        "scientific": text.scientific,
        "score": report_text.score,
        "scores_change": report_text.scores_change,
        "signed_estimate": report_text.signed_estimate_text,
        "size": text.size,
        "stage_steps": lambda row: text.steps_text(row.start_step, row.end_step),
        "unique_text": dict.fromkeys,
    }
    return environment
