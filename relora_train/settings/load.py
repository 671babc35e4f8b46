"""Find profiles and turn TOML and overrides into a Profile."""

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relora_train.errors import ConfigError, ProfileInvalidError, ProfileNotFoundError
from relora_train.settings.base import section_in
from relora_train.settings.keys import layered
from relora_train.settings.profile import Profile
from relora_train.storage.redaction import refuse_secrets
from relora_train.text import did_you_mean

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
        table: Any = settings
        for section in key.split(".")[:-1]:
            table = table.get(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {key}: {section!r} is a value, not a section of the profile.")
        settings = layered(settings, {key: value})
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
    hint = did_you_mean(str(name_or_path), shipped)
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


def _validate(settings: dict[str, Any], path: Path, sources: Mapping[str, str], alone: dict[str, Any]) -> Profile:
    """Return the profile of settings, or raise ProfileInvalidError with every fault and the places to correct."""
    try:
        return Profile.model_validate(settings)
    except ConfigError as error:
        raise ProfileInvalidError(f"{path}, or what goes over it: {error}") from None
    except ValidationError as error:
        errors = _one_a_setting(error.errors())
    try:
        Profile.model_validate(alone)
        sound = True
    except (ConfigError, ValidationError):
        sound = False
    faults, over, in_file = [], list[str](), False
    for fault in errors:
        field = ".".join(str(part) for part in fault["loc"])
        unknown = fault["type"] == "extra_forbidden"  # of an unknown section it is the section that is faulty
        origin = None
        for key, source in sources.items():
            if f"{field}.".startswith(f"{key}.") or (unknown and key.startswith(f"{field}.")):
                origin = source
        shown = f"{_describe(fault)} [{origin}]" if origin else _describe(fault)
        faults.append(f"{field}: {shown}" if field else shown)
        if origin:
            over.append(origin)
        elif sound:  # overrides made the contradiction: those of the section, or else any
            within = [source for key, source in sources.items() if key.startswith(f"{field}.")]
            over += within or sources.values()
        else:
            in_file = True
    in_file = in_file or not over
    places = [*dict.fromkeys(over), *([str(path)] if in_file else [])]
    shown = "\n".join(f"  - {fault}" for fault in faults)
    refusal = ProfileInvalidError(
        f"{path} {'' if in_file else 'with what is set over it '}has {len(faults)} "
        f"fault{'s' if len(faults) > 1 else ''}:\n{shown}\n"
        f"Correct {', '.join(places)} and run again; profiles/README.md explains every key."
    )
    refusal.faults = tuple(faults)
    raise refusal


def _one_a_setting(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return the faults with those of a union told as one: pydantic has one for each type that the value might have."""
    told: dict[tuple[int | str, ...], ErrorDetails] = {}
    for fault in errors:
        place = fault["loc"]
        is_of_union = len(place) == 3 and isinstance(place[2], str) and place[1] in _keys_of(str(place[0]))
        place = place[:2] if is_of_union else place
        wanted = fault["msg"].removeprefix("Input should be ").partition(", unable")[0]
        if is_of_union and place in told:
            told[place] |= {"msg": f"{told[place]['msg']} or {wanted}"}
        else:
            told[place] = fault | {"loc": place, "msg": f"Input should be {wanted}" if is_of_union else fault["msg"]}
    return list(told.values())


def _describe(fault: ErrorDetails) -> str:
    """Say what is wrong with a setting; of an unknown one, which setting may be meant."""
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "tuple_type":
        return f'needs a list, such as {fault["loc"][-1]} = ["…"] (got {fault["input"]!r})'
    if fault["type"] != "extra_forbidden":
        return f"{fault['msg']} (got {fault['input']!r})"
    *section, key = map(str, fault["loc"])
    elsewhere = [f"{name}.{key}" for name in Profile.model_fields if key in _keys_of(name)]
    siblings = _keys_of(section[0]) if section else Profile.model_fields
    guess = next(iter([*elsewhere, *difflib.get_close_matches(key, siblings, n=1)]), None)
    return f"no such setting; did you mean {guess!r}?" if guess else "no such setting"


def _keys_of(section: str) -> Collection[str]:
    """Return the keys of a section, or none for the name of anything else."""
    field = Profile.model_fields.get(section)
    kind = section_in(field.annotation) if field else None
    return kind.model_fields if kind else ()
