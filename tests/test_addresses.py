"""Credentials in an address are refused where it is given, and never repeated."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from relora_train.checkpoints.names import resolve_checkpoint
from relora_train.cli.local_flow import load_installed
from relora_train.cli.local_server import check_server
from relora_train.errors import ConfigError
from relora_train.experiments.experiment import load_experiment
from relora_train.settings.load import load_profile
from relora_train.storage.opening import open_store
from relora_train.storage.redaction import refuse_secrets


def test_an_address_with_a_password_is_shown_without_it():
    for address in ("http://user:hunter2@127.0.0.1:9/api", "http://user:hunter2@no host/api", "user:hunter2@host"):
        with pytest.raises(ConfigError, match="PREFECT_API_URL") as caught:
            check_server(address)
        assert "hunter2" not in str(caught.value)
    for address in WITH_CREDENTIALS:
        for refuses in (open_store, load_profile, load_experiment, partial(resolve_checkpoint, default_store=None)):
            with pytest.raises(ConfigError, match="is given with credentials") as refused:
                refuses(address.format("hunter2"))
            assert "hunter2" not in str(refused.value)


WITH_CREDENTIALS = [
    "s3://KEY:{}@bucket/prefix.toml", "s3://KEY:{}/or+more@bucket/prefix", "S3://{}@bucket", "KEY:{}@bucket/prefix",
    "https://user:{}@host/organisation/name", "https://host/file?X-Amz-Signature={}", "s3://b/x?a=1&AWSAccessKeyId={}",
    "KEY:?{}@bucket", "s3://KEY:?{}@bucket", "ftp://u:{}@h/",
]  # fmt: skip


WITHOUT_CREDENTIALS = [
    "s3://bucket/a@b/c=1/part-?.jsonl", "s3://bucket/??-[a-c]/*", "/home/me@work/a:b", "./a:b@c", "run@cycle-2",
    "series:news@3", "file:///a@b:c", "file:/a@b", "memory://x", "~/a?b=c.txt", "organisation/name", "C:/a",
]  # fmt: skip


PLAIN_TEXT = {
    "run_id", "series", "tasks.0", "gate", "stop_after", "gpu_limit", "deployment", "overrides.name",
    "overrides.model.revision", "overrides.tracking.project",
    "overrides.tokenizer.eos_token", "overrides.tokenizer.revision", "overrides.tokenizer.mask_token",
    "overrides.data.name", "overrides.data.hub_config", "overrides.data.hub_split",
    *(f"overrides.data.{place}{key}" for place in ("", "sources.0.") for key in ("packages.0", "content_sha256")),
    "overrides.data.hub_revision", "overrides.data.text_field", "overrides.relora.target_modules.0",
    "overrides.evaluation.sample_prompts.0", "overrides.data.sources.0.name", "overrides.data.sources.0.hub_config",
    "overrides.data.sources.0.hub_split", "overrides.data.sources.0.hub_revision",
    "overrides.data.sources.0.text_field", "overrides.data.labels.field", "overrides.data.labels.text_pair_field",
    *(
        f"overrides.data.{place}{key}"
        for place in ("instructions.", "sources.0.instructions.")
        for key in ("messages", "prompt", "completion")
    ),
    "overrides.data.sources.0.labels.field", "overrides.data.sources.0.labels.text_pair_field",
}  # fmt: skip
"""Strings that name no place."""


def strings_of(schema: dict[str, Any], defined: dict[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """Where a JSON Schema has a string of any content."""
    if "$ref" in schema:
        schema = defined[schema["$ref"].rpartition("/")[2]]
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from strings_of(part, defined)
    for name, part in schema.get("properties", {}).items():
        yield from ((name, *place) for place in strings_of(part, defined))
    if isinstance(schema.get("items"), dict):
        yield from ((0, *place) for place in strings_of(schema["items"], defined))
    if schema.get("type") == "string" and "enum" not in schema and "const" not in schema:
        yield ()


@pytest.mark.parametrize("name", ["pretrain", "retrain", "compare", "evaluate", "prune"])
def test_every_parameter_that_names_a_place_is_refused_with_credentials_and_not_repeated(name: str):
    """By the JSON Schema, with which Prefect's server checks parameters before it records them, and by its own type."""
    from prefect.utilities.schema_tools.validation import ValidationError, validate

    flow = load_installed(name)
    schema = flow.parameters.model_dump_for_openapi()
    places = sorted(set(strings_of(schema, schema["definitions"])), key=str)
    assert ("store",) in places and (("overrides", "data", "paths", 0) in places) == (
        "overrides" in schema["properties"]
    )
    needed = dict.fromkeys(schema.get("required", ()), "x") | ({"experiment": "tutorial"} if name == "compare" else {})
    named = [place for place in places if ".".join(map(str, place)) not in PLAIN_TEXT]
    for place, address in zip(named, itertools.cycle(WITH_CREDENTIALS)):
        value: Any = address.format("hunter2")
        for part in reversed(place):
            value = [value] if part == 0 else {part: value}
        with pytest.raises(ValidationError, match="never recorded") as refused:
            validate(value, schema, raise_on_error=True, ignore_required=True)
        with pytest.raises(ConfigError, match="is given with credentials") as told:
            flow.validate_parameters({**needed, **value})
        assert "hunter2" not in f"{refused.value} {told.value}", place


def test_addresses_without_credentials_are_taken():
    for address in WITHOUT_CREDENTIALS:
        assert refuse_secrets(address) == address


@pytest.mark.parametrize("command", [
    ["run", "smoke", "--store", "{}"], ["run", "smoke", "--resume-from", "{}"], ["run", "{}"],
    ["run", "smoke", "--set", "data.source=text", "--set", "data.paths=['{}']"],
    ["run", "smoke", "--set", "tokenizer.path={}"], ["run", "smoke", "--set", "model.pretrained={}"],
    ["retrain", "news", "smoke", "--store", "{}"], ["retrain", "news", "{}"],
    ["compare", "table1-tiny", "--store", "{}"], ["compare", "{}"], ["evaluate", "{}"],
    ["evaluate", "run", "--store", "{}"], ["export", "{}", "out"],
    ["prune", "run", "--store", "{}"], ["verify", "{}"], ["retry", "{}"], ["promote", "news", "{}"],
])  # fmt: skip
def test_commands_refuse_credentials_in_an_address_before_prefect_starts(
    command: list[str], relora, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("relora_train.cli.run.run_flow", None)
    monkeypatch.chdir(tmp_path)
    for address in WITH_CREDENTIALS[:5]:
        said = relora(*(part.format(address.format("hunter2")) for part in command))
        assert said.code == 2 and "is given with credentials" in " ".join(said.err.split()), said.err
        assert "hunter2" not in said.err + said.out


@pytest.mark.parametrize("command", [
    ["run", "smoke", "--set", "s3://KEY:{}@b/x"], ["run", "smoke", "--set", "data.source=s3://KEY:{}@b/x"],
    ["run", "smoke", "--set", "data.source=text", "--set", "data.paths=s3://KEY:{}@b/x"],
    ["run", "smoke", "--run-id", "s3://KEY:{}@b/x"], ["series", "s3://KEY:a/{}@b/x"],
    ["run", "smoke", "--set", "https://b/x?X-Amz-Signature={}&a=b"],
])  # fmt: skip
def test_an_address_in_a_wrong_place_is_shown_without_its_credentials(
    command: list[str], relora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said = relora(*(part.format("hunter2") for part in command))
    assert said.code == 2 and "://b/x" in said.err
    assert "hunter2" not in said.err + said.out
