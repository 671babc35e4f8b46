"""The shipped experiments compare what they claim to compare, and a faulty one says so before anything is trained."""

import json
import re
import shlex
import sys
import tomllib
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

from relora_train.data.sources import resolve_source
from relora_train.errors import ConfigError, ExperimentInvalidError, ProfileNotFoundError
from relora_train.experiments.comparison import compare_results
from relora_train.experiments.config import (
    ArmConfig,
    ExperimentConfig,
    PaperThroughput,
    ThroughputExperiment,
    ThroughputSettings,
    TutorialSettings,
)
from relora_train.experiments.experiment import (
    Experiment,
    PlannedRun,
    experiment_directory,
    list_experiments,
    load_experiment,
    run_tokens,
)
from relora_train.experiments.measured import is_measured
from relora_train.experiments.report import render_comparison
from relora_train.experiments.run_results import record_divergence, recorded_divergence
from relora_train.method.stages import fingerprint_settings, plan_stages
from relora_train.runs.plan import plan
from relora_train.settings.keys import flatten
from relora_train.settings.tasks import TaskMeasure
from relora_train.storage.opening import open_store

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import downstream
import gpu_corpus
import table5

ALL_SHIPPED = [path.stem for path in list_experiments()]
SHIPPED = [name for name in ALL_SHIPPED if not is_measured(name)]
PAPERS_TABLE_2 = ["table2-60m", "table2-130m", "table2-250m", "table2-350m", "table2-1b"]
SMALL = """
title = "Two arms"
profile = "smoke"
budget_tokens = 30_720
reference = "relora"
[arms.relora]
label = "ReLoRA"
[arms.lora]
label = "LoRA"
set.method = "lora"
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, **given: object) -> str:
    with pytest.raises(ExperimentInvalidError) as caught:
        load_experiment(path, **given)
    return str(caught.value)


def page(name: str | Path, overrides: dict[str, object] | None = None) -> str:
    return render_comparison(compare_results(load_experiment(name, overrides), []), {})


def arms(experiment: Experiment) -> dict[str, dict[str, object]]:
    """What can change an arm's result, by arm, at the first seed; the first and the last stage say it all."""
    first_seed = [run for run in experiment.runs if run.seed == experiment.seeds[0]]
    found = {}
    for run in first_seed:
        stages = plan_stages(run.profile)
        ends = [fingerprint_settings(run.profile, stage, "") for stage in (stages[0], stages[-1])]
        found[run.arm] = {f"{place}.{key}": value for place, end in enumerate(ends) for key, value in end.items()}
    return found


def runs_of(name: str, arm: str) -> list[PlannedRun]:
    """The runs of one arm of a shipped experiment."""
    return [run for run in load_experiment(name).runs if run.arm == arm]


def test_the_experiments_that_were_promised_are_shipped():
    assert {"table1", "table2-tiny", "resets", "restarts", "warm-start", "beyond", *PAPERS_TABLE_2} <= set(SHIPPED)
    assert {"table5-tiny", "table5-glue"} <= set(SHIPPED)
    assert {"tutorial", "table4"} == {*ALL_SHIPPED} - {*SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_a_shipped_experiment_trains_on_the_same_tokens(name: str):
    experiment = load_experiment(name)
    assert {run_tokens(run.profile) for run in experiment.runs} == {experiment.config.budget_tokens}
    assert len(experiment.runs) == len(experiment.config.arms) * len(experiment.config.seeds)
    for run in experiment.runs[: len(experiment.config.arms)]:
        unknown = plan(run.profile).unknown  # a pretrained model is not here yet
        assert unknown is None if run.profile.model.pretrained is None else "is downloaded" in str(unknown)


def test_the_search_of_table_5_tries_as_many_rates_for_each_arm_and_its_tasks_hide_what_tells_them_apart(
    tmp_path: Path,
):
    (tmp_path / "search.toml").write_text(table5.search())
    tried = load_experiment(tmp_path / "search.toml")
    shipped = {run.arm: run.profile for run in load_experiment("table5-tiny").runs}
    assert tried.seeds == (100,) and tried.config.budget_tokens == load_experiment("table5-tiny").config.budget_tokens
    rates: dict[str, set[float]] = {}
    for run in tried.runs:
        arm = run.arm.partition("-")[0]
        rates.setdefault(arm, set()).add(run.profile.optimizer.learning_rate)
        own = {"optimizer": shipped[arm].optimizer, "name": shipped[arm].name, "seed": 0}
        assert run.profile.model_copy(update=own) == shipped[arm].model_copy(update={"seed": 0})
    assert {len(found) for found in rates.values()} == {4} and rates.keys() == shipped.keys()
    for arm, profile in shipped.items():  # the best is at no edge
        assert min(rates[arm]) < profile.optimizer.learning_rate < max(rates[arm])
    lines = [("comment", f"a comment of some length, number {n}") for n in range(9)]
    lines += [("docstring", f"another text of some length {n}") for n in range(9)] + [("docstring", lines[0][1])]
    table5.write(tmp_path / "it.jsonl", iter(lines), each=5)
    records = [json.loads(line) for line in (tmp_path / "it.jsonl").read_text().splitlines()]
    assert Counter(record["label"] for record in records) == {"comment": 5, "docstring": 5}
    assert lines[0][1] not in [record["text"] for record in records]  # it would be of both


def test_the_file_that_is_carried_to_a_gpu_is_the_one_its_experiment_pins(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_corpus.py", str(tmp_path)])
    gpu_corpus.main()
    data = load_experiment("table2-60m-short").runs[0].profile.data
    assert data.paths == (gpu_corpus.NAME,)
    resolve_source(data.model_copy(update={"paths": (str(tmp_path / gpu_corpus.NAME),)}))  # refuses any other content


def test_tasks_made_of_code_are_answered_by_what_the_code_goes_on_with():
    text = "".join(
        f"def reverse_{n}(things, owner):\n    longest = measure(things[{n}], owner)\n    return longest, things\n"
        for n in range(30)
    )
    found = downstream.make_tasks([text], count=20)
    assert Counter(example["answer"] for example in found["brackets"]) == {0: 10, 1: 10}
    assert len(found["identifiers"]) == 20 and {len(example["choices"]) for example in found["identifiers"]} == {4}
    for example in (*found["brackets"], *found["identifiers"]):
        context, choices = example["context"], example["choices"]
        assert context + choices[example["answer"]] in text and len(context) <= downstream.CONTEXT_CHARACTERS
        assert len({choice[0] for choice in choices}) == len(choices)
    assert all(name in each["context"] for each in found["identifiers"] for name in each["choices"])


@pytest.mark.parametrize("name", SHIPPED)
def test_no_two_arms_of_a_shipped_experiment_are_the_same(name: str):
    experiment = load_experiment(name)
    settings = list(arms(experiment).values())
    assert all(ours != theirs for i, ours in enumerate(settings) for theirs in settings[:i])
    assert len({run.run_id for run in experiment.runs}) == len(experiment.runs)
    assert len({arm.label for arm in experiment.config.arms.values()}) == len(experiment.config.arms)


@pytest.mark.parametrize("name", ALL_SHIPPED)
def test_a_shipped_experiment_begins_with_source_time_and_hardware(name: str):
    header = (experiment_directory() / f"{name}.toml").read_text().partition("\n\n")[0]
    assert re.findall(r"^# (\w+): ", header, flags=re.MULTILINE) == ["Source", "Time", "Verified"]


@pytest.mark.parametrize("name", [*PAPERS_TABLE_2, "table2-tiny", "table2-small"])
def test_the_control_has_as_many_parameters_as_relora_trains(name: str):
    planned = {run.arm: plan(run.profile) for run in runs_of(name, "control")[:1]}
    relora = plan(runs_of(name, "relora")[0].profile)
    assert planned["control"].method == "full"
    assert planned["control"].parameters == pytest.approx(relora.low_rank.trainable_parameters, rel=0.005)


@pytest.mark.parametrize("name", [*PAPERS_TABLE_2, "table2-tiny", "table2-small"])
def test_the_arms_of_table_2_are_what_the_paper_compares(name: str):
    profiles = {run.arm: run.profile for run in load_experiment(name).runs}
    assert (profiles["full"].method, profiles["relora"].method) == ("full", "relora")
    assert profiles["full"].model == profiles["relora"].model
    warm, relora = profiles["lora-warm"], profiles["relora"]
    tuned = relora.optimizer.model_copy(update={"learning_rate": warm.optimizer.learning_rate})  # each has its own
    assert warm == relora.model_copy(update={"method": "lora", "name": warm.name, "optimizer": tuned})
    if "lora" in profiles:
        assert (profiles["lora"].method, profiles["lora"].schedule.warm_start_steps) == ("lora", 0)
    assert len({run.warm_start for run in load_experiment(name).runs if run.seed == 0 and run.warm_start}) == 1


@pytest.mark.parametrize("name", ["table1", "table1-tiny"])
def test_the_rows_of_table_1_differ_in_the_four_parts_as_the_paper_has_them(name: str):
    parts = {}
    for run in load_experiment(name).runs:
        p = run.profile
        cycles = p.method == "relora"
        parts[run.arm] = (
            cycles,
            cycles and p.optimizer_reset.mode != "none",
            cycles and p.schedule.jagged,
            p.method != "full" and p.schedule.warm_start_steps > 0,
        )
    if name == "table1-tiny":  # the paper's third row once more, with the official code's reset
        assert parts.pop("restarts-reset-masks") == parts["restarts-reset"]
    assert parts == {  # restarts, optimizer reset, jagged schedule, warm start
        "lora": (False, False, False, False),
        "restarts": (True, False, False, False),
        "restarts-reset": (True, True, False, False),
        "restarts-jagged": (True, False, True, False),
        "restarts-reset-jagged": (True, True, True, False),
        "lora-warm": (False, False, False, True),
        "relora": (True, True, True, True),
        "full": (False, False, False, False),
    }


def test_the_arms_of_the_resets_differ_in_the_reset_and_nothing_else():
    found = arms(load_experiment("resets"))
    reference = found.pop("none")
    for settings in found.values():
        differing = {key for key in settings if settings[key] != reference[key]}
        assert differing and all("optimizer_reset." in key for key in differing)


def test_the_arms_beyond_the_paper_differ_from_relora_in_their_one_option():
    arms = load_experiment("beyond").config.arms
    assert {name: [*flatten(arm.set)] for name, arm in arms.items()} == {
        "relora": [], "growing-cycles": ["schedule.cycle_growth"],
    }  # fmt: skip
    assert len(load_experiment("beyond").warm_starts) == 3  # shared by all arms, a seed each


def test_the_papers_numbers_are_those_of_its_table_1():
    paper = {name: arm.paper for name, arm in load_experiment("table1").config.arms.items()}
    assert paper == {
        "lora": 34.17, "restarts": 34.25, "restarts-reset": "diverged", "restarts-jagged": 34.29,
        "restarts-reset-jagged": 29.77, "lora-warm": 25.46, "relora": 25.04, "full": 23.65,
    }  # fmt: skip


def test_experiments_share_warm_starts_and_arms_whose_settings_are_the_same():
    for one, other in (("table2-tiny", "table1-tiny"), ("beyond", "resets")):
        warm_starts = [{run.run_id for run in load_experiment(name).warm_starts} for name in (one, other)]
        assert warm_starts[0] == warm_starts[1]
    table1 = {run.run_id for run in load_experiment("table1-tiny").runs}
    shared = {run.run_id for run in load_experiment("table2-tiny").runs if run.arm not in ("control",)}
    assert shared and shared <= table1


def test_the_run_ids_stay_when_arms_and_seeds_are_added(tmp_path: Path):
    before = load_experiment(write(tmp_path, SMALL), seeds=[0])
    more = SMALL + "[arms.full]\nlabel = 'Full'\nset.method = 'full'\n"
    after = load_experiment(write(tmp_path, more), seeds=[0, 1])
    assert {run.run_id for run in before.runs} < {run.run_id for run in after.runs}
    assert {run.run_id for run in before.warm_starts} < {run.run_id for run in after.warm_starts}


def test_every_question_has_a_report_of_its_own(tmp_path: Path):
    def digest(text: str = SMALL, **given: object) -> str:
        return load_experiment(write(tmp_path, text), **given).digest

    other_reference = SMALL.replace('reference = "relora"', 'reference = "lora"')
    fewer_scored = {"evaluation.final_sequences": 16}
    asked = [digest(), digest(seeds=[0]), digest(other_reference), digest(overrides=fewer_scored)]
    assert len(set(asked)) == len(asked)
    assert digest(seeds=[2, 1, 0]) == digest(seeds=[0, 1, 2]) == digest()


def test_overrides_go_under_the_arms_and_may_change_the_budget_of_all(tmp_path: Path):
    path = write(tmp_path, SMALL)
    small = load_experiment(path, {"schedule.cycle_length": 10})
    assert small.budget_tokens == (20 + 2 * 10) * 8 * 64 < small.config.budget_tokens
    assert {run.profile.schedule.cycle_length for run in small.runs} == {10}
    assert {run.run_id for run in small.runs}.isdisjoint(run.run_id for run in load_experiment(path).runs)


def test_all_faults_of_the_arms_are_shown_at_once(tmp_path: Path):
    message = refusal(write(tmp_path, SMALL + "set.relora.rnk = 3\n[arms.third]\nlabel = 'x'\nset.relora.rank = 0\n"))
    assert "2 faults" in message and "smoke.toml" not in message and message.count("Correct them") == 1
    assert "  - arms.lora: relora.rnk: no such setting" in message and "did you mean 'rank'" in message
    assert "arms.third" in message and "relora.rank" in message


def test_an_override_that_an_arm_sets_itself_is_said_not_to_reach_it(tmp_path: Path):
    experiment = load_experiment(write(tmp_path, SMALL), {"method": "full", "relora": {"rank": 4}})
    assert experiment.unreached == {"method": ("lora",)}
    assert {run.arm: run.profile.method for run in experiment.runs} == {"relora": "full", "lora": "lora"}


def test_the_search_for_settings_is_shown_as_it_was_written(tmp_path: Path):
    lines = '[search]\n"relora, rate 4e-3" = "1.388 ± 0.004"\n"relora, rate 6e-3" = "1.391 <not chosen>"\n'
    html = page(write(tmp_path, SMALL + lines)).partition("How the settings were found")[2]
    assert html.index("relora, rate 4e-3") < html.index("1.388 ± 0.004") < html.index("1.391 &lt;not chosen&gt;")
    assert "How the settings were found" not in page(write(tmp_path, SMALL))


def test_the_report_shows_what_the_experiment_sets_over_the_profile(tmp_path: Path):
    text = SMALL.replace("[arms.relora]", "[base]\nrelora.alpha = 77.5\n\n[arms.relora]", 1)
    assert "The base is profile smoke with <code>relora.alpha = 77.5</code>" in page(write(tmp_path, text))
    assert "The base is profile" not in page(write(tmp_path, SMALL))


def test_a_command_in_the_report_can_be_pasted_into_a_shell(tmp_path: Path):
    overrides = {"evaluation.sample_prompts": ["a b"]}
    shown = re.search(r"<code>(relora compare .*?)</code>", page(write(tmp_path, SMALL), overrides))[1]
    assert shlex.split(unescape(shown))[-1] == 'evaluation.sample_prompts=["a b"]'


def test_seed_and_name_are_no_overrides(tmp_path: Path):
    assert "name one twice" in refusal(write(tmp_path, SMALL), seeds=[1, 1])
    assert "--seeds" in refusal(write(tmp_path, SMALL), overrides={"seed": 3})
    message = refusal(write(tmp_path, SMALL + "set.seed = 7\n[base]\nname = 'mine'\n"))
    assert "arms.lora.set.seed cannot be set" in message and "base.name cannot be set" in message


@pytest.mark.parametrize("name", ["mine.exp", "mine", "vier ü.toml", ".toml"])
def test_a_file_is_refused_by_a_name_that_no_folder_could_have(tmp_path: Path, name: str):
    (tmp_path / name).write_text(SMALL)
    assert "Rename it" in refusal(tmp_path / name)


def test_the_report_names_the_command_that_makes_it_again(tmp_path: Path):
    (tmp_path / "images.toml").write_text(SMALL)
    assert "relora compare images.toml --seeds 0,1,2" in page(tmp_path / "images.toml")
    assert "relora compare images --seeds" in page("images")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('reference = "relora"', 'reference = "nope"', "none of the arms relora, lora"),
        ('title = "Two arms"', "", "title: Field required"),
        ('label = "LoRA"', 'label = "LoRA"\npaper = 3.1', "paper_source"),
        ('label = "LoRA"', 'label = "LoRA"\ncolour = 3', "arms.lora.colour: Extra inputs"),
        ("budget_tokens = 30_720", "budget_tokens = 30_720\nseeds = [1, 1]", "name one twice"),
        ('title = "Two arms"', "title = ", "is not valid TOML"),
        ('label = "LoRA"', 'label = "ReLoRA"', "several arms are called 'ReLoRA'"),
        ('label = "LoRA"', 'label = ""', "arms.lora.label: String should have at least 1 character"),
        ("budget_tokens = 30_720", "budget_tokens = 30_720\nseeds = [true]", "seeds.0: Input should be"),
        (
            'label = "LoRA"',
            'label = "LoRA"\nset.schedule.cycles = 3',
            "arms.lora: 80 steps of 512 tokens are 40,960, not the common budget of 30,720",
        ),
    ],
)
def test_a_faulty_experiment_says_what_and_where(tmp_path: Path, before: str, after: str, words: str):
    path = write(tmp_path, SMALL.replace(before, after))
    message = refusal(path)
    assert words in message and str(path) in message


def test_a_divergence_on_record_holds_for_what_was_asked_to_be_done_about_one(tmp_path: Path):
    path, store = write(tmp_path, SMALL), open_store((tmp_path / "store").as_uri())
    run = load_experiment(path).runs[0]
    record_divergence(store, "mine", run, "The loss is nan.")
    assert recorded_divergence(store, "mine", run) == "The loss is nan."
    retried = load_experiment(path, {"divergence.on_divergence": "lower_lr"}).runs[0]
    assert retried.run_id == run.run_id and recorded_divergence(store, "mine", retried) is None


def test_the_base_may_lie_beside_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "base.toml").write_text("[relora]\nrank = 8\n")
    text = SMALL.replace('"smoke"', '"base.toml"').replace("30_720", str(1000 * 32 * 256))
    experiment = load_experiment(write(tmp_path, text))
    assert {run.profile.relora.rank for run in experiment.runs} == {8}
    with pytest.raises(ConfigError):
        load_experiment(write(tmp_path, SMALL.replace('"smoke"', '"gone.toml"')))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ProfileNotFoundError, match=r"mine\.toml: its profile .*other/base\.toml is not there"):
        load_experiment(write(tmp_path / "other", text))


README = (experiment_directory() / "README.md").read_text()


def test_the_readme_lists_every_shipped_experiment_and_no_other():
    table = README.partition("## Shipped")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE)) == sorted(ALL_SHIPPED)


def keys_below(heading: str) -> set[str]:
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([\w.]+)` \|", section, flags=re.MULTILINE))


def test_the_readme_explains_every_key():
    arm_keys = {f"arms.NAME.{key}" for key in ArmConfig.model_fields}
    measure_keys = {f"measure.{key}" for key in TaskMeasure.model_fields}
    assert keys_below("Every key") == {*ExperimentConfig.model_fields, *arm_keys, *measure_keys}


def test_the_readme_explains_every_key_of_experiments_without_runs():
    keys = {"title", "kind", "seeds", *(f"tutorial.{key}" for key in TutorialSettings.model_fields)}
    keys |= {f"throughput.{key}" for key in ThroughputSettings.model_fields} | {"paper_source"}
    keys |= {f"paper.{key}" for key in PaperThroughput.model_fields}
    assert keys_below("Experiments that train no runs") == keys
    assert set(ThroughputExperiment.model_fields) == {"title", "kind", "throughput", "paper_source", "paper"}


def test_the_readmes_smaller_experiment_can_be_had():
    sets = re.search(r"^relora compare table2-tiny --seeds 0(( --set \S+)+)$", README, flags=re.MULTILINE)
    assert sets
    overrides = dict(text.split("=") for text in sets[1].split() if "=" in text)
    experiment = load_experiment("table2-tiny", {key: tomllib.loads(f"v={v}")["v"] for key, v in overrides.items()})
    assert experiment.budget_tokens == experiment.config.budget_tokens / 5
