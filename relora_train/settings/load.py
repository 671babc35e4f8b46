"""Find profiles and turn TOML and overrides into a Profile."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from relora_train.errors import ConfigError, ProfileInvalidError, ProfileNotFoundError
from relora_train.settings.keys import layered
from relora_train.settings.profile import Profile
from relora_train.storage.redaction import refuse_secrets

_PACKAGE = Path(__file__).resolve().parents[1]


def profile_directory() -> Path:
    """Return the directory of the shipped profiles: beside the packages in a checkout, or inside the wheel."""
    inside_wheel = _PACKAGE / "_profiles"
    return inside_wheel if inside_wheel.is_dir() else _PACKAGE.parent / "profiles"


def list_profiles() -> list[Path]:
    """Paths of the shipped profiles, by name."""
    return sorted(profile_directory().glob("*.toml"))


def load_profile(name_or_path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Profile:
    """Resolve a shipped profile's name, or a path to a TOML file, under overrides.

    overrides: 'section.key=value' strings (value in TOML, or bare text), or a mapping of dotted keys to values. A table
    as a value is a section of which the keys it names are set, and no others.
    Raises ProfileNotFoundError, ProfileInvalidError (all faults at once, each with file and field), ConfigError.
    """
    path = _find(name_or_path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileInvalidError(f"{path} is not valid TOML: {error}. Correct the file and run again.") from None
    except OSError as error:
        raise ProfileNotFoundError(f"{path} cannot be read: {error.strerror}. Make it readable.") from None
    sources: dict[str, str] = {}
    settings.setdefault("name", path.stem)
    alone = settings
    items = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    for key, value in items:
        settings = _with_override(settings, key, value)
        sources[key] = f"overrides {key}" if isinstance(overrides, Mapping) else f"--set {key}"
    return _validate(settings, path, sources, alone)


def _find(name_or_path: str | Path) -> Path:
    path = Path(refuse_secrets(str(name_or_path)))
    shipped = {entry.stem: entry for entry in list_profiles()}
    if isinstance(name_or_path, str) and name_or_path in shipped:
        return shipped[name_or_path]  # a file "smoke" in the working directory is meant by "./smoke"
    if path.is_file():
        if path.suffix != ".toml":
            raise ProfileNotFoundError(f"{path} does not end in .toml, as a profile's file must. Rename it.")
        return path
    close = difflib.get_close_matches(str(name_or_path), shipped, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ProfileNotFoundError(
        f"There is no profile {str(name_or_path)!r}, neither shipped nor as a file.{hint} "
        f"Shipped: {', '.join(shipped)}. Give one of these or the path of a TOML file."
    )


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of a `--set section.key=value`; the value is TOML, or bare text. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        lacks = "no key before '='" if separator else "no '='"
        raise ConfigError(f"--set {text!r} has {lacks}; write it as section.key=value, e.g. relora.rank=16.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _with_override(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    table: Any = settings
    for section in key.split(".")[:-1]:
        table = table.get(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {section!r} is a value, not a section of the profile.")
    return layered(settings, {key: value})


def _validate(settings: dict[str, Any], path: Path, sources: Mapping[str, str], alone: dict[str, Any]) -> Profile:
    try:
        return Profile.model_validate(settings)
    except ConfigError as error:
        raise ProfileInvalidError(f"{path}, or what goes over it: {error}") from None
    except ValidationError as error:
        errors = _one_a_setting(error.errors())
        faults = tuple(_describe(fault, sources) for fault in errors)
        shown = "\n".join(f"  - {fault}" for fault in faults)
        sound = _is_sound(alone)
        over = [maker for fault in errors for maker in _makers(fault, sources, sound=sound)]
        in_file = not over or (not sound and not all(_origin(fault, sources) for fault in errors))
        places = [*dict.fromkeys(over), *([str(path)] if in_file else [])]
        refusal = ProfileInvalidError(
            f"{path} {'' if in_file else 'with what is set over it '}has {len(faults)} "
            f"fault{'s' if len(faults) > 1 else ''}:\n{shown}\n"
            f"Correct {', '.join(places)} and run again; profiles/README.md explains every key."
        )
        refusal.faults = faults
        raise refusal from None


def _is_sound(settings: dict[str, Any]) -> bool:
    try:
        Profile.model_validate(settings)
    except (ConfigError, ValidationError):
        return False
    return True


def _one_a_setting(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return the faults with those of a union told as one: pydantic has one for each type that the value might have."""
    sections = _sections()
    told: dict[tuple[int | str, ...], ErrorDetails] = {}
    for fault in errors:
        place = fault["loc"]
        is_of_union = len(place) == 3 and isinstance(place[2], str) and place[1] in sections.get(str(place[0]), ())
        place = place[:2] if is_of_union else place
        wanted = fault["msg"].removeprefix("Input should be ").partition(", unable")[0]
        if is_of_union and place in told:
            told[place] |= {"msg": f"{told[place]['msg']} or {wanted}"}
        else:
            told[place] = fault | {"loc": place, "msg": f"Input should be {wanted}" if is_of_union else fault["msg"]}
    return list(told.values())


def _describe(fault: ErrorDetails, sources: Mapping[str, str]) -> str:
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"no such setting{_suggest(fault['loc'])}"
    elif fault["type"] == "tuple_type":
        message = f'needs a list, such as {fault["loc"][-1]} = ["…"] (got {fault["input"]!r})'
    elif fault["type"] not in ("value_error",):
        message = f"{message} (got {fault['input']!r})"
    origin = _origin(fault, sources)
    shown = f" [{origin}]" if origin else ""
    return f"{field}: {message}{shown}" if field else message


def _origin(fault: ErrorDetails, sources: Mapping[str, str]) -> str | None:
    """Return the override that set the faulty value; None where it stands in the file, or several values contradict."""
    field = ".".join(str(part) for part in fault["loc"])
    unknown = fault["type"] == "extra_forbidden"  # of an unknown section it is the section that is faulty
    setters = [
        source
        for key, source in sources.items()
        if f"{field}.".startswith(f"{key}.") or (unknown and key.startswith(f"{field}."))
    ]
    return setters[-1] if setters else None


def _makers(fault: ErrorDetails, sources: Mapping[str, str], *, sound: bool) -> list[str]:
    """Return the overrides that may have made a fault. Over a sound file, they made each contradiction."""
    if origin := _origin(fault, sources):
        return [origin]
    section = ".".join(str(part) for part in fault["loc"])
    within = [source for key, source in sources.items() if key.startswith(f"{section}.")]
    return (within or list(sources.values())) if sound else []


def _suggest(location: tuple[int | str, ...]) -> str:
    section: Any = Profile
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
        section = next((t for t in (section, *get_args(section)) if _is_section(t)), None)
        if section is None:
            return ""
    key = str(location[-1])
    close = difflib.get_close_matches(key, section.model_fields, n=1)
    elsewhere = [f"{name}.{key}" for name, fields in _sections().items() if key in fields]
    guess = next(iter([*elsewhere, *close]), None)
    return f"; did you mean {guess!r}?" if guess else ""


def _sections() -> dict[str, Collection[str]]:
    """Return the keys of every section."""
    kinds: dict[str, Any] = {name: field.annotation for name, field in Profile.model_fields.items()}
    return {name: set(kind.model_fields) for name, kind in kinds.items() if _is_section(kind)}


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
