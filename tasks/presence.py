"""Keep what Prefect's server says of a deployed flow run true, also after the server was away."""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.runtime import deployment
from prefect.states import Running

LOOK_SECONDS = 10.0

_UNHEARD_LOOKS = 9
"""Prefect passes a cancellation on within 20 seconds, and kills after 30 more; unless its observer gave up."""

_log = logging.getLogger("relora_train.presence")


@contextmanager
def present() -> Iterator[None]:
    """Look at the state of the flow run around us every few seconds, for the length of the block.

    1. A run that was marked Crashed because its signs of life did not arrive is Running again.
    2. A cancellation that nobody passes on stops the run all the same: it saves a snapshot, and ends as Crashed.
    Runs without a deployment are left alone: nobody marks or cancels them.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or not deployment.id:
        yield
        return
    ended = threading.Event()
    in_run = contextvars.copy_context().run  # its settings and its log
    args = (_look_regularly, context.flow_run.id, ended)
    threading.Thread(target=in_run, args=args, name="presence", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _look_regularly(flow_run_id: UUID, ended: threading.Event) -> None:
    unheard = 0
    while not ended.wait(LOOK_SECONDS):
        try:
            with get_client(sync_client=True) as client:
                run: FlowRun = client.read_flow_run(flow_run_id)
                state = run.state
                if state is None or ended.is_set():
                    continue
                if state.is_crashed():
                    client.set_flow_run_state(
                        flow_run_id, Running(message="It lives: its signs of life did not arrive.")
                    )
                    _log.warning("this run was marked Crashed (%s) and goes on: it is Running again", state.message)
                unheard = unheard + 1 if state.is_cancelling() else 0
                if unheard >= _UNHEARD_LOOKS:
                    _log.warning("nobody passed on that this run is to be cancelled: it stops itself")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
        except Exception as error:
            _log.info("the state of this run is not known (%s)", type(error).__name__)
