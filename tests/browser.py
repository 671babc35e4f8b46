"""Chromium without a window, if it is installed: pictures of pages, and what a page's own script does in one."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

POINTER = """
const errors = [], charts = [...document.querySelectorAll("svg.chart")], tip = document.querySelector(".tip");
addEventListener("error", (event) => errors.push(event.message));
const words = (nodes) => [...nodes].map((node) => node.textContent);
const places = (curve) => curve.tagName === "g"
  ? [...curve.children].map((dot) => [+dot.getAttribute("cx"), +dot.getAttribute("cy")])
  : [...curve.getAttribute("d").matchAll(/[ML]([-.0-9]+) ([-.0-9]+)/g)].map((found) => [+found[1], +found[2]]);
const point = (chart, type, part) => {
  const svg = charts[chart], [left, right, top, foot] = svg.dataset.box.split(" ").map(Number);
  const at = new DOMPoint(left + part * (right - left), (top + foot) / 2).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent(type, { clientX: at.x, clientY: at.y, pointerId: 1, bubbles: true }));
  return [at.x + scrollX, at.y + scrollY];
};
const seen = given.map(([chart, ...events]) => {
  let at = [];
  for (const [type, part] of events) at = point(chart, type, part);
  const box = tip.getBoundingClientRect(), hair = charts[chart].querySelector(".hair");
  return {
    at, errors, tip: tip.hidden ? null : tip.textContent,
    box: [box.left + scrollX, box.right + scrollX, box.top + scrollY, document.documentElement.clientWidth],
    hair: [+hair.getAttribute("x1"), +hair.getAttribute("x2")],
    points: charts.map((svg) => [...svg.querySelectorAll(".curves > [data-xs]")].flatMap(places)),
    pieces: [...charts[chart].querySelectorAll(".curves > path")].map(
      (path) => path.getAttribute("d").match(/M/g).length),
    steps: words(charts[chart].querySelectorAll(".x text")), values: words(charts[chart].querySelectorAll(".y text")),
    merges: [...charts[chart].querySelectorAll("line.merge")].map((line) => +line.getAttribute("x1")),
    bands: [...charts[chart].querySelectorAll("rect")].filter((rect) => rect.style.display !== "none").map(
      (rect) => [+rect.getAttribute("x"), +rect.getAttribute("width")]),
  };
});
document.body.appendChild(document.createElement("pre")).id = "seen";
document.getElementById("seen").textContent = JSON.stringify(seen);
"""
"""Does what `given` says and writes down what is then to be seen. A part is a place on a chart: 0 left, 1 right."""


def chromium(url: str, *options: str) -> str:
    """Open a page and return what the browser prints. Needs CHROMIUM."""
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *common, f"--user-data-dir={profile}", *options, url]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
        )
    return done.stdout


def pointed(page: str, given: list[list[Any]], directory: Path) -> list[dict[str, Any]]:
    """Return what a report's page shows after each of these: the number of a chart, then events and their parts."""
    copy = directory / "pointed.html"
    copy.write_text(with_pointer(page, given))
    found = re.search('<pre id="seen">(.*?)</pre>', chromium(copy.as_uri(), "--dump-dom"), re.DOTALL)
    assert found, "the page's policy or its script kept the test's script from its end"
    return list(json.loads(html.unescape(found[1])))


def with_pointer(page: str, given: list[list[Any]]) -> str:
    """Return the page with a script after its own; the page's policy stands but for that one's digest."""
    script = f'"use strict"; const given = {json.dumps(given)};{POINTER}'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.count("script-src 'sha256-") == 1
    allowed = page.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-")
    return allowed.replace("</body>", f"<script>{script}</script></body>")
