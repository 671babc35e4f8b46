import json
import subprocess
import sys
import tomllib
from pathlib import Path

import annotated_types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from relora_train.settings.keys import settings_digest
from relora_train.settings.profile import Profile, default_run_id, profile_to_read

SECTIONS = {
    name: field.annotation
    for name, field in Profile.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}

LEAVES = [(name, key) for name, section in SECTIONS.items() for key in section.model_fields]


def faults(settings: dict) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Profile.model_validate(settings)
    return [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in caught.value.errors()]


def bounds(section: str, key: str) -> list[tuple[type, float]]:
    metadata = SECTIONS[section].model_fields[key].metadata
    kinds = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
    return [
        (kind, getattr(entry, kind.__name__.lower())) for entry in metadata for kind in kinds if type(entry) is kind
    ]


def test_defaults_are_a_valid_profile():
    assert Profile().method == "relora"


@pytest.mark.parametrize(("section", "key"), LEAVES)
def test_a_setting_cannot_be_assigned(section, key):
    values = getattr(Profile(), section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(values, key, getattr(values, key))


@pytest.mark.parametrize(("section", "key"), LEAVES)
def test_every_setting_is_explained_where_it_is_declared(section, key):
    assert SECTIONS[section].model_fields[key].description


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_refuses_a_key_it_does_not_know(section):
    assert any(fault.startswith(f"{section}.surprise:") for fault in faults({section: {"surprise": 1}}))


@pytest.mark.parametrize(("section", "key"), [leaf for leaf in LEAVES if bounds(*leaf)])
def test_values_outside_the_bounds_are_refused(section, key):
    """At a strict bound the bound itself, at an inclusive one the next number beyond it."""
    for kind, limit in bounds(section, key):
        beyond = {annotated_types.Ge: limit - 1, annotated_types.Le: limit + 1}.get(kind, limit)
        assert any(fault.startswith(f"{section}.{key}:") for fault in faults({section: {key: beyond}}))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("section", "key"), [leaf for leaf in LEAVES if SECTIONS[leaf[0]].model_fields[leaf[1]].annotation is float]
)
def test_numbers_must_be_finite(section, key, value):
    """TOML has inf and nan; canonical JSON, and so a fingerprint, has not."""
    assert any(fault.startswith(f"{section}.{key}:") for fault in faults({section: {key: value}}))


RULES = [
    ({"model": {"hidden_size": 100, "num_attention_heads": 8}}, "hidden_size 100 is not a multiple of 8 heads"),
    ({"model": {"hidden_size": 24, "num_attention_heads": 8}}, "makes heads of 3"),
    ({"model": {"num_key_value_heads": 3}}, "4 attention heads are not a multiple of 3"),
    ({"data": {"source": "jsonl"}}, "source 'jsonl' needs paths"),
    ({"data": {"source": "hub"}}, "source 'hub' needs hub_id"),
    ({"data": {"paths": ["a.txt"]}}, "source 'python-stdlib' does not read paths"),
    ({"batch": {"sequences": 10, "micro_sequences": 4}}, "sequences 10 is not a multiple of micro_sequences 4"),
    ({"schedule": {"cycle_length": 10, "restart_warmup_steps": 10}}, "restart_warmup_steps 10 must be below"),
    ({"schedule": {"cycle_length": 20, "warmup_steps": 21}}, "warmup_steps 21 must not exceed cycle_length 20"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, "must lie in [0, 1)"),
    ({"batch": {"sequence_length": 2048}}, "longer than model.max_position_embeddings 1024"),
    ({"relora": {"rank": 257}}, "relora.rank 257 exceeds 256"),
    ({"model": {"num_key_value_heads": 1}, "relora": {"rank": 65}}, "relora.rank 65 exceeds 64"),
    ({"model": {"vocab_size": 300}}, "model.vocab_size 300 is below tokenizer.vocab_size 4096"),
    ({"launch": {"nproc_per_node": 33}}, "batch.sequences 32 leaves some of 33 ranks without a sequence"),
    ({"launch": {"nnodes": 2}}, "nnodes 2 needs rdzv_endpoint"),
    ({"launch": {"nnodes": 2, "rdzv_endpoint": "http://x"}}, "launch.rdzv_endpoint"),
    (
        {"launch": {"nnodes": 5, "nproc_per_node": 8, "rdzv_endpoint": "x:1"}},
        "leaves some of 40 ranks without a sequence",
    ),
    ({"launch": {"nproc_per_node": "gpu", "device": "cpu"}}, "nproc_per_node 'gpu' needs device 'cuda' or 'auto'"),
]


@pytest.mark.parametrize(("settings", "message"), RULES)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    assert any(message in fault for fault in faults(settings))


def test_rules_about_the_shape_do_not_bind_a_pretrained_model():
    shape = {"pretrained": "somewhere", "hidden_size": 100, "num_attention_heads": 8, "num_key_value_heads": 3}
    profile = Profile.model_validate({"model": shape, "relora": {"rank": 512}, "batch": {"sequence_length": 4096}})
    assert profile.model.pretrained == "somewhere"


def test_full_rank_needs_no_low_rank():
    assert Profile.model_validate({"method": "full", "relora": {"rank": 512}}).relora.rank == 512


def test_the_warm_start_runs_at_half_the_learning_rate_unless_told():
    assert Profile.model_validate({"optimizer": {"learning_rate": 0.004}}).warm_start_learning_rate == 0.002
    told = {"optimizer": {"learning_rate": 0.004, "warm_start_learning_rate": 0.001}}
    assert Profile.model_validate(told).warm_start_learning_rate == 0.001


@given(st.permutations(sorted(Profile().model_dump(mode="json"))))
def test_a_digest_does_not_depend_on_the_order_of_the_settings(order):
    settings = Profile().model_dump(mode="json")
    assert settings_digest({key: settings[key] for key in order}) == settings_digest(settings)


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = Profile.model_validate(
        {"name": "x", "relora": {"target_modules": ["q_proj"]}, "model": {"vocab_size": 5000}}
    )
    (tmp_path / "profile.json").write_text(profile.model_dump_json())
    assert profile_to_read((tmp_path / "profile.json").read_bytes()) == profile


def test_a_run_id_is_a_plain_word_whatever_the_profile_is_called():
    """It becomes part of paths and URIs."""
    run_id = default_run_id(Profile(name="../My profile"))
    assert run_id.rpartition("-")[0] == "my-profile"
    assert default_run_id(Profile(name="../")).startswith("run-")


def test_the_same_settings_written_differently_meet_the_same_run():
    written = Profile.model_validate(json.loads('{"schedule": {"cycles": 4}, "optimizer": {"learning_rate": 0.001}}'))
    assert default_run_id(written) == default_run_id(Profile())


PROJECT = Path(__file__).parents[1]


def test_light_modules_import_nothing_heavy_when_they_are_imported_and_when_a_store_is_opened():
    """The import contract cannot tell an import inside a function, which it lists, from one at the top."""
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (light,) = (found["source_modules"] for found in contracts if found["name"].startswith("light"))
    code = (
        "import importlib, pkgutil, sys\n"
        f"for module in map(importlib.import_module, {light}):\n"
        "    for inner in pkgutil.walk_packages(getattr(module, '__path__', ()), module.__name__ + '.'):\n"
        "        importlib.import_module(inner.name)\n"
        "from relora_train.storage.opening import open_store\n"
        "[open_store(uri) for uri in ('x', 'file:///x', 'memory://x', 's3://bucket/x')]\n"
        "heavy = {'torch', 'boto3', 'botocore', 'prefect', 'transformers', 'datasets', 'numpy', 'matplotlib'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"launch": {"sharding": "full"}, "precision": {"dtype": "pure-bfloat16"}},
            "'pure-bfloat16' does not go with launch.sharding 'full'",
        ),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused(settings: dict, reason: str):
    with pytest.raises(ValidationError, match=reason):
        Profile.model_validate(settings)
