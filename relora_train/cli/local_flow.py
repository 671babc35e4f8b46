"""Run an installed flow in this process: quiet, offline, nothing to set up or to stop.

Flows are found by name among the entry points of the group `relora_train.flows`; the library imports none of them and
no Prefect. People see events (events.py), warnings of the library, and the error that ends a run.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType
from typing import Any, cast

from relora_train.cli.local_server import API_URL, LocalServer, check_server, users_server
from relora_train.errors import ConfigError, OrchestratorError
from relora_train.process import NO_SERVER
from relora_train.storage.redaction import without_secrets

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


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived. Not an Exception: it passes through every retry and cleans up on its way."""

    exit_code = 128 + signal.SIGTERM


def run_flow(
    name: str,
    parameters: dict[str, Any],
    *,
    warnings: logging.Handler | None = None,
    verbose: bool = False,
    with_pages: Callable[[str], None] | None = None,
) -> Any:
    """Run a flow to its end and return its result; raises what the flow raised, KeyboardInterrupt or TerminatedError.

    warnings: gets the warnings of the library. with_pages: start a server of the run's own, and give it the address of
    its pages; the server is gone when this process is, even after SIGKILL.
    Uses the Prefect server that $PREFECT_API_URL names; else none, unless asked: then nothing is recorded beside the
    store. To be called from the main thread, once a process, before anything has imported Prefect.
    """
    set_orchestrator_environment(verbose=verbose)
    logger = logging.getLogger("relora_train")
    with _termination_raises():
        if named := users_server():
            check_server(named)
            os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "9")  # it may be away for ten minutes
            flow = load_installed(name)
        elif with_pages is not None:
            server = LocalServer()
            os.environ[API_URL] = server.api_url
            flow = load_installed(name)  # imports Prefect: a few seconds in which the server starts
            server.wait_until_ready()
            with_pages(server.api_url.removesuffix("/api"))
        else:
            os.environ |= {API_URL: NO_SERVER, "PREFECT_LOGGING_TO_API_ENABLED": "false"}
            flow = load_installed(name)
        if warnings is not None:
            logger.addHandler(warnings)  # Prefect's import sets up logging and drops the handlers it finds
        try:
            return load_installed("call", "relora_train.services")(flow, parameters)
        except Exception as error:
            if not any(kind.__module__ == "httpx" for kind in type(error).__mro__):
                raise
            raise OrchestratorError(
                f"Prefect's server at {without_secrets(os.environ[API_URL])} failed: "
                f"{str(error).strip().partition(chr(10))[0]}. If it is yours, look into its log. What is committed is "
                "kept: start again to go on."
            ) from error
        finally:
            if warnings is not None:
                logger.removeHandler(warnings)


def set_orchestrator_environment(*, verbose: bool) -> None:
    """Settings Prefect reads when it is imported. Settings of the user stay."""
    for variable, value in _QUIET_AND_OFFLINE.items():
        os.environ.setdefault(variable, value)
    level = os.environ.get("PREFECT_LOGGING_LEVEL")
    if level is None:  # who sets a level wants to see it
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "CRITICAL")
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    logging.getLogger("relora_train").setLevel(logging.DEBUG if (level or "").upper() == "DEBUG" else logging.INFO)
    logging.getLogger("relora_train.events").propagate = False  # two a second; the log tells of them every ten seconds


def load_installed(name: str, group: str = "relora_train.flows") -> Callable[..., Any]:
    """Return the flow, or the other entry point of a group of ours, that is installed under this name."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        raise ConfigError(
            f"{name!r} is none of the {group} that are installed ({', '.join(sorted(found)) or 'none'}). Install the "
            "package itself, with `pip install -e .` in a checkout, so that it can be found."
        )
    return cast(Callable[..., Any], found[name].load())


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
