"""torch's elastic launcher on this machine: starts the ranks, and ends them all with the first that fails.

Each rank reports its own events. This module reports that no rank can start here, and that one was killed.
"""

import sys

from relora_train.devices import check_devices
from relora_train.errors import TrainerCrashedError
from relora_train.settings.running import LaunchConfig


def main() -> None:
    """Run it. Raises DeviceError if ranks need GPUs and there is none, TrainerCrashedError if a rank was killed."""
    if "--nproc-per-node=gpu" in sys.argv:
        check_devices(LaunchConfig(nproc_per_node="gpu"))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise TrainerCrashedError(
                f"Rank {rank} was killed by {failure.signal_name()}. Nothing of its stage was committed; the same "
                "command goes on from its newest snapshot. The system's out-of-memory killer does this: see "
                "batch.micro_sequences."
            ) from error
        sys.exit(1)


if __name__ == "__main__":
    main()
