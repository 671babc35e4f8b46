import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic_run import commit_run, evaluation_of, synthetic_profile

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.errors import CheckpointCorruptError, CheckpointIncompleteError, CheckpointNotFoundError
from relora_train.method.stages import plan_stages
from relora_train.reports.collect import collect_run_data
from relora_train.reports.plot_style import MAX_POINTS, downsample, running_mean
from relora_train.reports.plots import OVERVIEW_BYTES, overview_png
from relora_train.reports.render import TEMPLATES
from relora_train.reports.report import overview_markdown, stage_table_markdown, summarize, write_report
from relora_train.reports.run_data import Evaluation, MergeRow, Sample, Scores
from relora_train.reports.text import change
from relora_train.settings.data import BatchConfig
from relora_train.settings.method import ScheduleConfig
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store
from relora_train.text import count, decimal, duration, percent, scientific, size

HOSTILE = "<script>alert(1)</script>\"'&<img src=http://x.example/a.png>$\\frac$|`\x00\x1b\u202e\ud800 # "


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value or "") for name, value in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def store(request):
    """A store of the test's own."""
    return MemoryStore.shared(f"report-{request.node.name}")


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The checkpoints of a run of three cycles; tests that change something make their own."""
    store, scratch = MemoryStore.shared("report-line"), tmp_path_factory.mktemp("scratch")
    return commit_run(store, "run-1", synthetic_profile(), scratch)


@pytest.fixture(scope="module")
def data(line, tmp_path_factory):
    prompts = {"def main(": "argv):\n    pass", "import os": "\nimport sys"}
    evaluations = [evaluation_of(line[0], prompts), evaluation_of(line[-1], prompts)]
    return collect_run_data(line, files_in_stores(tmp_path_factory.mktemp("cache")), evaluations=evaluations)


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    return write_report(data, tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def page(files):
    return Page(files[-1].read_text("utf-8"))


@pytest.fixture
def collected(store, tmp_path):
    """Commits a run of these options to the test's store and collects it."""

    def collect(profile=None, *, spectra=True, **options):
        line = commit_run(store, "run", profile or synthetic_profile(), tmp_path / "scratch", **options)
        return collect_run_data(line, files_in_stores(tmp_path / "cache"), spectra=spectra)

    return collect


def page_of(data, directory):
    return Page(write_report(data, directory)[-1].read_text("utf-8"))


def test_the_report_says_of_each_stage_what_its_manifest_says(line, files, page):
    stages = json.loads(files[-2].read_text())["stages"]
    for row, ref in zip(stages, line, strict=True):
        manifest = ref.manifest
        assert (row["stage"], row["end_step"], row["uri"]) == (manifest.stage, manifest.step, ref.uri)
        assert row["after"]["val_perplexity"] == manifest.evaluation["val_perplexity"]
        assert row["before"]["bits_per_byte"] == manifest.evaluation["bits_per_byte_before"]
        assert row["tokens"] == row["steps"] * 8 * 64
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / manifest.stage_seconds)
    for ref in line:
        assert ref.uri in page.text
        assert f"{ref.manifest.evaluation['val_perplexity']:,.2f}" in page.text


def test_all_files_of_a_report_are_there(files):
    assert {path.name for path in files[-1].parent.iterdir()} == {
        "report.html", "summary.json", "overview.png", "loss.png", "spectra.png", "growth.png",
    }  # fmt: skip
    for path in files[:-2]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_page_loads_nothing_from_elsewhere_and_links_to_its_own_sections(files, page):
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset"):
            assert value.startswith("data:image/png;base64,"), (tag, name)
            assert base64.b64decode(value.partition(",")[2], validate=True).startswith(b"\x89PNG")
        if name == "href":
            assert value.startswith("#")
    html = files[-1].read_text("utf-8")
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    (script,) = re.findall("<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert script == (TEMPLATES / "charts.js").read_text() and page.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for tag, name, value in page.attributes if (tag, name) == ("meta", "content"))
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ids = {value for _, name, value in page.attributes if name == "id"}
    links = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert links == ids


def test_the_same_run_gives_the_same_bytes(data, files, tmp_path):
    write_report(data, tmp_path)
    for path in files[-1].parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def hostile_history(history):
    names = (HOSTILE,) * len(history.growth_stages)
    growth = tuple(tuple(replace(one, name=HOSTILE) for one in layer) for layer in history.growth)
    return replace(history, growth_stages=names, growth=growth)


def test_strings_from_outside_never_become_markup(data, page, tmp_path):
    plain = page
    hostile = replace(
        data,
        run_id=HOSTILE,
        profile=HOSTILE,
        method=HOSTILE,
        dataset_uri=HOSTILE,
        stages=tuple(replace(row, stage=HOSTILE, run_id=HOSTILE, uri=HOSTILE) for row in data.stages),
        merges=tuple(replace(row, stage=HOSTILE, layers={HOSTILE: row.layers[name]}) for row in data.merges
                     for name in list(row.layers)[:1]),
        evaluations=tuple(replace(item, stage=HOSTILE, checkpoint_uri=HOSTILE) for item in data.evaluations),
        samples=tuple(replace(s, stage=HOSTILE, prompt=HOSTILE, text=HOSTILE) for s in data.samples),
        spectra=tuple(replace(spectrum, name=HOSTILE) for spectrum in data.spectra),
        spectra_between=(HOSTILE, HOSTILE),
        spectra_notes=(HOSTILE,),
        history=hostile_history(data.history),
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    page = page_of(hostile, tmp_path)
    assert set(page.tags) == set(plain.tags)
    assert {(tag, name) for tag, name, _ in page.attributes} == {(tag, name) for tag, name, _ in plain.attributes}
    assert page.text.count("<script>alert(1)</script>\"'&<img") >= 20
    assert not set("\x00\x1b\u202e") & set(page.text)
    markdown = stage_table_markdown(hostile)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(row.replace("\\|", "").split("|")) for row in rows} == {10}
    assert all(line.startswith(("|", "- ")) for line in filter(None, markdown.splitlines()))
    assert "<" not in re.sub(r"`[^`]*`", "", markdown.replace("&lt;", ""))  # only inside code, where it is text


def test_a_warm_start_alone_makes_a_report_that_says_what_is_missing(collected, tmp_path):
    data = collected(stages=plan_stages(synthetic_profile())[:1])
    page = page_of(data, tmp_path / "out")
    assert (data.merges, data.spectra, data.spectra_between) == ((), (), None)
    for sentence in ("No low-rank update was merged", "No two checkpoints", "No sample prompts", "has not scored"):
        assert sentence in page.text
    assert "Validation perplexity is " in page.text
    assert not (tmp_path / "out/spectra.png").exists()


@pytest.mark.parametrize(("method", "merges"), [("full", 0), ("lora", 1)])
def test_other_methods_are_reported_too(collected, tmp_path, method, merges):
    data = collected(synthetic_profile(method=method))
    page = page_of(data, tmp_path / "out")
    assert len(data.merges) == merges
    assert len(data.spectra) == 12  # four roles in the first, middle and last of three blocks
    if method == "lora":
        assert {spectrum.numerical_rank for spectrum in data.spectra} == {4}
        assert data.spectra_between == ("warm-start", "lora")
    else:
        assert data.spectra_between == ("full-1", "full-4")
    assert f"after {data.stages[-1].stage}" in page.text


def test_the_total_update_has_the_rank_of_all_cycles_together(data):
    assert {spectrum.numerical_rank for spectrum in data.spectra} == {3 * 4}
    assert data.spectra_between == ("warm-start", "cycle-3")


def test_a_run_resumed_from_another_run_in_another_store_is_one_line(store, tmp_path):
    profile = synthetic_profile()
    warm, *cycles = plan_stages(profile)
    disk = open_store(tmp_path / "disk")
    (parent,) = commit_run(disk, "base", profile, tmp_path / "a", stages=[warm])
    rest = commit_run(store, "branch", profile, tmp_path / "b", stages=cycles, parent=parent)
    data = collect_run_data([parent, *rest], files_in_stores(tmp_path / "cache"))
    assert [row.start_step for row in data.stages] == [0, 40, 80, 120]
    assert [row.run_id for row in data.stages] == ["base", "branch", "branch", "branch"]
    text = page_of(data, tmp_path / "out").text
    assert "from run base" in text
    assert text.count(parent.uri) == 3  # its own row, its lineage, the parent of cycle-1

    without = collect_run_data(rest, files_in_stores(tmp_path / "cache"))
    assert [row.tokens for row in without.stages] == [40 * 8 * 64] * 3
    assert without.stages[0].parent_uri == parent.uri
    write_report(without, tmp_path / "without")


def test_only_the_files_that_are_read_are_fetched(store, tmp_path):
    line = commit_run(store, "run", synthetic_profile(), tmp_path / "scratch")
    for ref in line:
        store.delete(f"{ref.prefix}/optimizer.safetensors")
    for ref in line[1:-1]:
        store.delete(f"{ref.prefix}/model.safetensors")
    assert len(collect_run_data(line, files_in_stores(tmp_path)).spectra) == 12


def test_a_damaged_file_of_a_checkpoint_is_an_error(store, tmp_path):
    line = commit_run(store, "run", synthetic_profile(), tmp_path / "scratch")
    store.put_bytes(f"{line[1].prefix}/metrics.jsonl", b"{}")
    with pytest.raises(CheckpointCorruptError, match=r"cycle-1|metrics\.jsonl"):
        collect_run_data(line, files_in_stores(tmp_path), spectra=False)


def test_a_broken_record_names_its_line(store, tmp_path):
    profile = synthetic_profile()
    line = commit_run(store, "run", profile, tmp_path / "scratch", stages=plan_stages(profile)[:1])
    directory = tmp_path / "scratch/run/warm-start"
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "tra')
    with pytest.raises(CheckpointCorruptError, match=r"Line 42 of metrics\.jsonl"):
        collect_run_data(line, lambda ref, names: directory)


def test_an_empty_line_and_a_checkpoint_without_weights_are_errors(line, tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        collect_run_data([], files_in_stores(tmp_path))
    kept = tuple(entry for entry in line[-1].manifest.files if entry.path != "model.safetensors")
    bare = replace(line[-1], manifest=line[-1].manifest.model_copy(update={"files": kept}))
    with pytest.raises(CheckpointIncompleteError, match=r"model\.safetensors"):
        collect_run_data([*line[:-1], bare], files_in_stores(tmp_path))


def test_numbers_that_are_not_finite_are_shown_and_are_null_in_json(collected, tmp_path):
    def spoil(record):
        odd = {50: math.nan, 51: math.inf}
        return {**record, "loss": odd[record["step"]], "grad_norm": math.nan} if record["step"] in odd else record

    data = collected(edit=spoil)
    last = replace(data.stages[-1], after=Scores(math.inf, math.inf, math.nan))
    merge = MergeRow("cycle-1", 80, 1, math.nan, None, None, math.inf)
    data = replace(data, stages=(*data.stages[:-1], last), merges=(merge,))
    files = write_report(data, tmp_path / "out")
    summary = json.loads(files[-2].read_text(), parse_constant=pytest.fail)
    assert summary["train_records_not_finite"] == 2
    assert summary["stages"][-1]["after"]["val_perplexity"] is None
    text = Page(files[-1].read_text("utf-8")).text
    assert "∞" in text and "NaN" in text
    assert "not finite, marked ×: 2." in text


def test_a_run_of_nothing_but_non_finite_numbers_still_has_a_report(collected, tmp_path):
    data = collected(edit=lambda record: {k: math.nan if isinstance(v, float) else v for k, v in record.items()})
    nothing = Scores(math.nan, math.nan, math.nan)
    data = replace(data, stages=tuple(replace(row, before=nothing, after=nothing, seconds=0.0) for row in data.stages))
    write_report(data, tmp_path / "out")


def test_checkpoints_without_records_or_scores_still_have_a_report(data, tmp_path):
    empty = replace(
        data,
        train=data.train[:0],
        stages=tuple(replace(row, before=Scores(), after=Scores(), tokens=None) for row in data.stages),
        evaluations=(), samples=(), merges=(), spectra=(), history=None, versions={}, settings={},
    )  # fmt: skip
    text = page_of(empty, tmp_path / "out").text
    assert "no training records" in text and "–" in text


def test_twelve_thousand_records_are_thinned_and_the_overview_stays_small(collected, tmp_path):
    schedule = ScheduleConfig(warm_start_steps=3000, cycles=9, cycle_length=1000, warmup_steps=100)
    data = collected(synthetic_profile(schedule=schedule), spectra=False)
    assert len(data.train) == 12_000
    overview, files = overview_png(data), write_report(data, tmp_path / "out")
    assert len(overview) <= OVERVIEW_BYTES
    assert "Of 12,000 records at most 2,000 are drawn" in files[-1].read_text("utf-8")
    assert files[-1].stat().st_size < 1_000_000
    assert len(overview_markdown(data, overview)) < 63_000


def test_downsampling_keeps_extremes_gaps_and_order():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000), rng.normal(size=50_000)
    y[[12_345, 40_000]] = 99.0, -99.0
    y[777] = np.nan
    thin_x, thin_y = downsample(x, y)
    assert len(thin_x) == len(thin_y) <= MAX_POINTS
    assert (np.diff(thin_x) > 0).all()
    assert {777, 12_345, 40_000, int(np.nanargmax(y)), int(np.nanargmin(y))} <= set(thin_x.tolist())
    np.testing.assert_array_equal(thin_y, y[thin_x])
    same_x, same_y = downsample(x[:MAX_POINTS], y[:MAX_POINTS])
    assert same_x.size == same_y.size == MAX_POINTS


def test_the_running_mean_has_no_lag_and_skips_what_is_not_finite():
    line = np.linspace(5, 1, 400)
    np.testing.assert_allclose(running_mean(line)[:-10], line[:-10])  # the mean of both sides of a line is the line
    spoiled = np.where(np.arange(400) == 200, np.inf, 1.0)
    np.testing.assert_allclose(running_mean(spoiled), 1.0)
    assert np.isnan(running_mean(np.full(5, np.nan))).all()
    assert running_mean(np.array([])).size == 0


def test_samples_after_the_warm_start_and_after_the_last_cycle_stand_side_by_side(data, tmp_path):
    middle = Sample("cycle-1", 80, "def main(", "of the middle")
    page = page_of(replace(data, samples=(*data.samples, middle)), tmp_path / "out")
    assert page.text.count("after warm-start") >= 2 and "of the middle" not in page.text
    assert page.text.count("argv):\n    pass") == 2


def test_the_markdown_overview_holds_figure_and_table(data):
    markdown = overview_markdown(data, overview_png(data))
    encoded = markdown.partition("data:image/png;base64,")[2].partition(")")[0]
    assert base64.b64decode(encoded, validate=True) == overview_png(data)
    assert stage_table_markdown(data) in markdown
    assert f"`{data.stages[-1].uri}`" in markdown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(1_234_567), "1,234,567"),
        (count(None), "–"),
        (decimal(1234.567, 2), "1,234.57"),
        (decimal(math.nan, 2), "NaN"),
        (decimal(-math.inf, 2), "−∞"),
        (scientific(3.14e-7), "3.1e-7"),
        (scientific(0.0), "0"),
        (percent(0.987), "98.7 %"),
        (duration(4.24), "4.2 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(3725), "1 h 02 min"),
        (duration(200_000), "2 d 07 h"),
        (size(999), "999 B"),
        (size(1_500_000_000), "1.5 GB"),
        (change(40.0, 30.0), "−25.0 %"),
        (change(40.0, math.inf), ""),
        (change(None, 3.0), ""),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected


def test_summaries_are_plain_json(data):
    odd = replace(data, evaluations=(Evaluation("u", "s", 1, Scores(math.nan), None),), method="x")
    text = json.dumps(summarize(odd), allow_nan=False)
    assert json.loads(text)["evaluations"][0]["scores"]["val_loss"] is None
    assert BatchConfig(**json.loads(text)["settings"]["batch"]).tokens == 512
