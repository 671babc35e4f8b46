"""Credentials of an S3 store: denied ones are named and never shown, changed ones are used by a running process."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from fault_proxy import (
    answer_instead,
)
from test_storage_errors import every_call

from relora_train.errors import (
    AccessDeniedError,
    PreconditionFailedError,
)
from relora_train.storage.opening import open_store


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "AWS_SECRET_ACCESS_KEY|403"),
        ({"AWS_ACCESS_KEY_ID": "NOT-THE-KEY"}, "AWS_ACCESS_KEY_ID|403"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials found"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "credentials are incomplete"),
        ({"AWS_PROFILE": "no-such-profile"}, "AWS_PROFILE"),
    ],
)
def test_wrong_or_missing_credentials_are_denied_and_never_shown(s3_store_uri, tmp_path, monkeypatch, wrong, reason):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in wrong.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    for call in every_call(open_store(s3_store_uri), tmp_path):
        with pytest.raises(AccessDeniedError, match=reason) as caught:
            call()
        assert not caught.value.retryable
        assert not any(value in str(caught.value) for name, value in wrong.items() if value and name != "AWS_PROFILE")


def renewals(caplog: pytest.LogCaptureFixture) -> int:
    return sum("credentials have changed" in record.message for record in caplog.records)


def test_keys_that_change_in_the_file_are_used_by_every_call(keys, s3_store_uri, tmp_path, caplog):
    caplog.set_level(logging.INFO, "relora_train.storage.s3")
    store = open_store(s3_store_uri)
    for call in every_call(store, tmp_path):
        store.put_bytes("key", b"content")
        keys.issue()
        with suppress(PreconditionFailedError):  # an answer, where the key was to be absent
            call()
    assert renewals(caplog) == 9


def test_threads_that_are_denied_together_share_one_new_client(keys, s3_store_uri, caplog):
    caplog.set_level(logging.INFO, "relora_train.storage.s3")
    store, together = open_store(s3_store_uri), threading.Barrier(8)

    def write(number: int) -> bytes:
        together.wait(30)
        for n in range(5):
            store.put_bytes(f"{number}/{n}", b"%d" % number)
        return store.get_bytes(f"{number}/4")[0]

    store.put_bytes("key", b"content")
    keys.issue()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(write, range(8))) == [b"%d" % number for number in range(8)]
    assert (len(list(store.list())), renewals(caplog)) == (41, 1)


def test_a_denial_stays_one_until_the_file_holds_other_keys_that_are_whole(keys, faults, s3_store_uri, caplog):
    caplog.set_level(logging.INFO, "relora_train.storage.s3")
    store = open_store(s3_store_uri)
    store.put_bytes("key", b"content")
    faults.standing = [("GET", "/key", answer_instead(403, "AccessDenied"))]
    with pytest.raises(AccessDeniedError, match="read, write, list and delete"):
        store.get_bytes("key")
    assert faults.met == 1  # nobody asks twice with the same keys
    faults.standing = []
    keys.revoke()
    for written in ("aws_access_key_id = half a l", "[default]\naws_access_key_id = NEW", "[default]\n"):
        keys.file.write_text(written)
        with pytest.raises(AccessDeniedError):
            store.get_bytes("key")
    keys.issue()
    assert store.get_bytes("key")[0] == b"content"


@pytest.mark.parametrize(("expires_in_minutes", "new_clients"), [(5, 0), (600, 1)])
def test_keys_of_a_process_are_renewed_by_botocore_and_when_denied(
    keys, s3_store_uri, tmp_path, caplog, expires_in_minutes, new_clients
):
    """botocore asks the process again 15 minutes before they expire, and knows nothing of keys withdrawn earlier."""
    caplog.set_level(logging.INFO, "relora_train.storage.s3")

    def issue() -> None:
        keys.issue()
        keys.file.unlink()
        expiration = (datetime.now(UTC) + timedelta(minutes=expires_in_minutes)).isoformat()
        (tmp_path / "answer").write_text(json.dumps({"Version": 1, "Expiration": expiration, **keys.key}))

    issue()
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path / 'answer'}\n")
    store = open_store(s3_store_uri)
    store.put_bytes("key", b"content")
    issue()
    assert store.get_bytes("key")[0] == b"content"
    assert renewals(caplog) == new_clients
