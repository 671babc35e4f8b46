"""Run an installed flow in this process with a Prefect server of its own: quiet, offline, nothing to set up or to stop.

Flows are found by name among the entry points of the group `relora_train.flows`; the library imports none of them and
no Prefect. What Prefect logs goes to its own database; what a person needs to see comes as events (events.py), as
warnings of the library, and as the error that ends a run.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType
from typing import Any

from relora_train.cli.local_server import check_server, start_local_server
from relora_train.errors import ConfigError, OrchestratorError
from relora_train.storage.redaction import without_secrets

FLOWS_GROUP = "relora_train.flows"

_QUIET_AND_OFFLINE = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # Prefect keeps the error of a failed flow: no pickle of it
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "relora_train",
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",  # of Prefect's internals, straight to standard error
}
_API_URL = "PREFECT_API_URL"
_NO_PROXY = "NO_PROXY"
_CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
_RETRY_MESSAGE = "Task run failed with %s: %r - Retry"


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived. Not an Exception: it passes through every retry and cleans up on its way."""

    exit_code = 128 + signal.SIGTERM


def run_flow(
    name: str,
    parameters: dict[str, Any],
    *,
    on_notice: Callable[[str], None] | None = None,
    verbose: bool = False,
) -> Any:
    """Run a flow to its end and return its result; raises what the flow raised, KeyboardInterrupt or TerminatedError.

    on_notice: gets warnings of the library and announced retries, one line each.
    Uses the Prefect server that $PREFECT_API_URL names, else one that is gone when this process is, even after SIGKILL.
    To be called from the main thread, once a process, before anything has imported Prefect.
    """
    set_orchestrator_environment(verbose=verbose)
    with _termination_raises():
        if users_server := os.environ.get(_API_URL):
            check_server(users_server)
            os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "9")  # it may be away for ten minutes
            flow = load_flow(name)
        else:
            server = start_local_server()
            os.environ[_API_URL] = server.api_url
            flow = load_flow(name)  # imports Prefect: a few seconds in which the server starts
            server.wait_until_ready()
        with _notices_to(on_notice):
            try:
                return flow(**parameters)
            except Exception as error:
                if any(kind.__module__ == "httpx" for kind in type(error).__mro__):
                    server_url = without_secrets(os.environ[_API_URL])
                    raise OrchestratorError(
                        f"Prefect's server at {server_url} failed: {_first_line(str(error))}. If it is yours, look "
                        "into its log. What is committed is kept: start again to go on."
                    ) from error
                raise


def set_orchestrator_environment(*, verbose: bool) -> None:
    """Settings Prefect reads when it is imported. Settings of the user stay."""
    for variable, value in _QUIET_AND_OFFLINE.items():
        os.environ.setdefault(variable, value)
    if "PREFECT_LOGGING_LEVEL" not in os.environ:  # who sets a level wants to see it
        os.environ.setdefault(_CONSOLE_LEVEL, "INFO" if verbose else "CRITICAL")
    os.environ[_NO_PROXY] = ",".join(filter(None, [os.environ.get(_NO_PROXY), "127.0.0.1"]))
    debug = os.environ.get("PREFECT_LOGGING_LEVEL", "").upper() == "DEBUG"
    logging.getLogger("relora_train").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("relora_train.events").propagate = False  # two a second; the log tells of them every ten seconds


def load_flow(name: str) -> Callable[..., Any]:
    """Return the installed flow of this name."""
    found = {entry.name: entry for entry in entry_points(group=FLOWS_GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"No flow {name!r} is installed (installed: {known}). Install the package itself, with "
            "`pip install -e .` in a checkout, so that its flows can be found."
        )
    flow: Callable[..., Any] = found[name].load()
    return flow


@contextmanager
def _notices_to(show: Callable[[str], None] | None) -> Iterator[None]:
    """To be entered after Prefect's import, which sets up logging and drops the handlers it finds."""
    if show is None:
        yield
        return
    handler = _Notices(show)
    loggers = [logging.getLogger("relora_train"), logging.getLogger("prefect.task_runs")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Notices(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _retry_notice(record) or _warning(record)
            if line:
                self._show(line)
        except Exception:
            self.handleError(record)


def _retry_notice(record: logging.LogRecord) -> str | None:
    if not (isinstance(record.args, tuple) and str(record.msg).startswith(_RETRY_MESSAGE) and len(record.args) == 5):
        return None
    _, error, retry, retries, when = record.args
    task = getattr(record, "task_run_name", "a task")
    seconds = str(when).removesuffix(" second(s) from now")
    pause = seconds if seconds == when else f"in {float(seconds):.0f} s"
    return f"{task} failed: {_first_sentence(str(error))} Retry {retry} of {retries} {pause}."


def _warning(record: logging.LogRecord) -> str | None:
    is_ours = record.name.startswith("relora_train") and record.levelno >= logging.WARNING
    return _first_line(record.getMessage()) if is_ours else None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _first_sentence(text: str) -> str:
    return _first_line(text).partition(". ")[0].removesuffix(".") + "."


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block in order, with TerminatedError, instead of the process on the spot."""
    previous: dict[signal.Signals, Any] = {}
    arrived: list[str] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number).name)
        raise TerminatedError(arrived[0])

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # ignored under nohup: then it stays so
            previous[number] = signal.signal(number, terminate)
    try:
        yield
    except Exception as error:
        if arrived:  # inside matplotlib's C++ it comes out as ValueError("Invalid bounding box")
            raise TerminatedError(arrived[0]) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
