"""The process of a group of checks: `python child.py PIPE SCRATCH DEVICE` reads [id, place] a line, and answers.

Every check begins in the same state of torch. After one that has broken the device this process ends.
"""

import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from check_run import Run, SkippedError


def main() -> None:
    pipe, scratch, device = os.fdopen(int(sys.argv[1]), "w"), Path(sys.argv[2]), sys.argv[3]
    os.set_inheritable(pipe.fileno(), False)  # the parent hears of our end, not of our children's
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    def tell(**message: Any) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    tell(ready=True)
    for line in sys.stdin:
        check_id, place = json.loads(line)
        run = Run(
            tell=lambda values: tell(measured=values),
            device_type=device,
            scratch=scratch / f"{check_id.lower()}-{os.getpid()}",
            shared=scratch,
        )
        before = cpu_seconds()
        found = result_of(run, place)
        found["cpu_seconds"] = round(cpu_seconds() - before, 2)
        broken = leave_clean()
        if broken:
            found = {**found, "error": f"{found['error'] or ''} The device is broken: {broken}".strip()}
            found["status"] = "error" if found["status"] != "fail" else "fail"
        tell(**found, broken=bool(broken))
        if broken:
            break
    sys.stdout.flush()
    os._exit(0)  # whatever threads and contexts are left


def result_of(run: Run, place: str) -> dict[str, Any]:
    """Run the check and return the fields of its result."""
    module, _, function = place.partition(".")
    try:
        run.scratch.mkdir(parents=True, exist_ok=True)
        check = getattr(importlib.import_module(module), function)
        leave_clean()
        check(run)
    except SkippedError as reason:
        return {**run.result(), "status": "skipped", "error": str(reason)}
    except Exception as error:
        return {
            **run.result(),
            "status": "error",
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    return run.result()


def cpu_seconds() -> float:
    """Return what this process and those that it started have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def leave_clean() -> str:
    """Undo what a check may have set; return why the device can be used no more, if so."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    try:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.set_sync_debug_mode(0)
            torch.cuda.synchronize()
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
