"""The text of a record by its field's name, also inside other fields: 'text', or 'meta.body.text'."""

from collections.abc import Mapping
from typing import Any

from relora_train.data.left_out import NULL, Fault, text_or_fault


def field_path(names: Mapping[str, Any], text_field: str) -> list[str]:
    """Return the names that lead to a field: one where a field is called just so, dots included; else its parts."""
    return [text_field] if text_field in names else text_field.split(".")


def missing_field(
    names: Mapping[str, Any], text_field: str, where: str, setting: str = "data.text_field"
) -> str | None:
    """Say which part of a field's name is not there, and what is; None if all are, or one is null."""
    inside: Any = names
    path = field_path(names, text_field)
    for depth, name in enumerate(path):
        if not isinstance(inside, Mapping) or name not in inside:
            there = ", ".join(map(repr, inside)) if isinstance(inside, Mapping) else ""
            holder = f"{'.'.join(path[:depth])!r} has" if depth else "It has"
            said = f"{where} has no field {text_field!r}. {holder}: {there or 'no fields'}."
            return f"{said} Name the right one in {setting}."
        inside = inside[name]
        if inside is None:
            return None
    return None


def value_of(record: Mapping[str, Any], name: str, where: str, setting: str = "data.text_field") -> Any:
    """Return what a record holds under a field's name, NULL where that is null, or the fault that it is not there."""
    if missing := missing_field(record, name, where, setting):
        return Fault(missing, f"no field {name!r}")
    value: Any = record
    for part in field_path(record, name):
        value = value[part]
        if value is None:
            return NULL
    return value


def text_of(record: Mapping[str, Any], text_field: str, where: str, setting: str = "data.text_field") -> str | Fault:
    """Return a record's text, NULL where it or what holds it is null, or the fault that it has none."""
    value = value_of(record, text_field, where, setting)
    return value if isinstance(value, Fault) else text_or_fault(value, text_field, where, setting)
