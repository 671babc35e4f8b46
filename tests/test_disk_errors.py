"""A disk that is full, read-only or somebody else's is named, and nothing half written stays."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from relora_train.errors import (
    DiskFullError,
)
from relora_train.storage.opening import open_store


def run_in_own_mounts(mount: str, program: str, *arguments: str) -> str:
    """Run a Python program where `mount` holds for it alone; skip where the system does not allow that."""
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces here: {error}")
    command = [*unshare, f'{mount}; exec "$@"', "sh", sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FILL = """
import sys, os
from pathlib import Path
from relora_train.errors import DiskFullError
from relora_train.storage.opening import open_store
uri, small_disk, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
store = open_store(uri)
def refused(call, *names):
    try:
        call()
    except DiskFullError as error:
        assert all(name in str(error) for name in names), error
        assert "run again" in str(error)
    else:
        raise AssertionError("no DiskFullError")
if uri.startswith("s3"):
    store.put_file("large", source)
    refused(lambda: store.get_file("large", small_disk / "target"), uri, str(small_disk))
else:
    store.put_bytes("before", b"1")
    refused(lambda: store.put_file("large", source), "large", "file://")
    refused(lambda: store.put_bytes("large", source.read_bytes(), if_absent=True), "large", "file://")
    assert [info.key for info in store.list()] == ["before"]
    assert not [name for name in os.listdir(small_disk / "store") if name.startswith(".tmp")]
    store.put_bytes("after", b"1")
print("passed")
"""


@pytest.mark.parametrize("backend", ["local", "s3"])
def test_a_full_disk_is_said_to_be_full_and_nothing_half_written_stays(backend, tmp_path, request):
    source, small_disk = tmp_path / "source", tmp_path / "small"
    source.write_bytes(b"x" * 3_000_000)
    small_disk.mkdir()
    uri = request.getfixturevalue("s3_store_uri") if backend == "s3" else str(small_disk / "store")
    mount = f"mount -t tmpfs -o size=1m tmpfs '{small_disk}'"
    assert run_in_own_mounts(mount, FILL, uri, str(small_disk), str(source)) == "passed\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_download_to_a_full_disk_says_so(tmp_path):
    store = open_store(tmp_path)
    store.put_bytes("key", b"1" * 10_000)
    with pytest.raises(DiskFullError, match="/dev/full"):
        store.get_file("key", Path("/dev/full"))


DENIED = """
import os, sys
from pathlib import Path
from relora_train.errors import AccessDeniedError
from relora_train.storage.opening import open_store
store = open_store(sys.argv[1])
if len(sys.argv) > 3:
    os.setgroups([]), os.setgid(int(sys.argv[3])), os.setuid(int(sys.argv[3]))
assert store.get_bytes("key")[0] == b"1"
for call in (lambda: store.put_bytes("a/new", b"2", if_absent=True), lambda: store.put_file("key", Path(sys.argv[2])),
             lambda: store.delete("key"), store.preflight):
    try:
        call()
    except AccessDeniedError as error:
        assert "file://" in str(error) and "use another directory" in str(error), error
    else:
        raise AssertionError("no AccessDeniedError")
assert [info.key for info in store.list()] == ["key"]
print("passed")
"""


def test_a_read_only_file_system_is_denied_and_can_still_be_read(tmp_path):
    directory, source = tmp_path / "store", tmp_path / "source"
    open_store(directory).put_bytes("key", b"1")
    source.write_bytes(b"2")
    mount = f"mount --bind '{directory}' '{directory}'; mount -o remount,bind,ro '{directory}'"
    assert run_in_own_mounts(mount, DENIED, str(directory), str(source)) == "passed\n"


def test_a_directory_of_someone_else_is_denied_and_can_still_be_read():
    if os.getuid() != 0:
        pytest.skip("only root can act as someone else")
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others
        directory, source = Path(name) / "store", Path(name) / "source"
        open_store(directory).put_bytes("key", b"1")
        source.write_bytes(b"2")
        Path(name).chmod(0o755)
        command = [sys.executable, "-c", DENIED, str(directory), str(source), "65534"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("passed\n", 0), done.stderr
