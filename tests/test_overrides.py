"""The type of overrides says what Profile says: the same names, bounds, choices and words, and nothing of its own."""

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from flows import parameters
from relora_train.errors import ConfigError, ProfileInvalidError
from relora_train.settings.keys import layered
from relora_train.settings.load import list_profiles, load_profile, parse_override
from relora_train.settings.overrides import ProfileOverrides
from relora_train.settings.profile import Profile

OURS = ProfileOverrides.model_json_schema()
THEIRS = Profile.model_json_schema()


def fields(
    schema: dict[str, Any], suffix: str, properties: dict[str, Any] | None = None, prefix: str = ""
) -> dict[str, dict[str, Any]]:
    """Every field by dotted key, as its schema says; sections as their description alone."""
    found: dict[str, dict[str, Any]] = {}
    for name, field in (properties or schema["properties"]).items():
        if "$ref" in field.get("items", {}):  # a list of sections
            field = {"$ref": field["items"]["$ref"], "description": field["description"]}
        if any("$ref" in choice for choice in field.get("anyOf", ())):  # a section that may be absent
            field = {"$ref": field["anyOf"][0]["$ref"], "description": field["description"]}
        if "$ref" not in field:
            found[f"{prefix}{name}"] = {key: value for key, value in field.items() if key != "default"}
            continue
        section = schema["$defs"][field["$ref"].rpartition("/")[2]]
        assert section["title"].endswith(suffix) and section["additionalProperties"] is False
        found[f"{prefix}{name}"] = {"description": field.get("description", section["description"])}
        found |= fields(schema, suffix, section["properties"], f"{prefix}{name}.")
    return found


def test_every_field_has_the_name_bounds_choices_and_description_it_has_in_a_profile():
    assert fields(OURS, "Overrides") == fields(THEIRS, "Config")
    assert all(field["description"] for field in fields(OURS, "Overrides").values())


def test_nothing_is_required_and_no_default_is_offered():
    """A default in a form would be sent, and so override the profile."""
    assert '"default"' not in json.dumps(OURS) and '"required"' not in json.dumps(OURS)
    assert ProfileOverrides().model_dump() == {} and ProfileOverrides().model_dump_json() == "{}"


WRONG = [
    ({"relora": {"rank": 0}}, "greater than or equal to 1"),
    ({"relora": {"rnak": 8}}, "Extra inputs"),
    ({"shedule": {"cycles": 8}}, "Extra inputs"),
    ({"relora": {"dropout": 1.0}}, "less than 1"),
    ({"optimizer_reset": {"mode": "most"}}, "'none', 'zero', 'magnitude' or 'random'"),
    ({"data": {"name": "../x"}}, "match pattern"),
    ({"schedule": {"cycles": "many"}}, "valid integer"),
    ({"relora": 8}, "valid dictionary"),
    ({"seed": None}, "valid integer"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_a_wrong_value_is_refused_by_the_type_and_by_its_json_schema(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=re.escape(words)):
        ProfileOverrides.model_validate(settings)
    assert list(Draft202012Validator(OURS).iter_errors(settings))


SETS = [
    ["relora.rank=4"],
    ["relora.rank=4", "relora.alpha=8", "relora.rank=2"],
    ["relora={rank = 4}", "relora.dropout=0.0"],
    ["method=full", "seed=3"],
    ["optimizer.betas=[0.8, 0.9]", "optimizer.learning_rate=1e-4"],
    ["launch.device=cpu", "evaluation.sample_prompts=['def ']"],
    ["data.source=text", "data.paths=['a.txt']", "data.name=mine"],
    [],
]


@pytest.mark.parametrize("sets", SETS)
def test_overrides_come_to_the_same_profile_as_set_options(sets: list[str]):
    dotted: dict[str, Any] = {}
    for text in sets:
        key, value = parse_override(text)
        dotted = layered({**dotted, key: value})
    overrides = ProfileOverrides.model_validate(dotted)
    expected = load_profile("smoke", sets)
    assert load_profile("smoke", overrides.model_dump()) == expected
    assert not list(Draft202012Validator(OURS).iter_errors(json.loads(overrides.model_dump_json())))
    again = ProfileOverrides.model_validate_json(overrides.model_dump_json())  # as Prefect stores and reads parameters
    assert again == overrides and load_profile("smoke", again.model_dump()) == expected


def test_dotted_keys_are_the_same_as_sections():
    assert ProfileOverrides.model_validate({"relora.rank": 4, "relora": {"alpha": 8}, "seed": 1}).model_dump() == {
        "relora": {"rank": 4, "alpha": 8},
        "seed": 1,
    }


def test_unsetting_is_not_the_same_as_not_setting():
    unset = ProfileOverrides.model_validate({"optimizer.max_grad_norm": None})
    assert load_profile("smoke").optimizer.max_grad_norm == 1.0
    assert load_profile("smoke", unset.model_dump()).optimizer.max_grad_norm is None


def test_a_section_given_over_a_profile_leaves_its_other_keys_alone():
    assert load_profile("smoke", {"relora": {"rank": 4}}).relora.alpha == load_profile("smoke").relora.alpha == 8


def test_rules_across_fields_are_left_to_the_whole_profile():
    overrides = ProfileOverrides.model_validate({"relora": {"rank": 65}})
    with pytest.raises(ProfileInvalidError, match=r"relora\.rank 65 exceeds 64"):
        load_profile("smoke", overrides.model_dump())


ACCEPTED = {
    "ProfileName": [
        *(path.stem for path in list_profiles()),
        "mine.toml",
        "/somewhere/my profile.toml",
        "./smoke.toml",
    ],
    "RunId": ["a", "quickstart-9c178846", "A.b_c-1", "x" * 100],
    "CheckpointName": ["run", "run@latest", "run@cycle-2", "s3://b/runs/r/checkpoints/step-1", "/a b/c", "."],
    "StoreUri": ["s3://bucket", "s3://bucket/a/b", "file:///x", "relora-store", "/a:b/c", "./a:b", "~/x"],
}
REFUSED = {
    "ProfileName": ["quikstart", "smoke.tom", "", "smoke\n", "mine.toml.bak"],
    "RunId": ["", "../escape", "a/b", ".a", "a b", "x" * 101, "a\n"],
    "CheckpointName": ["", "not a name", "run@", "run@cycle 2", "@latest"],
    "StoreUri": ["", "s3://", "ftp://x", "http://x/y", "S4://x"],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_parameters_are_checked_by_their_pattern(name: str):
    kind = TypeAdapter(getattr(parameters, name))
    for value in ACCEPTED[name]:
        assert kind.validate_python(value) == value
    for value in REFUSED[name]:
        with pytest.raises(ValidationError):
            kind.validate_python(value)
    with pytest.raises(ValidationError):
        kind.validate_python(123)


def test_a_key_below_a_value_is_refused():
    with pytest.raises(ValidationError):
        ProfileOverrides.model_validate({"seed.x": 1})
    with pytest.raises(ConfigError):
        load_profile("smoke", {"relora.rank.x": 1})


def test_several_sources_are_set_as_a_list_whose_items_say_only_what_was_given():
    sources = [{"name": "a"}, {"name": "b", "weight": 2.0, "source": "text", "paths": ["x"]}]
    given = ProfileOverrides.model_validate({"data.sources": sources})
    assert json.loads(given.model_dump_json()) == {"data": {"sources": sources}}
    from_python = load_profile("quickstart", given.model_dump()).data.sources
    assert from_python == load_profile("quickstart", [f"data.sources={toml_of(sources)}"]).data.sources
    with pytest.raises(ProfileInvalidError, match=r"data\.sources\.0\.name: Field required"):
        load_profile("quickstart", {"data.sources": [{"weight": 2}]})


def toml_of(sources: list[dict[str, Any]]) -> str:
    """JSON's objects as TOML's inline tables."""
    tables = (", ".join(f"{key}={json.dumps(value)}" for key, value in one.items()) for one in sources)
    return f"[{', '.join(f'{{{table}}}' for table in tables)}]"
