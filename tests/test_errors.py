"""What is tried again: the one rule, over errors as they really come."""

import concurrent.futures
import importlib
import json
import logging
from collections.abc import Callable

import pytest

from relora_train.errors import (
    ConfigError,
    DeviceMemoryError,
    StoreUnavailableError,
    TrainerCrashedError,
    TrainerFaultError,
    may_pass,
)


def raised_by(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def refused_connection_as_value_error() -> None:
    try:
        raise ConnectionRefusedError("nobody there")
    except ConnectionRefusedError as error:
        raise ValueError("cannot load the file") from error


def key_error_after_a_missing_file_that_was_handled() -> None:
    try:
        raise FileNotFoundError("no cache yet")
    except FileNotFoundError:
        raise KeyError("a name") from None


@pytest.mark.parametrize(
    "error",
    [
        raised_by(lambda: __import__("a_package_that_is_not_installed")),
        raised_by(lambda: compile("def", "x", "exec")),
        raised_by(lambda: {}["x"]),
        raised_by(lambda: [][0]),
        raised_by(lambda: int("x")),
        raised_by(lambda: len(1)),  # type: ignore[arg-type]
        raised_by(lambda: None.x),  # type: ignore[attr-defined]
        raised_by(lambda: 1 / 0),
        raised_by(lambda: b"\xff".decode()),
        raised_by(key_error_after_a_missing_file_that_was_handled),
        NotImplementedError("quantised"),
        RecursionError("too deep"),
        AssertionError("shapes"),
        KeyboardInterrupt(),
        SystemExit(1),
        ConfigError("a setting"),
        TrainerFaultError("KeyError"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_follows_from_code_and_settings_is_not_tried_again(error: BaseException):
    assert not may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        raised_by(lambda: json.loads('{"cut')),
        raised_by(refused_connection_as_value_error),
        ConnectionResetError("peer"),
        TimeoutError("slow"),
        OSError(5, "Input/output error"),
        EOFError("cut off"),
        MemoryError(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        concurrent.futures.BrokenExecutor("a worker died"),
        type("ServerError", (Exception,), {})("another package's"),
        TrainerCrashedError("killed"),
        StoreUnavailableError("away"),
        DeviceMemoryError("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_system_a_device_or_another_process_reports_gets_another_chance(error: BaseException):
    assert may_pass(error)


def test_prefect_logs_an_error_of_ours_without_a_traceback_and_any_other_with_one():
    importlib.import_module("tasks.observe")
    logger = logging.getLogger("prefect.flow_runs")  # its handlers would send the record to a server
    for error, shown in ((ConfigError("correct it"), "correct it"), (ValueError("a fault"), "an exception")):
        record = logger.makeRecord("x", logging.ERROR, "x", 1, "an exception", (), (type(error), error, None))
        assert logger.filter(record)
        assert (record.getMessage(), bool(record.exc_info)) == (shown, isinstance(error, ValueError))
