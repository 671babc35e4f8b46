"""What a store says when it cannot: every fault is a real one, of a disk, a server or the network between."""

import logging
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from fault_proxy import (
    Exchange,
    Faults,
    answer_instead,
    cut_the_answer,
    flip_a_bit_of_the_answer,
    flip_a_bit_of_the_request,
    held_until,
    lose_the_answer,
)

from relora_train.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    DiskFullError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    StoreUnavailableError,
    UnknownStoreSchemeError,
    UnsafeStoreError,
)
from relora_train.storage.memory import MemoryStore
from relora_train.storage.opening import open_store
from relora_train.storage.s3_client import make_client, storage_error


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "S4://x", "s3://", "s3:///key", "file://host/dir"])
def test_an_unknown_store_is_refused_with_the_list_of_known_ones(uri):
    with pytest.raises(UnknownStoreSchemeError) as caught:
        open_store(uri)
    assert uri in str(caught.value)
    assert all(known in str(caught.value) for known in ("file://", "s3://", "memory://"))


def test_all_ways_to_write_a_directory_name_the_same_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / "with space#and?"
    spellings = [
        directory,
        str(directory),
        "with space#and?",
        "~/with space#and?",
        f"{directory}/",
        f"{directory}/x/..",
    ]
    assert {open_store(spelling).uri for spelling in spellings} == {directory.as_uri()}
    assert open_store(directory.as_uri()).uri == directory.as_uri()
    assert open_store(f"file://{tmp_path}/plain").uri == open_store(tmp_path / "plain").uri


def test_a_memory_store_is_shared_by_its_name():
    open_store("memory://shared-by-name").put_bytes("a", b"1")
    assert open_store("memory://shared-by-name/").get_bytes("a")[0] == b"1"
    assert open_store("memory://another").head("a") is None


# --- missing, denied, unavailable ---


def every_call(store, directory: Path):
    file = directory / "file"
    file.write_bytes(b"content")
    return [
        lambda: store.get_bytes("key"),
        lambda: store.head("key"),
        lambda: list(store.list()),
        lambda: store.delete("key"),
        lambda: store.put_bytes("key", b"1"),
        lambda: store.put_bytes("key", b"1", if_absent=True),
        lambda: store.put_file("key", file),
        lambda: store.get_file("key", directory / "target"),
        store.preflight,
    ]


def test_a_missing_bucket_is_named_by_every_call(s3_store_uri, tmp_path):
    for call in every_call(open_store("s3://no-such-bucket/prefix"), tmp_path):
        with pytest.raises(BucketNotFoundError, match=r"'no-such-bucket'.*s3://no-such-bucket/prefix") as caught:
            call()
        assert "Create it" in str(caught.value)


# --- credentials that change ---


# --- unavailable, unencrypted, unknown ---


def test_an_unreachable_endpoint_is_unavailable_within_a_bounded_time(s3_store_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "2")
    started = time.monotonic()
    for call in every_call(open_store(s3_store_uri), tmp_path):
        with pytest.raises(StoreUnavailableError, match="AWS_ENDPOINT_URL_S3") as caught:
            call()
        assert caught.value.retryable
        assert "http://127.0.0.1:9" in str(caught.value)
    assert time.monotonic() - started < 60  # nine calls of two attempts, each with at most one second of backoff


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://user:hunter2@127.0.0.1:9",
        "https://user:hunter2@127.0.0.1:9999999",
        "http://127.0.0.1:9/?X-Amz-Signature=hunter2",
        "http://user:hunter2@no host",
        "user:hunter2@host",
    ],
)
def test_a_secret_in_the_endpoint_is_refused_and_repeated_nowhere(s3_store_uri, monkeypatch, caplog, endpoint):
    """Also not in the chain of causes, which an orchestrator logs."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="AWS_ENDPOINT_URL_S3") as caught:
        open_store(s3_store_uri).head("key")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in caplog.text


def test_settings_that_make_no_sense_are_configuration_errors(s3_store_uri, monkeypatch):
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="RELORA_S3_MAX_ATTEMPTS='many'"):
        open_store(s3_store_uri).head("key")
    monkeypatch.delenv("RELORA_S3_MAX_ATTEMPTS")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "no endpoint")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL_S3"):
        open_store(s3_store_uri).head("key")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("NoSuchBucket", 404, BucketNotFoundError),
        ("NoSuchKey", 404, ObjectNotFoundError),
        ("AccessDenied", 403, AccessDeniedError),
        ("ExpiredToken", 400, AccessDeniedError),
        ("RequestExpired", 400, AccessDeniedError),
        ("400", 400, AccessDeniedError),  # the same of a HEAD, which has no body to say so
        ("InvalidAccessKeyId", 403, AccessDeniedError),
        ("SignatureDoesNotMatch", 403, AccessDeniedError),
        ("RequestTimeTooSkewed", 403, AccessDeniedError),
        ("SomethingNew", 403, AccessDeniedError),
        ("PreconditionFailed", 412, PreconditionFailedError),
        ("ConditionalRequestConflict", 409, StoreUnavailableError),
        ("BadDigest", 400, StoreUnavailableError),
        ("NotImplemented", 501, StorageError),
        ("SlowDown", 503, StoreUnavailableError),
        ("InternalError", 500, StoreUnavailableError),
        ("", 502, StoreUnavailableError),
        ("TooManyRequests", 429, StoreUnavailableError),
        ("XMinioStorageFull", 507, DiskFullError),
        ("InvalidBucketName", 400, StorageError),
    ],
)
def test_each_answer_of_a_server_becomes_the_error_whose_remedy_fits(code, status, expected):
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = storage_error(ClientError(answer, "PutObject"), uri="s3://bucket/key", endpoint="https://host")
    assert type(error) is expected
    assert "bucket" in str(error)


def test_an_unencrypted_way_to_another_host_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example:9000")
    for _ in range(2):
        make_client().close()
    assert [record.levelname for record in caplog.records if "store.example:9000" in record.message] == ["WARNING"]
    caplog.clear()
    for endpoint in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://store.example"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        make_client().close()
    assert not [record for record in caplog.records if record.name.startswith("relora_train")]


def test_a_custom_server_is_addressed_by_path_unless_the_user_chose_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example")
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    for chosen, expected in ((tmp_path / "none", "path"), (config, "virtual")):
        monkeypatch.setenv("AWS_CONFIG_FILE", str(chosen))
        client = make_client()
        assert client.meta.config.s3["addressing_style"] == expected
        client.close()


# --- conditions that are not kept ---


class ForgetfulStore(MemoryStore):
    """A server that acknowledges conditional writes without looking at one of the conditions."""

    def __init__(self, *forgets: str) -> None:
        super().__init__("forgetful")
        self.forgets = forgets

    def put_bytes(self, key, data, *, if_absent=False, if_match=None):
        if "if_match when absent" in self.forgets and self.head(key) is None:
            if_match = None
        if "if_match" in self.forgets:
            if_match = None
        return super().put_bytes(key, data, if_absent=if_absent and "if_absent" not in self.forgets, if_match=if_match)


@pytest.mark.parametrize(
    "forgets", [("if_absent",), ("if_match",), ("if_absent", "if_match"), ("if_match when absent",)]
)
def test_a_store_that_ignores_conditions_is_refused_and_left_clean(forgets):
    store = ForgetfulStore(*forgets)
    with pytest.raises(UnsafeStoreError, match="memory://forgetful"):
        store.preflight()
    assert list(store.list()) == []
    ForgetfulStore().preflight()


def test_a_server_that_stores_the_framing_of_checksums_is_refused_with_the_way_out(faults, s3_store_uri):
    """As some servers do with aws-chunked bodies; here it comes with the answer, after the real server's checks."""

    def framed(exchange: Exchange) -> None:
        exchange.forward()
        exchange.answer = b"%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n" % (len(exchange.answer), exchange.answer)
        exchange.answer_headers = [each for each in exchange.answer_headers if "checksum" not in each[0].lower()]

    store = open_store(s3_store_uri)
    faults.standing = [("GET", "/preflight/", framed)]
    with pytest.raises(UnsafeStoreError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        store.preflight()
    faults.standing = [("GET", "/preflight/", flip_a_bit_of_the_answer_and_its_checksum)]
    with pytest.raises(UnsafeStoreError, match="other bytes than were written"):
        store.preflight()
    faults.standing = []
    store.preflight()
    assert list(store.list()) == []


def flip_a_bit_of_the_answer_and_its_checksum(exchange: Exchange) -> None:
    flip_a_bit_of_the_answer(exchange)
    exchange.answer_headers = [each for each in exchange.answer_headers if "checksum" not in each[0].lower()]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
        (411, "MissingContentLength", "You must provide the Content-Length HTTP header"),
        (400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match"),
        (400, "InvalidArgument", "Unsupported value STREAMING-UNSIGNED-PAYLOAD-TRAILER"),
    ],
)
def test_a_server_that_refuses_checksums_is_told_apart_from_wrong_settings(status, code, message):
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = storage_error(ClientError(answer, "PutObject"), uri="s3://bucket/key", endpoint="https://host")
    assert type(error) is StorageError and not error.retryable
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in str(error)


def test_a_store_that_refuses_every_if_match_is_refused_too():
    class NeverMatches(MemoryStore):
        def put_bytes(self, key, data, *, if_absent=False, if_match=None):
            return super().put_bytes(key, data, if_absent=if_absent, if_match=if_match and "no etag")

    with pytest.raises(UnsafeStoreError, match="did match"):
        NeverMatches().preflight()


# --- the network ---


def test_faults_that_pass_are_not_seen(faults, s3_store_uri, tmp_path):
    store, source, target = open_store(s3_store_uri), tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights" * 10_000)
    conflict, damaged = answer_instead(409, "ConditionalRequestConflict"), answer_instead(400, "BadDigest")
    faults.plan("PUT", "a", answer_instead(503, "SlowDown"), answer_instead(500, "InternalError"))
    store.put_bytes("a", b"content")
    faults.plan("PUT", "b", conflict, conflict)
    store.put_bytes("b", b"content", if_absent=True)
    faults.plan("PUT", "c", damaged, damaged)
    store.put_file("c", source)
    faults.plan("GET", "a", cut_the_answer, cut_the_answer)
    assert store.get_bytes("a")[0] == b"content"
    faults.plan("GET", "c", cut_the_answer, lose_the_answer)
    store.get_file("c", target)
    assert target.read_bytes() == source.read_bytes()
    assert (faults.met, faults.planned) == (10, [])


def test_a_bit_flipped_on_the_way_is_noticed_and_sent_again(faults, s3_store_uri, tmp_path):
    store, source = open_store(s3_store_uri), tmp_path / "source"
    source.write_bytes(b"weights" * 10_000)
    faults.plan("PUT", "", flip_a_bit_of_the_request, flip_a_bit_of_the_request)
    store.put_file("file", source)
    store.put_bytes("bytes", b"content")
    faults.plan("GET", "", flip_a_bit_of_the_answer, flip_a_bit_of_the_answer)
    assert store.get_bytes("file")[0] == source.read_bytes()
    assert store.get_bytes("bytes")[0] == b"content"
    assert (faults.met, faults.planned) == (4, [])


def test_a_fault_that_does_not_pass_is_unavailable_in_the_end(faults, s3_store_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("RELORA_S3_MAX_ATTEMPTS", "2")
    store, source = open_store(s3_store_uri), tmp_path / "source"
    source.write_bytes(b"weights")
    faults.plan("PUT", "", *[answer_instead(503, "SlowDown")] * 4)
    for call in (lambda: store.put_bytes("a", b"1"), lambda: store.put_file("a", source)):
        with pytest.raises(StoreUnavailableError, match="SlowDown"):
            call()
    faults.plan("PUT", "", *[answer_instead(409, "ConditionalRequestConflict")] * 5)
    with pytest.raises(StoreUnavailableError, match="ConditionalRequestConflict"):
        store.put_bytes("a", b"1", if_absent=True)
    assert faults.planned == []
    assert store.head("a") is None


# --- the disk ---


def test_an_upload_is_cancelled_from_another_thread_with_nothing_left_of_it(
    faults: Faults, s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.storage.s3_client._PART_BYTES", 5 << 20)
    (tmp_path / "file").write_bytes(bytes(60 << 20))  # 12 parts, 4 at a time
    gate, store, ends = threading.Event(), open_store(s3_store_uri), list[Exception]()
    faults.standing = [("PUT", "uploadId=", held_until(gate))]

    def upload() -> None:
        try:
            store.put_file("file", tmp_path / "file")
        except Exception as error:
            ends.append(error)

    thread = threading.Thread(target=upload)
    thread.start()
    while not faults.met:
        time.sleep(0.01)
    store.cancel_uploads()
    gate.set()
    thread.join(30)
    assert len(ends) == 1 and faults.met <= 5  # what was on its way, and nothing after it
    assert store.head("file") is None
    assert store.abort_stale_uploads(datetime.now(UTC) + timedelta(days=1), dry_run=True) == []
    store.put_file("file", tmp_path / "file")
    assert store.head("file").size_bytes == 60 << 20
