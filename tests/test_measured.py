"""Experiments that train no runs: what is refused, and the arithmetic of table 4 against numbers worked out by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from relora_train.cli.compare import summary_view
from relora_train.cli.output import show
from relora_train.errors import ConfigError, ExperimentInvalidError, ProfileNotFoundError
from relora_train.experiments.bench import FULL, RELORA, StepRequest, StepResult
from relora_train.experiments.config import PaperThroughput
from relora_train.experiments.measured import (
    Measured,
    MeasuredSummary,
    MeasuredTable,
    adjusted_speed,
    is_measured,
    load_measured,
    measure_throughput,
    pair_record,
    summarize,
)
from relora_train.experiments.report import measured_markdown, store_measured
from relora_train.settings.data import BatchConfig
from relora_train.settings.profile import Profile
from relora_train.storage.opening import open_store, uri_to_path

HUNDRED_TOKENS = Profile(batch=BatchConfig(sequences=10, sequence_length=10))


def arm(name: str, *seconds: float, weights: int, rest: int) -> StepResult:
    memory = {"weights": weights, "above_weights": rest, "optimizer": rest // 2}
    return StepResult(
        request=StepRequest(arm=name, profile=HUNDRED_TOKENS, vocab_size=64, flops_per_token=1.0),
        device="cpu, 1 threads", seconds=seconds, loss=1.0, matmul_flops=1.0, memory=memory, matmul_precision="highest",
    )  # fmt: skip


def test_a_run_with_a_warm_start_is_as_fast_as_its_steps_take_together():
    """100 tokens a step. A quarter of the steps at 2 s and the rest at 1 s: 1.25 s a step, 80 tokens a second."""
    full, relora = arm(FULL, 2.0, 4.0, weights=10, rest=30), arm(RELORA, 1.0, 2.0, weights=12, rest=20)
    record = pair_record(full, relora, share=0.25)
    assert record["step_seconds"]["adjusted"] == [1.25, 2.5]
    assert record["tokens_per_second"]["full"]["mean"] == (50 + 25) / 2
    assert record["tokens_per_second"]["adjusted"]["mean"] == (80 + 40) / 2
    assert record["tokens_per_second"]["adjusted"]["standard_error"] == 20  # half of the difference of two
    assert record["speed_over_full"]["relora"] == {"mean": 2.0, "standard_error": 0.0, "count": 2}
    assert record["speed_over_full"]["adjusted"]["mean"] == pytest.approx(1.6)
    assert record["peak_bytes"] == {"full": 40, "relora": 32}
    assert pair_record(full, relora, share=0.0)["speed_over_full"]["adjusted"]["mean"] == 2
    assert pair_record(full, relora, share=1.0)["speed_over_full"]["adjusted"]["mean"] == 1


def test_its_tables_fit_a_hundred_columns_without_breaking_a_name():
    full, relora = (arm(FULL, 1.302, 1.311, weights=400_000_000, rest=10**9) for _ in range(2))
    names = ["llama_350m", "/home/someone/profiles/mine.toml"]
    pairs = {name: pair_record(full, relora, share=1 / 3) for name in names}
    numbers = {"measured_at": "2026-01-01T00:00:00+00:00", "device": "cpu", "profiles": pairs}
    config = load_measured("table4", {"throughput.profiles": names}).config
    measured = summarize(config, numbers)
    console = Console(width=100, file=io.StringIO())
    uris = {"html_uri": "file:///r.html", "json_uri": "file:///r.json", "picture_uris": ()}
    show(console, summary_view(MeasuredSummary(experiment="table4", title="x", measured=measured, **uris), 1.0))
    shown = console.file.getvalue()
    for name in names:
        assert shown.count(f"{name}  ") == 2, shown


def test_the_papers_gains_of_whole_runs_by_our_formula():
    """By hand, with a third: 3 / (1/137 + 2/157) = 149.7, 3 / (1/84 + 2/124) = 106.9, 3 / (1/8.8 + 2/17.8) = 13.27."""
    columns = load_measured("table4").config.paper
    gains = [adjusted_speed(column, 1 / 3) / column.full for column in columns]
    assert gains == pytest.approx([1.0925, 1.2731, 1.5085], abs=1e-3)
    assert [round(100 * (gain - 1)) for gain in gains] != [c.total_percent for c in columns]  # 27 %, printed 32 %


def test_the_papers_numbers_are_those_of_its_table_4():
    found = [(c.where, c.full, c.relora, c.adjusted, c.total_percent) for c in load_measured("table4").config.paper]
    assert found == [
        ("8x A100", 137, 157, 149, 9),
        ("6x A6000 Ada", 84, 124, 111, 32),
        ("2x 3090", 8.8, 17.8, 14.8, 51),
    ]


def test_experiments_know_whether_they_train_runs():
    assert is_measured("tutorial") and is_measured("table4") and not is_measured("resets")
    with pytest.raises(ProfileNotFoundError, match="Did you mean 'tutorial'"):
        is_measured("tutoria")


def test_settings_go_over_the_files_and_the_report_is_of_the_settings():
    shipped, fewer = load_measured("tutorial"), load_measured("tutorial", {"tutorial.steps": 100}, seeds=[3, 4])
    assert (fewer.config.tutorial.steps, fewer.config.seeds) == (100, (3, 4))
    assert fewer.config.tutorial.rank == shipped.config.tutorial.rank
    assert len({shipped.digest, fewer.digest, load_measured("tutorial", seeds=[3, 4]).digest}) == 3


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ('title = "x"\nkind = "speed"', {}, "kind"),
        ('title = "x"\nkind = "tutorial"\n[tutorial]\nrnk = 3', {}, "tutorial.rnk"),
        ('title = "x"\nkind = "tutorial"\nseeds = [1]', {}, "seeds"),
        ('title = "x"\nkind = "tutorial"\nseeds = [1, 1]', {}, "seeds: [1, 1] name one twice"),
        ('title = "x"\nkind = "tutorial"', {"tutorial.rank": 40}, "rank 40 is more than 5"),
        ('title = "x"\nkind = "tutorial"', {"tutorial.steps": 310}, "steps 310 are no multiple of cycle_length 50"),
        ('title = "x"\nkind = "tutorial"', {"tutorial.warmup_steps": 60}, "must not exceed cycle_length 50"),
        ('title = "x"\nkind = "throughput"', {"throughput.rounds": 1}, "throughput.rounds"),
    ],
)
def test_a_faulty_file_says_what_and_where(tmp_path: Path, text: str, overrides: dict[str, object], words: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ExperimentInvalidError) as caught:
        load_measured(path, overrides)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ConfigError, match="over rounds"):
        load_measured("table4", seeds=[0])
    with pytest.raises(ConfigError, match=r"'relora' is none of its settings.*begins with 'tutorial\.'"):
        load_measured("tutorial", {"relora.rank": 3})
    experiment = load_measured("table4", {"throughput.profiles": ["lama_1b"]})
    with pytest.raises(ProfileNotFoundError, match=r"Did you mean 'llama_1b'"):
        measure_throughput(experiment.config)


def test_page_markdown_and_json_say_the_same(tmp_path: Path):
    experiment = load_measured("table4")
    table = MeasuredTable(title="Speeds <1>", header=("a", "b"), rows=(("x", "1.5 ± 0.1"),), note="by hand")
    measured = Measured(headline="It is fast.", facts="cpu", tables=(table,), numbers={"x": [1.5]})
    stored, markdown = (
        store_measured(experiment, measured, {}, open_store(tmp_path)),
        measured_markdown(experiment, measured),
    )
    html = uri_to_path(stored.html_uri).read_text()
    assert "Speeds &lt;1&gt;" in html and "1.5 ± 0.1" in html and "It is fast." in html
    assert "| x | 1.5 ± 0.1 |" in markdown and "It is fast." in markdown
    record = json.loads(uri_to_path(stored.json_uri).read_text())
    assert record["numbers"] == {"x": [1.5]} and record["settings"]["throughput"]["rounds"] == 5
    assert PaperThroughput.model_validate(record["settings"]["paper"][0]).where == "8x A100"
