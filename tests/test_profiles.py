import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from relora_train.errors import ConfigError, ProfileInvalidError, ProfileNotFoundError
from relora_train.method.stages import fingerprint_settings, plan_stages, stage_fingerprint
from relora_train.runs.plan import plan
from relora_train.settings.load import list_profiles, load_profile, profile_directory
from relora_train.settings.profile import Profile, default_run_id

SHIPPED = [path.stem for path in list_profiles()]
PAPER_SIZES = ["llama_60m", "llama_130m", "llama_250m", "llama_350m", "llama_1b"]
C4_TOKENS_A_DOCUMENT = 400
"""A low estimate: 2,270 bytes a document on average, and a little over four bytes a token."""


def write(directory: Path, text: str, name: str = "mine.toml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_profile(source, overrides)
    return str(caught.value)


def test_a_file_of_ones_own_is_a_profile(tmp_path):
    path = write(tmp_path, "seed = 3\n[relora]\nrank = 8\n")
    profile = load_profile(path)
    assert (profile.name, profile.seed, profile.relora.rank) == ("mine", 3, 8)
    assert load_profile(str(path)) == profile


def test_a_misspelt_profile_is_answered_with_the_name_that_was_meant_and_the_list():
    for name, guess in (("quikstart", " Did you mean 'quickstart'?"), ("zzz", "")):
        with pytest.raises(ProfileNotFoundError, match=f"nor as a file\\.{guess.replace('?', '.')} Shipped") as caught:
            load_profile(name)
        assert all(name in str(caught.value) for name in SHIPPED)


def test_a_shipped_name_is_not_hidden_by_a_file_in_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, "seed = 7", name="smoke")
    write(tmp_path, "seed = 7", name="smoke.toml")
    monkeypatch.chdir(tmp_path)
    assert load_profile("smoke").seed == 0
    assert load_profile("./smoke.toml").seed == 7


def test_a_file_that_a_flow_would_not_take_is_refused_by_its_name(tmp_path):
    with pytest.raises(ProfileNotFoundError, match=r"does not end in \.toml, as a profile's file must"):
        load_profile(write(tmp_path, "seed = 7", name="mine.conf"))


def test_broken_toml_names_file_and_line_and_a_file_that_is_not_text_is_refused(tmp_path):
    path = write(tmp_path, "[relora\nrank = 8\n")
    assert re.search(rf"{re.escape(str(path))} is not valid TOML: .*line 1", refusal(path))
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid TOML" in refusal(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[relora]\nrnak = 8", "relora.rnak: no such setting; did you mean 'rank'?"),
        ("[optimizer]\nrank = 8", "optimizer.rank: no such setting; did you mean 'relora.rank'?"),
        ("rank = 8", "rank: no such setting; did you mean 'relora.rank'?"),
        ("[shedule]\ncycles = 8", "shedule: no such setting; did you mean 'schedule'?"),
        ("zzzzz = 8", "zzzzz: no such setting\n"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(tmp_path, text, answer):
    assert answer in refusal(write(tmp_path, text))


def test_all_faults_are_shown_at_once_with_file_and_field(tmp_path):
    path = write(tmp_path, "seed = -1\n[relora]\nrank = 0\nalpah = 1\n[batch]\nsequences = 'many'\n")
    message = refusal(path, "schedule.cycles=0")
    assert message.startswith(f"{path} has 5 faults:")
    assert "seed: Input should be greater than or equal to 0 (got -1)" in message
    assert "relora.rank: Input should be greater than or equal to 1 (got 0)" in message
    assert "relora.alpah: no such setting; did you mean 'alpha'?" in message
    assert "batch.sequences: Input should be a valid integer" in message
    assert "schedule.cycles: Input should be greater than or equal to 1 (got 0) [--set schedule.cycles]" in message
    assert "profiles/README.md" in message


@pytest.mark.parametrize("override", ["relora.rank=0", "relora={rank = 0}"])
def test_a_fault_made_by_an_override_says_so(override):
    key, message = override.partition("=")[0], refusal("smoke", override)
    assert f"(got 0) [--set {key}]" in message
    assert "smoke.toml with what is set over it has 1 fault" in message and f"Correct --set {key} and run" in message


def test_a_fault_is_to_be_corrected_where_it_was_made(tmp_path):
    path = write(tmp_path, "[relora]\nrank = 0\n")
    assert f"Correct {path} and run" in refusal(path)
    assert f"Correct --set batch.sequences, {path} and run" in refusal(path, "batch.sequences=0")
    assert "Correct --set batch.sequences and run" in refusal(
        write(tmp_path, "[relora]\nrank = 4\n"), "batch.sequences=0"
    )


def test_a_contradiction_is_to_be_corrected_in_what_was_set_in_its_section():
    message = refusal("smoke", "relora.rank=4", "data.source=text", "data.paths=[]", "seed=3")
    assert "source 'text' needs paths" in message
    assert "Correct --set data.source, --set data.paths and run again" in message


def test_over_a_sound_file_of_ones_own_faults_are_of_what_was_set(tmp_path):
    path = write(tmp_path, "[model]\nhidden_size = 64\nnum_attention_heads = 4\n")
    for override in ("nosuch.key=1", "model.num_attention_heads=3", "objective=image_classification"):
        assert f"Correct --set {override.partition('=')[0]} and run again" in refusal(path, override)


def test_a_list_is_asked_for_by_the_name_that_toml_has_for_it():
    assert "data.paths: needs a list, such as paths = [\"…\"] (got 'a.txt')" in refusal("smoke", "data.paths=a.txt")


@pytest.mark.parametrize(
    ("override", "told"),
    [("data.bos=maybe", "'auto' or a valid boolean"), ("launch.nproc_per_node=x", "a valid integer or 'gpu'")],
)
def test_a_value_that_may_be_of_several_types_is_one_fault(override, told):
    with pytest.raises(ProfileInvalidError) as caught:
        load_profile("smoke", [override])
    key, _, value = override.partition("=")
    assert caught.value.faults == (f"{key}: Input should be {told} (got {value!r}) [--set {key}]",)


def test_a_contradiction_between_sections_is_a_fault_of_the_profile():
    message = refusal("smoke", "relora.rank=65")
    assert "has 1 fault:" in message and "Correct --set relora.rank and run" in message
    assert "relora.rank 65 exceeds 64" in message


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("relora.rank=16", lambda p: p.relora.rank == 16),
        (" relora.rank = 16 ", lambda p: p.relora.rank == 16),
        ("schedule.cycles=1_0", lambda p: p.schedule.cycles == 10),
        ("optimizer.learning_rate=1e-4", lambda p: p.optimizer.learning_rate == 1e-4),
        ("precision.deterministic=false", lambda p: p.precision.deterministic is False),
        ("method=full", lambda p: p.method == "full"),
        ('method="full"', lambda p: p.method == "full"),
        ("launch.device=cpu", lambda p: p.launch.device == "cpu"),
        ("tokenizer.path=a=b/c", lambda p: p.tokenizer.path == "a=b/c"),
        ("name=", lambda p: p.name == ""),
        ("optimizer.betas=[0.8, 0.9]", lambda p: p.optimizer.betas == (0.8, 0.9)),
        ('evaluation.sample_prompts=["def ", "class "]', lambda p: p.evaluation.sample_prompts == ("def ", "class ")),
        ("relora={rank = 4, dropout = 0.0}", lambda p: (p.relora.rank, p.relora.dropout) == (4, 0)),
    ],
)
def test_an_override_is_toml_or_bare_text(override, read):
    assert read(load_profile("smoke", [override]))


def test_overrides_go_over_the_profile_and_over_each_other():
    profile = load_profile("smoke", ["relora={rank = 4}", "relora.rank=2"])
    assert profile.relora.rank == 2
    assert profile.batch == load_profile("smoke").batch


def test_a_mapping_of_overrides_is_left_alone_and_may_hold_none():
    overrides = {"relora": {"rank": 4}, "relora.rank": 2, "optimizer.max_grad_norm": None}
    assert load_profile("smoke", overrides).optimizer.max_grad_norm is None
    assert overrides["relora"] == {"rank": 4}


def test_an_override_without_a_value_or_below_a_plain_one_is_refused(tmp_path):
    assert "has no '='; write it as section.key=value" in refusal("smoke", "relora.rank")
    assert "'seed' is a value, not a section" in refusal(write(tmp_path, "seed = 3"), "seed.x=1")


def test_the_profiles_that_were_promised_are_shipped():
    assert {"quickstart", "smoke", "text", "continue", "chat", *PAPER_SIZES} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_plans_without_network_or_files(name):
    planned = plan(load_profile(name))
    assert planned.profile == name
    assert (
        (planned.unknown is None) == (planned.disk_bytes is not None) == (name not in ("chat", "continue"))
    )  # any model's


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_begins_with_source_hardware_and_expected_loss(name):
    header = (profile_directory() / f"{name}.toml").read_text().partition("\n\n")[0]
    labels = [line[2:].partition(":")[0] for line in header.splitlines() if re.match(r"# \w+: ", line)]
    assert labels == ["Source", "Verified", "Expected"]


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_the_papers_profiles_hold_one_epoch_of_their_run_and_hold_out_what_they_score(name):
    profile = load_profile(name)
    documents = profile.data.max_documents * (1 - profile.data.validation_fraction)
    needed = profile.schedule.total_steps * profile.batch.tokens
    assert needed <= documents * C4_TOKENS_A_DOCUMENT < 1.2 * needed
    assert profile.data.max_documents < 364_868_892  # documents of C4 'en'
    held_out = profile.data.max_documents * profile.data.validation_fraction * C4_TOKENS_A_DOCUMENT
    assert held_out >= profile.evaluation.final_sequences * profile.batch.sequence_length


@pytest.mark.parametrize("name", PAPER_SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_papers_profiles_run_on_several_devices(name, ranks):
    assert load_profile(name, [f"launch.nproc_per_node={ranks}"]).launch.nproc_per_node == ranks


README = profile_directory() / "README.md"


def documented_defaults() -> dict[str, object]:
    """'section.key' -> default, as the README's tables have it."""
    section, found = "", {}
    for line in README.read_text().partition("## Every key")[2].splitlines():
        if heading := re.match(r"### `\[(\w+)\]`", line):
            section = f"{heading[1]}."
        elif row := re.match(r"\| `(\w+)` \| (?:`(.+?)`|–) \|.* \| (.+) \|$", line):
            found[section + row[1]] = None if row[2] is None else tomllib.loads(f"value = {row[2]}")["value"]
    return found


def real_defaults() -> dict[str, object]:
    found: dict[str, object] = {}
    for name, field in Profile.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation()
            values = dict(section) | section.model_dump()  # which lacks those of exclude_if
            found |= {f"{name}.{key}": list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        else:
            found[name] = field.default
    return found


def test_the_readme_explains_every_key_with_its_default():
    assert documented_defaults() == real_defaults()


def test_the_readme_lists_every_shipped_profile_and_no_other():
    table = README.read_text().partition("## Shipped")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == SHIPPED


def test_the_commands_of_the_readme_load():
    commands = re.findall(r"^relora plan (\w+)((?: --set (?:'[^']+'|\S+))+)$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 3
    for name, overrides in commands:
        load_profile(name, [text.strip("'") for text in re.findall(r"--set ('[^']+'|\S+)", overrides)])


LAUNCHES = re.findall(
    r"^### (.+?)\n[^#]*?```toml\n(.+?)```",
    README.read_text().partition("## Every key")[0],
    flags=re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("machine", "text"), LAUNCHES, ids=[machine for machine, _ in LAUNCHES])
def test_a_launch_section_of_the_readme_loads_and_takes_the_largest_micro_batch(machine: str, text: str):
    sections = tomllib.loads(text)
    for name in ("llama_1b", "llama_350m"):
        assert load_profile(name, sections).launch.device == "cuda"
    profile = load_profile("llama_1b", sections)
    small, large = plan(profile).fits
    fit = small if "24 GB" in machine else large
    assert fit.options == ()
    assert profile.batch.micro_sequences == min(fit.full, fit.low_rank)
    ranks = {"One card of 24 GB": 1, "One H100": 1, "Eight H100": 8, "Two nodes of eight H100": 16}
    assert profile.launch.world_size == ranks[machine] and list(ranks) == [name for name, _ in LAUNCHES]


NAMED = {
    "chat": ("chat-253beff1", "bd6292973b3a1405"),
    "continue": ("continue-3da1bd62", "7871f2382b4d2a61"),
    "digits": ("digits-08cb0cd2", "a61180d4db61d922"),
    "fashion": ("fashion-e9a59e36", "a787d4683ffe0f00"),
    "llama_130m": ("llama_130m-b82a4f14", "7a849f893b3b9de1"),
    "llama_1b": ("llama_1b-ef03b105", "8fb0d041331de55f"),
    "llama_250m": ("llama_250m-ef240453", "2f0b7d77d423f08b"),
    "llama_350m": ("llama_350m-350b40aa", "dc7e0c7800ce54ec"),
    "llama_60m": ("llama_60m-65c40f7b", "0dd92bf3ae210554"),
    "quickstart": ("quickstart-5907c70e", "f007a72efa35e60f"),
    "smoke": ("smoke-0ae63329", "5e662eb7aa79231f"),
    "small": ("small-b0f2f9cd", "f345419cfd167d1c"),
    "text": ("text-a8e49b71", "666c11736ce3fac6"),
    "tiny": ("tiny-6d9ba160", "5efc66fc6d3ce6de"),
}
"""Default run id, and the last stage's fingerprint, as of 2026-11-28: stores hold runs under these names."""


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_keeps_the_names_of_its_runs_and_stages(name):
    profile, fingerprint = load_profile(name), None
    for stage in plan_stages(profile):
        fingerprint = stage_fingerprint(fingerprint_settings(profile, stage, "d" * 64), fingerprint)
    assert (default_run_id(profile), fingerprint[:16]) == NAMED[name]
