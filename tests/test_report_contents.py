"""What a report says of a run beside its stages: the answer, the curves, the data, the work, the relatives."""

import base64
import json
import math
import re
import urllib.error
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from prefect_server import PREFECT_WARNS
from synthetic_run import commit_run, evaluation_of, synthetic_profile
from test_report import Page, page_of

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.checkpoints.manifest import CheckpointManifest
from relora_train.errors import ConfigError
from relora_train.method.schedule import learning_rate
from relora_train.method.stages import plan_stages
from relora_train.reports.against import compare_page, differing, paired_charts, report_against, side_by_side
from relora_train.reports.charts import Chart, Curve, logarithmic_ticks, ticks
from relora_train.reports.collect import collect_run_data
from relora_train.reports.relatives import relatives_of
from relora_train.reports.report import overview_markdown, report_run
from relora_train.reports.run_data import RunData, Sample, StageWork
from relora_train.reports.text import flops_text, headline_text, in_training_text
from relora_train.reports.training_charts import training_charts
from relora_train.reports.work import attempts_text, machine_text, stage_work, waited, wall_time_text
from relora_train.settings.method import ScheduleConfig
from relora_train.settings.running import PrecisionConfig
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store
from tasks.store import open_run_store

PROFILE = synthetic_profile()

pytestmark = PREFECT_WARNS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three cycles whose last checkpoint was scored on its own."""
    store = MemoryStore.shared("report-contents")
    line = commit_run(store, "run", PROFILE, tmp_path_factory.mktemp("scratch"), log_every=7)
    fetch = files_in_stores(tmp_path_factory.mktemp("cache"))
    scored = [evaluation_of(line[0], {}), evaluation_of(line[-1], {})]
    return store, line, collect_run_data(line, fetch, evaluations=scored, spectra=False)


def test_the_answer_is_the_final_evaluation_and_trainings_own_check_stands_beside_it(run, tmp_path):
    _, line, data = run
    final, own = data.evaluations[-1].scores.val_perplexity, line[-1].manifest.evaluation["val_perplexity"]
    assert abs(final - own) > 0.1
    assert headline_text(data) == (
        f"Validation perplexity is {final:,.2f} on 262,144 held-out tokens after cycle-3 (step 160). "
        f"It was {data.evaluations[0].scores.val_perplexity:,.2f} after warm-start."
    )
    assert f"said {own:,.2f}" in in_training_text(data)
    text = page_of(data, tmp_path).text
    assert text.index(f"{final:,.2f}") < text.index("Training loss") and f"in training {own:,.2f}" in text
    unscored = replace(data, evaluations=data.evaluations[:1])
    assert f"is {own:,.2f} after cycle-3" in headline_text(unscored)
    assert "has not scored" in in_training_text(unscored)


def test_the_rate_is_the_schedules_at_every_corner_and_not_that_of_the_few_logged_steps(run):
    _, _, data = run
    stages = plan_stages(PROFILE)
    by_step = {step: rate for stage in stages for step in range(stage.first_step, stage.end_step + 1)
               for rate in [learning_rate(PROFILE, stage, step)]}  # fmt: skip
    drawn = dict(zip(data.rates.steps.tolist(), data.rates.rates.tolist(), strict=True))
    assert drawn == {step: by_step[step] for step in drawn} and len(data.train) < 30
    for stage in stages:
        assert {stage.first_step, stage.first_step + 4, stage.end_step} <= set(drawn)
    (chart,) = [one for one in training_charts(data) if one.title == "Learning rate"]
    np.testing.assert_array_equal(chart.curves[0].y, data.rates.rates)
    assert chart.caption == "By the schedule of the settings."


def test_a_long_schedule_is_drawn_by_few_points(tmp_path):
    schedule = ScheduleConfig(warm_start_steps=3000, cycles=3, cycle_length=3000, warmup_steps=100)
    line = commit_run(MemoryStore.shared("long"), "run", synthetic_profile(schedule=schedule), tmp_path, log_every=500)
    data = collect_run_data(line, files_in_stores(tmp_path / "cache"), spectra=False)
    assert 1000 < len(data.rates.steps) < 1600 and {1, 101, 3001, 3101, 12_000} <= set(data.rates.steps.tolist())


def test_settings_of_another_version_leave_the_rate_as_it_was_logged(run, tmp_path):
    _, line, _ = run

    def fetch(ref, names):
        directory = files_in_stores(tmp_path / "cache")(ref, names)
        if "profile.json" not in names:
            return directory
        changed = tmp_path / ref.manifest.stage
        changed.mkdir(exist_ok=True)
        settings = json.loads((directory / "profile.json").read_text())
        if ref.manifest.stage == "cycle-1":
            settings["relora"]["of_tomorrow"] = 1
        (changed / "profile.json").write_text(json.dumps(settings))
        return changed

    data = collect_run_data(line, fetch, spectra=False)
    inside = (data.rates.steps > 40) & (data.rates.steps <= 80)
    logged = (data.train.step > 40) & (data.train.step <= 80)
    np.testing.assert_array_equal(data.rates.steps[inside], data.train.step[logged])
    np.testing.assert_array_equal(data.rates.rates[inside], data.train["learning_rate"][logged])
    assert data.rates.source.endswith("As logged: cycle-1.")
    assert data.stages[1].work.flops_per_token is None and data.stages[2].work.flops_per_token


def test_every_curve_is_in_the_page_with_its_numbers_and_its_places(run, tmp_path):
    _, _, data = run
    page = page_of(data, tmp_path)
    paths = [{name: value for _, name, value in part} for part in elements(page, "path")]
    rate = next(path for path in paths if path["data-label"] == "rate")
    xs = [int(x) for x in rate["data-xs"].split()]
    ys = [float(y) for y in rate["data-ys"].split()]
    assert xs == data.rates.steps.tolist()
    np.testing.assert_allclose(ys, data.rates.rates, rtol=1e-5, atol=1e-12)
    places = [tuple(map(float, at.split())) for at in re.findall(r"[ML]([\d. ]+)", rate["d"])]
    assert len(places) == len(xs)
    across, up = np.array(places).T
    np.testing.assert_allclose(across, 64 + np.array(xs) / 160 * 924, atol=0.06)  # to a tenth of a unit
    assert np.argmin(up) == np.argmax(ys) and up.max() <= 200 - 26 + 0.1
    titles = {curve.title for curve in training_charts(data)}
    assert titles == {"Training loss", "Learning rate", "Validation perplexity", "Gradient norm", "Tokens per second"}
    assert all(title in page.text for title in titles) and "cycle-2: steps 81–120" in page.text


def elements(page: Page, tag: str):
    """The attributes of each element of a kind: data-xs comes once in each."""
    found, part = [], []
    for item in page.attributes:
        if item[0] == tag and item[1] == "class":
            found.append(part := [])
        part.append(item)
    return [part for part in found if any(name == "data-xs" for _, name, _ in part)]


def test_a_curve_is_interrupted_where_it_has_no_value_and_a_step_without_one_is_marked(run):
    _, _, data = run
    curve = Curve("a", np.array([1, 2, 3, 4]), np.array([1.0, math.nan, 3.0, -1.0]), "c0")
    plain = Chart("t", "", [curve]).over(data.stages)
    assert [part[0] for part in re.findall(r"[ML][^ML]*", plain.path(curve))] == ["M", "M", "L"]
    logarithmic = Chart("t", "", [curve], logarithmic=True).over(data.stages)
    assert [part[0] for part in re.findall(r"[ML][^ML]*", logarithmic.path(curve))] == ["M", "M"]
    assert curve.values_text == "1 - 3 -1" and curve.steps_text == "1 2 3 4"


def test_axes_have_round_numbers():
    assert ticks(0, 160, 10) == [0, 20, 40, 60, 80, 100, 120, 140, 160]
    assert ticks(0.0021, 0.0049, 5) == [0.0025, 0.003, 0.0035, 0.004, 0.0045]
    assert ticks(4.13, 6.87, 5) == [4.5, 5.0, 5.5, 6.0, 6.5]
    assert logarithmic_ticks(0.3, 30, 5) == [0.5, 1, 2, 5, 10, 20]
    assert logarithmic_ticks(1e-6, 1, 5) == [10.0**power for power in range(-6, 1)]


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """That run, and one of two cycles from another seed."""
    schedule = ScheduleConfig(warm_start_steps=40, cycles=2, cycle_length=40, warmup_steps=4, restart_warmup_steps=4)
    profile, root = synthetic_profile(schedule=schedule, seed=7), tmp_path_factory.mktemp("other")
    line = commit_run(run[0], "other", profile, root / "scratch", log_every=7)
    fetch = files_in_stores(root / "cache")
    return run[2], collect_run_data(line, fetch, evaluations=[evaluation_of(line[-1], {})], spectra=False), line


def test_two_runs_are_compared_by_results_curves_and_every_setting_that_differs(two):
    ours, theirs, _ = two
    rows = {name: values for name, *values in side_by_side(ours, theirs)}
    final = [one.evaluations[-1].scores.val_perplexity for one in (ours, theirs)]
    moved = f"{100 * (final[0] / final[1] - 1):+,.1f} %".replace("-", "−")
    assert rows["Validation perplexity"] == [*(f"{value:,.2f}" for value in final), moved]
    assert rows["Steps"] == ["160", "120", "+33.3 %"] and rows["Merges"][:2] == ["3", "2"]
    assert rows["Tokens"][:2] == [f"{steps * 512:,}" for steps in (160, 120)]
    assert rows["Machine"] == ["–", "–", ""]
    assert differing(ours, theirs) == [("schedule.cycles", "3", "2"), ("seed", "0", "7")]
    charts = {chart.title: chart for chart in paired_charts(ours, theirs)}
    assert {"Training loss", "Learning rate", "Validation perplexity", "Tokens per second"} == set(charts)
    for chart in charts.values():
        named = [curve for curve in chart.curves if curve.label]
        assert [(curve.label, curve.look.split()[0]) for curve in named] == [("run", "c0"), ("other", "c1")]
    rates = [curve.y for curve in charts["Learning rate"].curves]
    np.testing.assert_array_equal(rates[1], theirs.rates.rates)
    scores = [curve for curve in charts["Validation perplexity"].curves if curve.label]
    assert scores[1].y[-1] == theirs.stages[-1].after.val_perplexity, "scores after the stages, not before them"
    page = compare_page(theirs, ours)
    assert "different data" not in page and "Shaded: the stages of run." in page
    assert "different data" in compare_page(ours, replace(theirs, dataset_id="e" * 64))


def test_a_comparison_is_stored_beside_the_first_run(two, run, monkeypatch, tmp_path):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    store, line, _ = run
    written = report_against(line, two[2], lambda line: [evaluation_of(line[-1], {})], store)
    assert written.html_uri == f"{store.uri}/runs/run/report/against-other.html"
    page = store.get_bytes("runs/run/report/against-other.html")[0].decode()
    assert "Settings that differ" in page and "script-src" in page
    assert json.loads(json.dumps(written.summary, allow_nan=False))["settings"]["seed"] == ["0", "7"]


def test_what_older_runs_did_not_record_is_a_dash_and_not_a_number(run, tmp_path):
    _, _, data = run
    work = data.stages[0].work
    assert (attempts_text(work), machine_text(work), work.peak_bytes, work.mfu) == ("–", "–", None, None)
    assert work.flops_per_token > 0 and work.tokens_per_second == pytest.approx(1024, rel=0.1)
    text = page_of(data, tmp_path).text
    assert re.search(r"Command\s*–", text) and re.search(r"Commit\s*–", text)


def manifest_ending(minute: int, seconds: float) -> CheckpointManifest:
    base = {"files": (), "attempt": "a", "run_id": "r", "profile": "p", "stage": "cycle-1", "step": 1, "cycle": 1}
    more = {"tokens_seen": 1, "fingerprint": "f" * 64, "parent": None, "dataset_id": "d", "dataset_uri": "d"}
    settings = {"stage.kind": "relora"}
    when = datetime(2026, 1, 2, 3, minute, tzinfo=UTC)
    return CheckpointManifest(**base, **more, fingerprint_settings=settings, created_at=when, stage_seconds=seconds)


def test_attempts_machine_memory_speed_and_the_gaps_between_stages_are_told(run):
    _, _, data = run
    at = "2026-01-02T03:{}0:00+00:00"
    where = {"kind": "attempt", "device": "NVIDIA H100 80GB HBM3"}
    attempts = [
        {**where, "step": 0, "at": at.format(0), "ranks": 4},
        {**where, "step": 250, "at": at.format(2), "ranks": 8},
    ]
    speeds = [{"kind": "train", "step": i, "tokens_per_second": speed} for i, speed in enumerate((1e6, 3e6, 2e6))]
    profile = synthetic_profile(precision=PrecisionConfig(dtype="bfloat16"))
    records = [*attempts, *speeds, {"kind": "memory", "step": 9, "peak_bytes": 7}]
    work = stage_work(manifest_ending(30, 600.0), records, profile)
    assert attempts_text(work) == "2, resumed at step 250" and machine_text(work) == "NVIDIA H100 80GB HBM3 × 8"
    assert (work.peak_bytes, work.tokens_per_second, work.peak_flops) == (7, 2e6, 8 * 989e12)
    assert work.mfu == pytest.approx(work.flops_per_token * 2e6 / (8 * 989e12))
    assert work.began == datetime(2026, 1, 2, 3, 0, tzinfo=UTC), "20 minutes were lost before the second attempt"
    unknown = stage_work(manifest_ending(30, 600.0), [dict(attempts[0], device="Some CPU")], profile)
    assert unknown.mfu is None and stage_work(manifest_ending(30, 600.0), records, PROFILE).mfu is None  # float32

    def row(work: StageWork, seconds: float):
        return replace(data.stages[0], work=work, seconds=seconds)

    first, second = row(work, 600.0), row(stage_work(manifest_ending(50, 600.0), [], PROFILE), 600.0)
    assert waited(first, second) == 600.0
    said = wall_time_text([first, second])
    assert said.startswith("50 min 00 s (2026-01-02 03:00 to 2026-01-02 03:50 UTC): 20 min 00 s in stages, 30 min 00 s")


def test_flop_rates_have_their_unit():
    assert [flops_text(value) for value in (None, 3e6, 1.34e10, 4.12e14, 2e15)] == [
        "–",
        "3 M",
        "13.4 G",
        "412 T",
        "2 P",
    ]


def test_parent_siblings_and_branches_of_a_run_are_named(tmp_path):
    store = MemoryStore.shared("relatives")
    warm, *cycles = plan_stages(PROFILE)

    def commit(run_id: str, parent, stages, seed=0):
        return commit_run(store, run_id, synthetic_profile(seed=seed), tmp_path / run_id, parent=parent, stages=stages)

    (root,) = commit("root", None, [warm])
    line = commit("ours", root, cycles[:2], seed=1)
    commit("sibling", root, cycles[:1], seed=2)
    commit("branch", line[0], cycles[1:2], seed=3)
    commit("stranger", None, [warm], seed=4)
    ties = {row.run_id: row.tie.partition(":")[0] for row in relatives_of(store, [root, *line], "ours")}
    assert ties == {"root": "parent", "sibling": "sibling", "branch": "branch"}
    assert {row.run_id for row in relatives_of(store, [root], "root")} == {"ours", "sibling"}
    cousins = relatives_of(store, [root, *line, *commit("later", line[1], cycles[2:], seed=6)], "later")
    assert {row.run_id: row.tie.partition(":")[0] for row in cousins} == {"ours": "parent"}, (
        "branches of a parent's past"
    )
    assert relatives_of(store, commit("alone", None, [warm], seed=5), "alone") == ()


def test_the_data_section_says_what_there_is_what_was_read_and_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from stage_runs import tiny_profile
    from stored_runs import Workshop

    from relora_train.reports.sources import data_read

    workshop = Workshop(tmp_path / "store", monkeypatch)
    profile = tiny_profile()
    line = workshop.train(profile)
    fetch = files_in_stores(tmp_path / "cache")
    facts = dict(data_read(line[-1], fetch)["data_facts"])
    manifest = workshop.dataset.manifest
    read = line[-1].manifest.tokens_seen
    assert facts["Dataset"] == line[-1].manifest.dataset_uri
    assert facts["Read by training"] == f"{read:,} tokens, {read / manifest.train_tokens:,.2f} epochs"
    assert f"{manifest.train_tokens:,} tokens" in facts["Training part"]
    per_token = (manifest.train_bytes + manifest.val_bytes) / (manifest.train_tokens + manifest.val_tokens)
    assert facts["Compression"].startswith(f"{per_token:,.2f} bytes a token")
    records = [
        json.loads(text) for text in (fetch(line[-1], ["metrics.jsonl"]) / "metrics.jsonl").read_text().splitlines()
    ]
    (attempt,) = [record for record in records if record["kind"] == "attempt"]
    assert attempt["step"] == line[-2].step and attempt["ranks"] == 1 and "cores" in attempt["device"]
    assert {"command"} <= line[-1].manifest.provenance.keys()


def test_duplicates_and_empty_documents_are_counted(run):
    from relora_train.checkpoints.manifest import DatasetManifest
    from relora_train.reports.sources import dataset_facts

    counts = {f"{split}_{what}": 10 for split in ("train", "val") for what in ("tokens", "documents", "bytes")}
    manifest = DatasetManifest(
        files=(), attempt="a", name="n", dataset_id="d" * 64, inputs={}, token_dtype="uint16", vocab_size=300, eos_id=0,
        statistics={"duplicate_documents": 1234, "empty_documents": 1}, **counts,
    )  # fmt: skip
    facts = dict(dataset_facts(manifest))
    assert facts["Dropped"] == "1,234 duplicate documents, 1 empty document"
    assert "Dropped" not in dict(dataset_facts(manifest.model_copy(update={"statistics": {}})))
    assert isinstance(run[2], RunData)


def test_the_overview_shows_evaluations_and_what_the_last_model_writes_as_text(run):
    samples = tuple(
        Sample(stage, step, "def f(`x`):", text)
        for stage, step, text in (("cycle-3", 160, "\n```\n# no heading <b>\x1b[31m"), ("warm-start", 40, "earlier"))
    )
    markdown = overview_markdown(replace(run[2], samples=samples), b"png", "place\n\n")
    assert markdown.index("place") < markdown.index("data:image/png")
    final = run[2].evaluations[-1].scores
    assert f"| cycle-3 | 160 | {final.val_perplexity:,.2f} | {final.bits_per_byte:,.3f} | 262,144 |" in markdown
    assert markdown.endswith("    def f(`x`):\n    ```\n    # no heading <b>\ufffd[31m\n") and "earlier" not in markdown


def test_a_report_in_s3_is_opened_by_its_link_and_by_nobody_without(
    s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    store = open_store(s3_store_uri)
    line = commit_run(store, "linked", PROFILE, tmp_path / "scratch", stages=plan_stages(PROFILE)[:1])
    plain = report_run(line, [], store, "linked")
    overview = base64.b64encode(store.get_bytes("runs/linked/report/overview.png")[0]).decode()
    assert f"(data:image/png;base64,{overview})" in plain.markdown
    assert plain.link is None and "Open the report" not in plain.markdown and f"`{plain.html_uri}`" in plain.markdown
    monkeypatch.setenv("RELORA_REPORT_LINK_HOURS", "0.5")
    written = report_run(line, [], store, "linked")
    assert f"[Open the report]({written.link}), for 0.5 hours from " in written.markdown
    with urllib.request.urlopen(written.link, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/html"
        assert answer.read() == store.get_bytes("runs/linked/report/report.html")[0]
    assert "X-Amz-Expires=1800" in written.link
    for refused in (written.link.partition("?")[0], written.link.replace("X-Amz-Expires=1800", "X-Amz-Expires=9999")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(refused, timeout=60)
    assert MemoryStore.shared("no-links").page_link("a.html", 60) is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "169", "nan"])
def test_a_time_that_no_link_can_last_is_refused_before_a_run(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RELORA_REPORT_LINK_HOURS", text)
    with pytest.raises(ConfigError, match="RELORA_REPORT_LINK_HOURS"):
        open_run_store.fn("memory://never-opened")
