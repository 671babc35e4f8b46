"""The pictures of the README: `python tests/screenshots.py [DIRECTORY [WORK]]`, with Chromium and tmux installed.

Starts a real Prefect server on loopback, runs the quickstart in a terminal, and takes its loss, the top of its report,
its timeline in the server's pages, and the terminal at the end. Some four minutes. For people; no test looks at them.
WORK, an empty directory, is what paths in the pictures show.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import CHROMIUM, chromium
from prefect_server import serving_prefect
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINES = 100, 30
_RENDER_MILLISECONDS = 20_000
_WAIT_SECONDS = 1_800
_PAGE = (
    "<!DOCTYPE html><body style='margin:0;padding:14px;background:#0c0c0c'><pre style='{look}'>{{code}}</pre></body>"
)
_LOOK = "font:15px/1.25 DejaVu Sans Mono,monospace;color:#d0d0d0;margin:0"


def main() -> None:
    directory = Path((sys.argv[1:] or [ROOT / "tests" / "screenshots"])[0]).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name, there in (("Chromium", CHROMIUM), ("tmux", shutil.which("tmux"))) if there is None]
    if missing:
        sys.exit(f"This needs {' and '.join(missing)} in the path.")
    with tempfile.TemporaryDirectory(prefix="relora-screenshots-") as scratch:
        work = Path((sys.argv[2:] or [scratch])[0]).resolve()
        with serving_prefect(work / "server") as prefect:
            screen = screen_after(
                [sys.executable, "-m", "relora_train.cli.app", "run", "quickstart", "--run-id", "quickstart"],
                work,
                {
                    "PYTHONPATH": str(ROOT),
                    "PREFECT_API_URL": prefect.api_url,
                    "PREFECT_HOME": str(work / "client"),
                    "RELORA_CACHE": str(work / "cache"),
                    "RELORA_STORE": "relora-store",
                },
            )
            report = work / "relora-store" / "runs" / "quickstart" / "report"
            (run,) = prefect.post("/flow_runs/filter", sort="START_TIME_DESC", limit=1)
            shutil.copy(report / "loss.png", directory / "loss.png")
            take(directory / "report.png", (report / "report.html").as_uri(), width=1100, height=1000)
            page = f"{prefect.api_url.removesuffix('/api')}/runs/flow-run/{run['id']}"
            take(directory / "timeline.png", page, width=1400, height=900)
            (work / "screen.html").write_text(screen)
            take(directory / "terminal.png", (work / "screen.html").as_uri(), width=960, height=20 * LINES)


def screen_after(command: list[str], work: Path, environment: dict[str, str]) -> str:
    """Return the terminal in which a command has run to its end, as HTML with its colours."""
    tmux = ["tmux", "-S", str(work / "tmux")]
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    variables = [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]
    done = work / "done"
    line = f"echo '$ relora run quickstart'; {shlex.join(command)}; echo $? > {done}; sleep {_WAIT_SECONDS}"
    subprocess.run([*tmux, "-f", os.devnull, "new-session", "-d", *size, *variables, "-c", work, line], check=True)
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(1)
        whole = [*tmux, "capture-pane", "-p", "-e", "-S", "-"]
        captured = subprocess.run(whole, check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    # To rich the terminal's default colours are black on white, whatever the page has.
    plain = captured.replace("\x1b[39m", "\x1b[0m").replace("\x1b[49m", "")
    console.print(Text.from_ansi("\n".join(plain.splitlines()[:LINES])))
    return console.export_html(inline_styles=True, code_format=_PAGE.format(look=_LOOK))


def take(path: Path, url: str, *, width: int, height: int) -> None:
    """Save a picture of a page."""
    size = f"--window-size={width},{height}"
    chromium(url, size, f"--virtual-time-budget={_RENDER_MILLISECONDS}", f"--screenshot={path}")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
