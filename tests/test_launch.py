"""Worker processes: their events, their failures, their end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage_runs import manifest_of, stage_request, tiny_profile
from tiny_data import write_tiny_dataset

from relora_train.checkpoints.snapshots import local_snapshots
from relora_train.errors import (
    CorpusTooSmallError,
    DeviceError,
    TrainerCrashedError,
    TrainerFaultError,
    TrainerInterruptedError,
)
from relora_train.events import Event
from relora_train.runs import worker_process
from relora_train.runs.workers import Worker, run_worker
from relora_train.settings.running import LaunchConfig, SnapshotConfig
from relora_train.storage.workspace import cache_root
from relora_train.training.requests import StageRequest


def endless(tmp_path: Path):
    """A request that would train for hours."""
    profile = tiny_profile(schedule={"warm_start_steps": 10_000_000}, launch={"threads": 1})
    dataset = write_tiny_dataset(tmp_path / "data")
    return stage_request(profile, "warm-start", dataset, tmp_path / "out")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_until_gone(pid: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_stage_in_a_process_reports_its_course_and_commits(tmp_path: Path):
    request = stage_request(tiny_profile(), "warm-start", write_tiny_dataset(tmp_path / "data"), tmp_path / "out")
    seen: list[Event] = []
    run_worker("relora_train.training.trainer", request, tmp_path / "request.json", on_event=seen.append)
    names = [event["event"] for event in seen]
    assert names[0] == "stage_started" and names[-1] == "stage_committed" and "progress" in names
    assert seen[0]["pid"] != os.getpid()
    assert manifest_of(tmp_path / "out")["step"] == 6


def test_an_error_of_ours_comes_back_as_itself(tmp_path: Path):
    dataset = write_tiny_dataset(tmp_path / "data", train_tokens=100)
    request = stage_request(tiny_profile(), "warm-start", dataset, tmp_path / "out")
    with pytest.raises(CorpusTooSmallError, match="100 tokens"):
        run_worker("relora_train.training.trainer", request, tmp_path / "request.json", on_event=lambda event: None)


def test_a_worker_that_cannot_be_imported_says_why_and_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request, path = endless(tmp_path), tmp_path / "request.json"
    for ranks in (1, 2):
        with pytest.raises(TrainerFaultError, match="No module named 'a_package_that_is_not_installed'") as caught:
            run_worker("needy", request, path, on_event=lambda event: None, launch=LaunchConfig(nproc_per_node=ranks))
        assert not caught.value.retryable and "needy.py" in str(caught.value)


def test_a_rank_for_each_gpu_without_one_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match=r"launch\.nproc_per_node is 'gpu'.*Set launch\.nproc_per_node to a number"):
        path = tmp_path / "request.json"
        trainer = "relora_train.training.trainer"
        run_worker(
            trainer, endless(tmp_path), path, on_event=lambda event: None, launch=LaunchConfig(nproc_per_node="gpu")
        )


def test_a_warning_in_a_worker_is_heard_as_one_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "warner.py").write_text(
        "import logging\n"
        "from relora_train.process import serve_request\n"
        "from relora_train.training.requests import StageRequest\n"
        "warn = logging.getLogger('relora_train.x').warning\n"
        "serve_request(StageRequest, lambda request, emit: warn('mind %s', 'it'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_worker("warner", endless(tmp_path), tmp_path / "request.json", on_event=lambda event: None)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["mind it"]


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGKILL, TrainerCrashedError, "killed by SIGKILL"),
        (signal.SIGTERM, TrainerInterruptedError, "stopped by SIGTERM"),
    ],
)
def test_a_worker_that_is_killed_may_be_retried_one_that_is_stopped_may_not(tmp_path: Path, number, error, said):
    def end(event: Event) -> None:
        if event["event"] == "stage_started":
            os.kill(event["pid"], number)

    with pytest.raises(error, match=said) as caught:
        run_worker("relora_train.training.trainer", endless(tmp_path), tmp_path / "request.json", on_event=end)
    assert caught.value.retryable is (number == signal.SIGKILL) and not (tmp_path / "out").exists()


def test_whatever_ends_the_caller_ends_the_worker_first(tmp_path: Path):
    pids: list[int] = []

    def interrupt(event: Event) -> None:
        if event["event"] == "stage_started":
            pids.append(event["pid"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker("relora_train.training.trainer", endless(tmp_path), tmp_path / "request.json", on_event=interrupt)
    assert not is_running(pids[0])


def with_snapshots(request: StageRequest, root: Path, **settings: object) -> StageRequest:
    profile = request.profile.model_copy(update={"snapshots": SnapshotConfig(**settings)})
    return request.model_copy(update={"profile": profile, "snapshots_directory": root})


@pytest.fixture
def never_killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that is asked to stop ends by itself, however slow this machine is."""
    killed: list[int] = []
    monkeypatch.setattr(worker_process, "STOP_SECONDS", 600.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda pid, number: killed.append(pid))
        yield
    for pid in killed:
        os.killpg(pid, signal.SIGKILL)
    assert not killed


def test_a_worker_being_stopped_is_still_heard_and_its_snapshot_told_of(tmp_path: Path, never_killed: None):
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        seen.append(event)
        if event["event"] == "progress" and "stopping" not in [event["event"] for event in seen]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        request = with_snapshots(endless(tmp_path), tmp_path / "snapshots")
        run_worker("relora_train.training.trainer", request, tmp_path / "request.json", on_event=interrupt)
    names = [event["event"] for event in seen]
    assert names.index("stopping") < names.index("snapshot_committed") and "failed" not in names
    committed = seen[names.index("snapshot_committed")]
    assert local_snapshots(tmp_path / "snapshots") == [Path(committed["directory"]).name]


def test_a_worker_that_fills_its_pipe_while_being_stopped_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never_killed: None
):
    """A pipe holds 64 KB; a worker blocked on a full one could never leave in order."""
    (tmp_path / "talker.py").write_text(
        "import signal, sys\n"
        "from relora_train.events import encode\n"
        "def leave(*_):\n"
        "    sys.stdout.write('x' * 1000 + '\\n'); [sys.stdout.write('y' * 1000 + '\\n') for _ in range(500)]\n"
        "    sys.stdout.write(encode('last_words')); sys.stdout.flush(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "sys.stdout.write(encode('ready')); sys.stdout.flush()\n"
        "while True: signal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    seen: list[str] = []

    def interrupt(event: Event) -> None:
        seen.append(event["event"])
        if event["event"] == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker("talker", endless(tmp_path), tmp_path / "request.json", on_event=interrupt)
    assert seen == ["ready", "stopping", "last_words"]


def test_two_ranks_stopped_and_continued_give_what_two_ranks_give(tmp_path: Path):
    """Only the first rank saves; all go on from what it saved."""
    dataset = write_tiny_dataset(tmp_path / "data")
    profile = tiny_profile(
        launch={"nproc_per_node": 2, "threads": 1}, schedule={"warm_start_steps": 200}, evaluation={"sequences": 8}
    )

    worker = Worker(keeps=True)

    def run(out: str, on_event: Callable[[Event], None], **update: object) -> None:
        request = stage_request(profile, "warm-start", dataset, tmp_path / out).model_copy(update=update)
        path, launch = tmp_path / "r.json", profile.launch
        worker.run("relora_train.training.trainer", request, path, on_event=on_event, launch=launch)

    def stop(event: Event) -> None:
        if event["event"] == "progress":
            os.kill(pids[-1], signal.SIGTERM)
        elif event["event"] == "stage_started":
            pids.append(event["pid"])

    pids: list[int] = []
    with pytest.raises(TrainerInterruptedError, match="was saved"):
        run("out", stop, snapshots_directory=tmp_path / "snapshots")
    (name,) = local_snapshots(tmp_path / "snapshots")
    resumed: list[int] = []
    run(
        "out",
        lambda event: resumed.append(event["step"]) if event["event"] == "resumed" else None,
        snapshot_directory=tmp_path / "snapshots" / name,
    )
    run("undisturbed", lambda event: None)
    worker.close()
    assert resumed == [int(name.split("-")[1])] and 0 < resumed[0] < 200
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "undisturbed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_saves_its_state_and_ends_when_its_parent_is_killed(tmp_path: Path, ranks: int):
    request = endless(tmp_path)
    request = request.model_copy(
        update={
            "profile": tiny_profile(schedule={"warm_start_steps": 10_000_000}, launch={"nproc_per_node": ranks}),
            "snapshots_directory": tmp_path / "snapshots",
        }
    )
    (tmp_path / "request-in.json").write_text(request.model_dump_json())
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from relora_train.runs.workers import Worker\n"
        "from relora_train.training.requests import StageRequest\n"
        f"request = StageRequest.model_validate_json(Path({str(tmp_path / 'request-in.json')!r}).read_text())\n"
        "show = lambda event: (sys.stdout.write(f\"{event['event']} {event.get('pid', '')}\\n\"), sys.stdout.flush())\n"
        f"Worker(keeps=True).run('relora_train.training.trainer', request, Path({str(tmp_path / 'request.json')!r}),\n"
        "                        on_event=show, launch=request.profile.launch)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as parent:
        name, pid = parent.stdout.readline().split()
        assert name == "stage_started"
        while not parent.stdout.readline().startswith("progress"):
            pass
        parent.kill()
    wait_until_gone(int(pid))
    assert len(local_snapshots(tmp_path / "snapshots")) == 1


def test_the_worker_sees_no_credentials_and_keeps_compiled_code_in_the_scratch_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("PREFECT_API_KEY", "canary")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found: list[bool] = []

    def look(event: Event) -> None:
        if event["event"] == "stage_started":
            environment = Path(f"/proc/{event['pid']}/environ").read_bytes()
            found.extend([b"canary" in environment, f"TORCHINDUCTOR_CACHE_DIR={cache_root()}".encode() in environment])
            os.kill(event["pid"], signal.SIGTERM)

    with pytest.raises(TrainerInterruptedError):
        run_worker("relora_train.training.trainer", endless(tmp_path), tmp_path / "request.json", on_event=look)
    assert found == [False, True]
