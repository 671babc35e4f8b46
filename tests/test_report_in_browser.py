"""The report's own script in a browser tells the numbers under the pointer, and enlarges the steps that are chosen.

Nothing here runs JavaScript without Chromium, and nothing of the script is then proven: the file is skipped.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, pointed
from synthetic_run import commit_run, evaluation_of, synthetic_profile

from relora_train.checkpoints.fetch import files_in_stores
from relora_train.reports.charts import Chart, Curve, logarithmic_ticks, ticks
from relora_train.reports.collect import collect_run_data
from relora_train.reports.report import render_page
from relora_train.reports.training_charts import training_charts
from relora_train.storage.memory import MemoryStore

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed, and nothing else runs JavaScript")

LEFT, WIDTH, STEPS = 64, 924, 160
ROUNDED = 0.051
"""Places are written with one digit after the point, in a picture 1000 wide."""


def points(curve: Curve) -> dict[int, float]:
    """Return what is drawn of a curve, as the page holds it."""
    return {x: float(f"{y:.6g}") for x, y in curve.points if math.isfinite(y)}


def told(chart: Chart, at: float, first: int = 0, last: int = STEPS) -> tuple[int, str]:
    """Return the step that the pointer is nearest to, and what the box says there, of a chart of these steps."""
    lines, nearest = list[str](), -1
    for curve in chart.curves:
        inside = {x: y for x, y in points(curve).items() if first <= x <= last}
        if curve.label and inside:
            step = min(inside, key=lambda x: abs(x - at))
            nearest = step if nearest < 0 else nearest
            lines.append(f"{curve.label} {float(f'{inside[step]:.4g}'):,g}{'' if step == nearest else f' at {step}'}")
    return nearest, "\n".join([f"step {nearest}", *lines])


def limits(chart: Chart, first: int, last: int) -> tuple[float, float]:
    """Return where the y axis of a chart ends that shows these steps, enlarged: its values there fill the height."""
    inside = [y for curve in chart.curves for x, y in points(curve).items() if first <= x <= last]
    if chart.logarithmic:
        return min(inside) / 1.1, max(inside) * 1.1
    room = 0.06 * (max(inside) - min(inside)) or 0.1 * max(inside)
    return min(inside) - room, max(inside) + room


def places(chart: Chart, first: int, last: int) -> list[list[float]]:
    """Return where the points of a chart lie that shows these steps, enlarged."""
    scaled = math.log10 if chart.logarithmic else float
    low, high = map(scaled, limits(chart, first, last))
    foot, top = chart.height - 26, 24
    return [
        [LEFT + (x - first) / (last - first) * WIDTH, foot - (scaled(y) - low) / (high - low) * (foot - top)]
        for curve in chart.curves
        for x, y in points(curve).items()
    ]


def test_the_box_tells_the_nearest_point_and_a_drag_enlarges_its_steps_in_all_charts(tmp_path: Path):
    line = commit_run(MemoryStore.shared("in-a-browser"), "run", synthetic_profile(), tmp_path / "scratch")
    evaluations = [evaluation_of(line[0], {}), evaluation_of(line[-1], {})]
    data = collect_run_data(line, files_in_stores(tmp_path / "cache"), evaluations=evaluations, spectra=False)
    charts = training_charts(data)
    titles = [chart.title for chart in charts]
    loss, scores, norms = map(titles.index, ("Training loss", "Validation perplexity", "Gradient norm"))

    def drag(*steps: float) -> list[Any]:
        moves = [["pointermove", step / STEPS] for step in steps]
        return [loss, ["pointerdown", steps[0] / STEPS], *moves, ["pointerup", steps[-1] / STEPS]]

    over = [(loss, 57.4), (loss, 56.6), (loss, 160), (loss, 0), (scores, 81), (scores, 150), (norms, 30), (norms, 83)]
    whole = [[number, ["pointermove", step / STEPS]] for number, step in over]
    near = [(number, step) for number in (loss, norms) for step in (50, 74.6, 100)] + [(scores, 50)]
    close = [[number, ["pointermove", (step - 50) / 50]] for number, step in near]
    up = [loss, ["pointerup", 0.9]]
    nothing = [[loss, ["pointerleave", 0.5]], up, drag(50.1, 51.9), up]
    given = [*whole, *nothing, drag(99.4, 70, 50.6), *close, [loss, ["dblclick", 0.5]], *whole]
    seen = pointed(render_page(data, {}), given, tmp_path)
    assert seen[-1]["errors"] == []

    def at_each(found: list[dict[str, Any]], asked: list[tuple[int, float]], first: int, last: int) -> None:
        """Check the box's words and place and the line below it, for each place of the pointer."""
        for each, (number, step) in zip(found, asked, strict=True):
            nearest, words = told(charts[number], step, first, last)
            assert each["tip"] == words
            place = LEFT + (nearest - first) / (last - first) * WIDTH
            assert each["hair"] == pytest.approx([place, place], abs=ROUNDED)
            (x, y), (left, right, top, width) = each["at"], each["box"]
            assert top == pytest.approx(y + 16, abs=1)
            assert left == pytest.approx(min(x + 14, width - 8 - (right - left)), abs=1)

    at_each(seen[:8], over, 0, STEPS)
    left_alone = seen[8:12]
    assert left_alone[0]["tip"] is None
    assert all(each["points"] == seen[0]["points"] for each in left_alone)

    drawn = seen[12]
    for chart, found in zip(charts, drawn["points"], strict=True):
        np.testing.assert_allclose(found, places(chart, 50, 100), atol=ROUNDED, err_msg=chart.title)
    assert seen[0]["pieces"] == drawn["pieces"] == [1, 4]  # each record, and the mean of each stage
    assert drawn["steps"] == [str(step) for step in range(50, 101, 5)]
    half = WIDTH / 50
    assert drawn["merges"] == pytest.approx([LEFT + (step - 50) * half for step in (80, 120, 160)])
    np.testing.assert_allclose(drawn["bands"], [[LEFT, 30 * half], [LEFT + 30 * half, 20 * half]])
    at_each(seen[13:20], near, 50, 100)

    for number, between in ((loss, ticks), (norms, logarithmic_ticks)):
        values = seen[13 + [chart for chart, _ in near].index(number)]["values"]
        assert [float(value) for value in values] == pytest.approx(between(*limits(charts[number], 50, 100), 5))

    for chart, found, before in zip(charts, seen[20]["points"], seen[0]["points"], strict=True):
        np.testing.assert_allclose(found, before, atol=2 * ROUNDED, err_msg=chart.title)  # what the page came with
    at_each(seen[21:], over, 0, STEPS)
    for again, before in zip(seen[21:], seen, strict=False):
        assert (again["steps"], again["values"]) == (before["steps"], before["values"])
