"""What trackers were told, read back from their own files: name -> (step, value), in the order of the file."""

import json
import sqlite3
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

Told = dict[str, list[tuple[int, Any]]]


def of_trackio(directory: Path, project: str = "relora-train") -> Told:
    told: Told = defaultdict(list)
    with sqlite3.connect(directory / "trackio" / f"{project}.db") as database:
        for step, numbers in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            for name, value in json.loads(numbers).items():
                told[name].append((step, value["_value"] if isinstance(value, dict) else value))
    database.close()
    return told


def of_tensorboard(directory: Path, run_id: str) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(directory / "tensorboard" / run_id), size_guidance={"tensors": 0})
    files.Reload()
    told: Told = {}
    for name in files.Tags()["tensors"]:
        events = [(each.step, each.tensor_proto) for each in files.Tensors(name)]
        told[name] = [
            (step, proto.string_val[0].decode() if proto.string_val else proto.float_val[0]) for step, proto in events
        ]
    return told


def of_wandb(directory: Path, run_id: str) -> Told:
    """Read the offline runs: logs of records as LevelDB has them, of which those of a history are taken."""
    from wandb.proto import wandb_internal_pb2

    told: Told = defaultdict(list)
    for path in sorted((directory / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
        data, at, begun = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block is padding
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            begun += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                record = wandb_internal_pb2.Record.FromString(begun)
                begun = b""
                for item in record.history.item:
                    name, *parts = [item.key] if item.key else item.nested_key
                    if parts in ([], ["path"]):  # of a page: where it is
                        told[name].append((record.history.step.num, json.loads(item.value_json)))
    return told
