"""One stream of events from the work to whoever shows it: log lines, progress bars, artifacts.

An event is a flat JSON object with the key "event". The trainer process writes each as one line of its standard
output. An ASCII record separator (RFC 7464) marks it, so that a library's stray print is never taken for one.
Inside a process events travel as log records of the logger `relora_train.events`, in the attribute `event`.

    stage_started    stage kind start_step end_step pid device ranks parameters trainable_parameters products
                     matmul (with matmul_precision 'auto': what it stands for)
    joined           run_id stage ranks (from a machine beside the flow's)
    resumed          stage step snapshot
    snapshot_committed  stage step directory stall_seconds write_seconds size_bytes
    snapshot_failed  stage step message
    stopping         seconds (the worker was asked to stop and has so long)
    progress         stage step start_step end_step loss learning_rate tokens_per_second data_wait_share
                     eta_seconds
    evaluation       stage step when ('before' | 'after') and the scores: of text val_loss val_perplexity bits_per_byte
                     val_tokens, of other objectives those that settings/objectives.py names
    merge            stage step cycle max_relative_output_change relative_update_norm effective_rank
                     optimizer_state_zeroed first_lora_A_grad_norm first_lora_B_grad_norm
    stage_committed  stage step directory seconds (of its parts: load evaluate_before steps merge evaluate_after write)
    failed           error message
    warning          message (of a worker process; its parent logs it as its own)
    dataset_ready    uri name reused train_tokens val_tokens unit ('tokens' | 'images')
    tokenize_progress  phase done_bytes total_bytes (total may be null) megabytes_per_second
    stage_skipped    stage step uri
    stage_finished   stage step uri seconds and the first score (uri null: stored while later stages train)
    checkpoint_stored  stage step uri seconds (since it was trained; only after a stage_finished without uri)
    diverged         stage learning_rate message attempt attempts
    retrying         task message retry retries seconds (the pause before, about)
    evaluated        uri stage reused samples (of prompt and text) and the scores
    report_written   html_uri
    arm_started      arm seed run_id stages (names of what it trains)
    arm_reused       arm seed outcome and the first score
    arm_diverged     arm seed message
    compared         experiment html_uri
    measuring        what done total (of an experiment that trains no runs)
    decided          series outcome reason uri (of a retrain's candidate)
    retrained        series outcome reason
"""

import json
import logging
from typing import Any

RECORD_SEPARATOR = "\x1e"
_LOGGER = logging.getLogger("relora_train.events")

Event = dict[str, Any]


def emit(event: str, **fields: Any) -> None:
    """Send an event to the listeners of this process."""
    _LOGGER.debug("%s", event, extra={"event": {"event": event, **fields}})


def listen(handler: logging.Handler) -> None:
    """Have a handler see every event of this process, as `record.event`."""
    _LOGGER.setLevel(logging.DEBUG)
    _LOGGER.propagate = False
    _LOGGER.addHandler(handler)


def unlisten(handler: logging.Handler) -> None:
    """Undo `listen`."""
    _LOGGER.removeHandler(handler)


def encode(event: str, **fields: Any) -> str:
    """Return an event as one line for a pipe."""
    return f"{RECORD_SEPARATOR}{json.dumps({'event': event, **fields})}\n"


def decode(line: str) -> Event | None:
    """Return the event in a line, or None when the line is ordinary output."""
    if not line.startswith(RECORD_SEPARATOR):
        return None
    try:
        event = json.loads(line[1:])
    except json.JSONDecodeError:
        return None  # cut off by a kill
    return event if isinstance(event, dict) and "event" in event else None
