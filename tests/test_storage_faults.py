"""One fault at any request of any operation changes nothing: not the result, not the error, not what is stored."""

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fault_proxy import (
    Fault,
    Faults,
    answer_instead,
    cut_the_request,
    faulty_way_to,
    lose_the_answer,
)

from relora_train.errors import PreconditionFailedError, ReLoRAError
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store

FAULTS: dict[str, Fault] = {
    "503": answer_instead(503, "SlowDown"),
    "cut before it was served": cut_the_request,
    "answer lost": lose_the_answer,
}
PART_BYTES = 5 << 20  # the least that S3 allows


@pytest.fixture
def faults(seaweed, s3_store_uri, monkeypatch) -> Iterator[Faults]:
    """The way to the S3 server leads through a proxy, and nobody waits before asking again."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    with faulty_way_to(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


Operation = Callable[[ObjectStore, str, Path], object]
"""What is done to a store where `<place>/there` holds b"old", and what of the result must be the same."""


def put(**conditions: object) -> Operation:
    def operation(store: ObjectStore, place: str, directory: Path) -> object:
        given = dict(conditions)
        if given.get("if_match") == "of there":
            given["if_match"] = store.head(f"{place}/there").etag
        key = f"{place}/{given.pop('name')}"
        return store.put_bytes(key, b"new", **given) == store.head(key).etag

    return operation


def get_file(store: ObjectStore, place: str, directory: Path, name: str = "there") -> bytes:
    store.get_file(f"{place}/{name}", directory / "target")
    return (directory / "target").read_bytes()


def put_file(store: ObjectStore, place: str, directory: Path) -> None:
    (directory / "source").write_bytes(b"source")
    store.put_file(f"{place}/there", directory / "source")


def put_and_get_parts(store: ObjectStore, place: str, directory: Path) -> bool:
    content = b"".join(number.to_bytes(4) for number in range(PART_BYTES // 4 + 1))
    (directory / "source").write_bytes(content)
    store.put_file(f"{place}/parts", directory / "source")
    same = get_file(store, place, directory, "parts") == content
    store.delete(f"{place}/parts")
    return same


def abort_stale_uploads(store: ObjectStore, place: str, directory: Path) -> list[str]:
    client, bucket = store._client, store._bucket
    client.create_multipart_upload(Bucket=bucket, Key=f"{store._root}{place}/half")
    young = datetime.now(UTC) + timedelta(hours=1)
    found = set(store.abort_stale_uploads(young, prefix=f"{place}/"))
    assert list(store.abort_stale_uploads(young, prefix=f"{place}/", dry_run=True)) == []
    return [name.removeprefix(place) for name in found]


OPERATIONS: dict[str, Operation] = {
    "get_bytes": lambda store, place, _: store.get_bytes(f"{place}/there")[0],
    "get_bytes of nothing": lambda store, place, _: store.get_bytes(f"{place}/not"),
    "put_bytes": put(name="there"),
    "put_bytes if absent": put(name="not", if_absent=True),
    "put_bytes if absent and it is not": put(name="there", if_absent=True),
    "put_bytes if it matches": put(name="there", if_match="of there"),
    "put_bytes if it matches and does not": put(name="there", if_match='"0000000000000000000000000000000a"'),
    "put_bytes if it matches and is absent": put(name="not", if_match="of there"),
    "put_file": put_file,
    "put_file and get_file in parts": put_and_get_parts,
    "get_file": get_file,
    "get_file of nothing": lambda store, place, directory: get_file(store, place, directory, "not"),
    "head": lambda store, place, _: store.head(f"{place}/there").size_bytes,
    "head of nothing": lambda store, place, _: store.head(f"{place}/not"),
    "list": lambda store, place, _: [info.key.removeprefix(place) for info in store.list(f"{place}/")],
    "delete": lambda store, place, _: store.delete(f"{place}/there"),
    "delete of nothing": lambda store, place, _: store.delete(f"{place}/not"),
    "abort_stale_uploads": abort_stale_uploads,
    "preflight": lambda store, place, _: store.preflight(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_fault_at_any_request_is_not_seen(
    operation: Operation, faults: Faults, s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relora_train.storage.s3_client._PART_BYTES", PART_BYTES)
    store = open_store(s3_store_uri)

    def outcome(place: str, at: tuple[int, Fault] | None) -> object:
        store.put_bytes(f"{place}/there", b"old")
        faults.at = at
        try:
            result: object = operation(store, place, tmp_path)
        except ReLoRAError as error:
            result = type(error)
        never_met, faults.at = faults.at is not None, None
        stored = {info.key.removeprefix(place): store.get_bytes(info.key)[0] for info in store.list(f"{place}/")}
        return None if never_met else (result, stored, list(store.list("preflight/")))

    undisturbed = outcome("undisturbed", None)
    for name, fault in FAULTS.items():
        for n in itertools.count():
            disturbed = outcome(f"{name.replace(' ', '-')}-{n}", (n, fault))
            if disturbed is None:
                break
            assert disturbed == undisturbed, f"{name} at request {n + 1}"
        assert n > 0


def test_a_write_is_known_as_our_own_also_after_a_repeat_that_botocore_did_not_make(faults: Faults, s3_store_uri: str):
    store = open_store(s3_store_uri)
    faults.plan("PUT", "once", lose_the_answer, answer_instead(409, "ConditionalRequestConflict"))
    etag = store.put_bytes("once", b"mine 4711", if_absent=True)
    faults.plan("PUT", "once", lose_the_answer, answer_instead(400, "BadDigest"))
    assert store.put_bytes("once", b"mine 4712", if_match=etag) == store.head("once").etag
    faults.plan("PUT", "once", answer_instead(409, "ConditionalRequestConflict"))
    with pytest.raises(PreconditionFailedError):
        store.put_bytes("once", b"mine 4713", if_absent=True)
    assert (faults.met, faults.planned, store.get_bytes("once")[0]) == (5, [], b"mine 4712")


def test_servers_that_have_forgotten_what_they_just_did_are_no_error(
    faults: Faults, s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As GCS answers a DELETE of nothing, and as a finished upload may be unknown to who hears of its end again."""
    monkeypatch.setattr("relora_train.storage.s3_client._PART_BYTES", PART_BYTES)
    store, source = open_store(s3_store_uri), tmp_path / "source"
    source.write_bytes(bytes(PART_BYTES + 1))
    faults.plan("POST", "uploadId=", lose_the_answer, answer_instead(404, "NoSuchUpload"))
    store.put_file("key", source)
    assert store.head("key").size_bytes == PART_BYTES + 1
    faults.plan("DELETE", "key", lose_the_answer, answer_instead(404, "NoSuchKey"))
    store.delete("key")
    assert store.head("key") is None and faults.planned == []
