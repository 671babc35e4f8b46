"""Secrets stay where they are, names from a store lead nowhere, nothing that is read can become code."""

import ast
import base64
import itertools
import json
import os
import pickle
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import checkpoint_manifest, dataset_manifest, write_files
from observed import CANARIES, Observed
from observed_flows import RUN_ID
from stage_runs import stage_request, tiny_profile
from transformers import AutoModelForCausalLM, LlamaConfig

from relora_train.checkpoints.commit import commit_bundle
from relora_train.checkpoints.layout import checkpoint_prefix
from relora_train.checkpoints.lease import hold_run
from relora_train.checkpoints.lineage import read_tombstone
from relora_train.checkpoints.manifest import (
    CheckpointManifest,
    DatasetManifest,
    Manifest,
    SnapshotManifest,
    read_manifest,
)
from relora_train.checkpoints.pins import pin, pins_in
from relora_train.checkpoints.run import CheckpointStore
from relora_train.checkpoints.snapshots import SnapshotStore
from relora_train.checkpoints.upkeep.pruning import prune_run
from relora_train.checkpoints.upkeep.verify import verify_run
from relora_train.errors import CheckpointCorruptError, ConfigError, ModelNotFoundError
from relora_train.runs.evaluations import recorded_evaluations
from relora_train.runs.run import Run
from relora_train.runs.workers import run_worker
from relora_train.settings.profile import Profile
from relora_train.storage.base import ObjectStore
from relora_train.storage.opening import open_store
from relora_train.training.models.pretrained import load_model

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(path for part in ("relora_train", "tasks", "flows") for path in (ROOT / part).rglob("*.py"))


# --- secrets ---


def on_disk(observed: Observed) -> Iterator[tuple[str, bytes]]:
    """Scratch space, Prefect's two homes and the database in them."""
    for path in observed.directory.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def in_the_store(observed: Observed) -> Iterator[tuple[str, bytes]]:
    client = observed.seaweed.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=observed.bucket)
    for key in (entry["Key"] for page in pages for entry in page.get("Contents", ())):
        answer = client.get_object(Bucket=observed.bucket, Key=key)
        yield f"{key} {answer['Metadata']}", answer["Body"].read()
    client.close()


def in_the_database(observed: Observed) -> Iterator[tuple[str, bytes]]:
    """Row by row: in the file a long text is cut into pages."""
    with sqlite3.connect(f"file:{observed.prefect.home / 'prefect.db'}?mode=ro", uri=True) as database:
        yield from (("database", line.encode()) for line in database.iterdump())
    database.close()


def through_the_api(observed: Observed) -> Iterator[tuple[str, bytes]]:
    for run in observed.flow_runs():
        for part in (observed.task_runs, observed.artifacts, observed.logs):
            yield f"{run['name']}: {part.__name__}", json.dumps([run, part(run)]).encode()


def on_the_console(observed: Observed) -> Iterator[tuple[str, bytes]]:
    yield "console", observed.console.encode()


PLACES = [on_disk, in_the_store, in_the_database, through_the_api, on_the_console]


@pytest.mark.parametrize("place", PLACES)
def test_no_secret_is_written_anywhere(observed: Observed, place: Callable[[Observed], Iterator[tuple[str, bytes]]]):
    """After runs that went well, were killed, repeated, and failed on their credentials and endpoints."""
    written = list(place(observed))
    assert any(RUN_ID.encode() in content for _, content in written), "it looks in the wrong place"
    for variable, secret in CANARIES.items():
        for form in (secret.encode(), base64.b64encode(secret.encode())):
            assert [name for name, content in written if form in content or form in name.encode()] == [], variable


def test_flows_that_meant_to_fail_failed_for_the_reason_that_was_meant(observed: Observed):
    for what, error in {
        "wrong credentials": "AccessDeniedError: Access to s3://",
        "unreachable": "StoreUnavailableError: s3://",
        "password in the endpoint": "ConfigError: The S3 endpoint http://127.0.0.1:",
        "signature in the endpoint": "ConfigError: The S3 endpoint http://127.0.0.1:",
    }.items():
        (line,) = [line for line in observed.console.splitlines() if line.startswith(f"{what} in ")]
        assert f" s: {error}" in line
    failed = [run for run in observed.flow_runs() if run["state_type"] == "FAILED"]
    assert len(failed) == 4


def test_the_orchestrator_pickles_nothing(observed: Observed):
    """It keeps the errors of failed flows beside its settings."""
    kept = [path for path in (observed.directory / "client" / "storage").rglob("*") if path.is_file()]
    errors = [json.loads(path.read_text())["__exc_type__"] for path in kept]
    assert len(errors) == 4 and all(name.startswith("relora_train.errors.") for name in errors)


def test_stores_runs_and_requests_show_no_secret(s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("PREFECT_API_KEY", secret)
    store = open_store(s3_store_uri)
    store.put_bytes("made", b"a client")
    run = Run("run", s3_store_uri, tiny_profile())
    request = stage_request(tiny_profile(), "warm-start", tmp_path, tmp_path / "out")
    for shown in (repr(store), str(store), store.uri, repr(run), repr(request), request.model_dump_json()):
        assert secret not in shown


# --- names from a store ---

HOSTILE_PATHS = [
    "../x", "../../../x", "a/../../x", "/tmp/x", "//host/x", "C:x", "C:\\x", "\\\\host\\x", "a\\..\\x", "a\0b", "a\nb",
    "..", ".", "~/x", "$(touch x)", "x;touch y", ".hidden", "",
]  # fmt: skip
HOSTILE_NAMES = ["../x", "a/b", "/tmp/x", "a\0b", "a\n", "", "..", "C:\\x", "$(touch x)"]

KINDS: dict[type[Manifest], Callable[[Path], Manifest]] = {
    CheckpointManifest: checkpoint_manifest,
    DatasetManifest: dataset_manifest,
    SnapshotManifest: lambda directory: SnapshotManifest(
        files=checkpoint_manifest(directory).files, attempt="a" * 16, run_id="run", stage="cycle-2", step=400,
        fingerprint="f" * 64,
    ),
}  # fmt: skip


def hostile_manifests(good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in HOSTILE_PATHS:
        yield {**good, "files": [{**good["files"][0], "path": path}]}
    for name in HOSTILE_NAMES:
        fields = [field for field in ("run_id", "name", "attempt") if field in good]
        yield from ({**good, field: name} for field in fields)
        yield {**good, "fingerprint" if "fingerprint" in good else "dataset_id": name}
        if name:
            yield {**good, "files_prefix": name}


def put_manifest(store: ObjectStore, prefix: str, manifest: dict[str, Any]) -> None:
    store.put_bytes(f"{prefix}/manifest.json".lstrip("/"), json.dumps(manifest).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_no_manifest_names_anything_outside_its_bundle(kind: type[Manifest], tmp_path: Path):
    good = KINDS[kind](write_files(tmp_path / "files", "a"))
    store = open_store(f"memory://hostile-{kind.__name__}")
    put_manifest(store, "good", json.loads(good.to_bytes()))
    assert read_manifest(store, "good", kind) == good
    for number, manifest in enumerate(hostile_manifests(json.loads(good.to_bytes()))):
        put_manifest(store, f"hostile-{number}", manifest)
        with pytest.raises(CheckpointCorruptError, match="is not a valid"):
            raise AssertionError(f"accepted: {read_manifest(store, f'hostile-{number}', kind)}")


def test_no_command_writes_outside_its_directory_for_a_hostile_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relora
):
    """Fetched for export, evaluation and report, from a store that is no local directory."""
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "a/b/cache"))
    monkeypatch.chdir(tmp_path)
    store = open_store("memory://hostile-commands")
    good = checkpoint_manifest(write_files(tmp_path / "files", "a"))
    prefix = checkpoint_prefix(good.run_id, good.step, good.fingerprint)
    commit_bundle(store, prefix, tmp_path / "files", good)
    before = sorted(tmp_path.rglob("*"))
    committed = json.loads(store.get_bytes(f"{prefix}/manifest.json")[0])
    chosen = {"files": [{**committed["files"][0], "path": "../../../escaped"}]}, {"attempt": "../../../../escaped"}
    for hostile, place in itertools.product(chosen, (prefix, "")):
        root = store if place else open_store(f"{store.uri}/loose")
        put_manifest(root, place, {**committed, **hostile})
        uri = f"{root.uri}/{place}".rstrip("/")
        for command in (["export", uri, "out"], ["evaluate", uri], ["report", uri], ["show", uri, "--verify"]):
            said = relora(*command)
            assert said.code == 6 and "is not a valid CheckpointManifest" in said.err, command
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hostile_snapshot_is_passed_over_and_leaves_nothing(tmp_path: Path):
    store = open_store("memory://hostile-snapshot")
    good = json.loads(KINDS[SnapshotManifest](write_files(tmp_path / "files", "a")).to_bytes())
    place = "runs/run/snapshots/ffffffffffff/step-00000400-aaaaaaaa"
    put_manifest(store, place, {**good, "files": [{**good["files"][0], "path": "../../../escaped"}]})
    snapshots = SnapshotStore(store, "run", "f" * 64, tmp_path / "local" / "snapshots", keep=2)
    assert snapshots.newest_valid() is None
    assert not list(tmp_path.rglob("escaped"))


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path: Path):
    from relora_train.checkpoints.fetch import fetch_bundle

    store = open_store("memory://hostile-link")
    manifest = commit_bundle(store, "p", write_files(tmp_path / "files", "a"), checkpoint_manifest(tmp_path / "files"))
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.write_bytes(b"mine")
    cache.mkdir()
    (cache / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointCorruptError, match="symbolic link"):
        fetch_bundle(store, "p", manifest, cache)
    assert outside.read_bytes() == b"mine"


DEEP = b'{"checkpoint": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("data", [DEEP, DEEP.replace(b"[", b'{"a":').replace(b"]", b"}"), b"\xff\xfe", b"1", b"null"])
def test_json_of_a_store_that_is_beyond_all_use_is_a_damaged_object_and_no_fault_of_ours(data: bytes, tmp_path: Path):
    store = open_store(f"memory://deep-{uuid.uuid4().hex}")
    made = checkpoint_manifest(write_files(tmp_path / "files", "a"))
    run = CheckpointStore(store, made.run_id)
    ref = run.commit(tmp_path / "files", made)
    store.put_bytes("runs/run/refs/head.json", data)
    store.put_bytes("runs/run/refs/pinned.json", data)
    store.put_bytes("runs/run/evaluations/x.json", data)
    store.put_bytes("runs/run/lease.json", data)
    for read in (run.head, lambda: hold_run(store, "run").__enter__(), lambda: prune_run(store, "run", None)):
        with pytest.raises(CheckpointCorruptError):
            read()
    assert {each.kind for each in verify_run(store, "run").findings} >= {"damaged"}
    assert pins_in(store, "run") == {"pinned": None} and recorded_evaluations(store, [ref]) == []
    with pytest.raises(ConfigError, match="already holds"):
        pin(store, ref, "pinned")
    store.put_bytes(f"{ref.prefix}/manifest.json", data)
    with pytest.raises(CheckpointCorruptError):
        run.list()
    store.put_bytes(f"{ref.prefix}/deleted.json", data)
    with pytest.raises(CheckpointCorruptError):
        read_tombstone(store, ref.prefix)


# --- nothing becomes code ---

_FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load",
    "torch.save", "np.load", "numpy.load", "torch.hub.load",
}  # fmt: skip
_FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.partition(".")[0] in _FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in _FORBIDDEN_CALLS else []
            for argument in node.keywords:
                if argument.arg in _FORBIDDEN_ARGUMENTS:
                    value = argument.value
                    safe = isinstance(value, ast.Constant) and value.value is not _FORBIDDEN_ARGUMENTS[argument.arg]
                    found += [] if safe else [f"{argument.arg}={ast.unparse(value)}"]
            reads_weights = called.startswith("AutoModel") and called.endswith("from_pretrained")
            if reads_weights and "use_safetensors" not in {a.arg for a in node.keywords}:
                found.append(called)
    return found


def test_no_line_of_ours_loads_a_pickle_or_starts_a_shell():
    for danger in (
        "import pickle",
        "torch.load(x)",
        "np.load(x, allow_pickle=flag)",
        "run(c, shell=True)",
        "eval('1')",
    ):
        assert dangers(danger), danger
    assert {path.name: dangers(path.read_text()) for path in PRODUCT if dangers(path.read_text())} == {}
    assert len(PRODUCT) > 80


class Trap:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sprung,)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.ckpt"])
def test_a_pickled_model_is_refused_unopened(tiny_model: Path, tmp_path: Path, name: str):
    assert load_model(tiny_model) is not None
    sprung = tmp_path / "sprung"
    (tiny_model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap(sprung)}, tiny_model / name)
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(tiny_model)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"


def test_code_that_comes_with_a_model_is_not_run(tiny_model: Path, tmp_path: Path):
    sprung = tmp_path / "sprung"
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}}
    (tiny_model / "config.json").write_text(json.dumps(config))
    (tiny_model / "trap.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
    with pytest.raises(ModelNotFoundError):
        load_model(tiny_model)
    assert not sprung.exists()


def test_values_reach_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every value of a request, and its path, is full of what a shell would act on."""
    hostile = f"$(touch {tmp_path}/pwned);`touch {tmp_path}/pwned`|&> '\" *"
    (tmp_path / "repeat.py").write_text(
        "import json, sys\nfrom relora_train.events import encode\n"
        "sys.stdout.write(encode('heard', arguments=sys.argv[1:], name=json.load(open(sys.argv[2]))['name']))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path)
    heard: list[Any] = []
    path = tmp_path / hostile.replace("/", "_") / "request.json"
    run_worker("repeat", Profile(name=hostile), path, on_event=heard.append)
    assert [(event["arguments"], event["name"]) for event in heard] == [(["--request", str(path)], hostile)]
    assert not list(tmp_path.rglob("pwned"))
