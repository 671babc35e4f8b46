"""The base of every section of a profile."""

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from relora_train.storage.redaction import ADDRESS_WITH_SECRETS, refuse_secrets


class FrozenConfig(BaseModel):
    """Base of every section: immutable, numbers are finite, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def section_in(annotation: Any) -> type[FrozenConfig] | None:
    """Return the section that an annotation such as `LoggingConfig | None` names, or None; a list of them is none."""
    if get_origin(annotation) is tuple:
        return None
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, FrozenConfig)), None)


class WithoutSecrets:
    """Marks a string without credentials. ConfigError refuses them, and a JSON Schema that does not repeat them.

    Prefect's server checks parameters against the schema before it records them. Only the keyword `const` is
    answered without the value, and only if no other keyword fails beside it: hence the pattern under `else`.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: refuse_secrets(value) if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        allowed = handler(schema)
        secret = {"type": "string", "pattern": ADDRESS_WITH_SECRETS}
        refusal = {"type": "string", "const": "an address without user name, password or key; they are never recorded"}
        otherwise = {"else": {"pattern": allowed.pop("pattern")}} if "pattern" in allowed else {}
        return {**allowed, "if": secret, "then": refusal, **otherwise}


Address = Annotated[str, WithoutSecrets()]
"""A path, URI or hub id, without credentials."""
