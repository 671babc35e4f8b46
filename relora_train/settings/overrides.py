"""Settings over a profile as a type: every section and field of Profile, all of them optional.

Made from Profile itself, so names, bounds, choices and descriptions can never drift. A field that is not given stays
the profile's: a model of this kind knows which fields were given, and nothing else is ever written down or passed on.
Rules across fields are not here: they hold for the profile and its overrides together, see load_profile.
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model, model_serializer, model_validator

from relora_train.settings.base import FrozenConfig, section_in
from relora_train.settings.keys import layered
from relora_train.settings.profile import Profile

_ABSENT: Any = type(None)
"""Makes the value of a field that was not given; a plain default would be offered in every form."""


class Overrides(BaseModel):
    """The base of overrides of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def dotted_keys_are_nested(cls, given: Any) -> Any:
        """{"relora.rank": 16} is {"relora": {"rank": 16}}, as on the command line."""
        return layered(given) if isinstance(given, Mapping) else given

    @model_serializer(mode="plain")
    def only_what_was_given(self) -> dict[str, Any]:
        """Write only given fields: a default that is written down would override the profile when it is read again."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def _overrides_of(config: type[FrozenConfig], name: str) -> type[Overrides]:
    """Return the type of overrides of a section: the same bounds and descriptions, and no value for what is absent."""
    fields: dict[str, Any] = {}
    for key, field in config.model_fields.items():
        kind: Any = field.annotation
        description = field.description
        if section := section_in(kind):
            kind = _overrides_of(section, section.__name__.removesuffix("Config") + "Overrides")
            description = description or section.__doc__
        elif get_origin(kind) is tuple and (item := section_in(get_args(kind)[0])):  # the profile says what each needs
            kind = tuple[_overrides_of(item, item.__name__.removesuffix("Config") + "Overrides"), ...]  # type: ignore[misc]
        elif field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        fields[key] = kind, Field(default_factory=_ABSENT, description=description)
    return create_model(name, __base__=Overrides, __module__=__name__, __doc__=config.__doc__, **fields)


class ProfileOverrides(_overrides_of(Profile, "ProfileOverrides")):  # type: ignore[misc]
    """Settings over a profile, by section; what is absent stays the profile's."""


class ExperimentOverrides(ProfileOverrides):
    """Settings over an experiment: those of its base profile, or of the section of one that trains no runs."""

    tutorial: dict[str, Any] = Field(default_factory=_ABSENT, description="Of the regression.")
    throughput: dict[str, Any] = Field(default_factory=_ABSENT, description="Of the steps that are measured.")
