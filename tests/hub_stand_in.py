"""A hub on loopback: the part of huggingface.co's HTTP API that an upload needs, with what it was given in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class Hub:
    endpoint: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_writes": "write", "hf_reads": "read"})
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    """Status with which requests of a path that holds the key are answered."""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        path = path.partition("?")[0]
        for part, status in self.broken.items():
            if part in path:
                return status, {"error": "not today"}
        if path.startswith("/objects/"):  # a storage that knows no token
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if token not in self.tokens:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            role = {"accessToken": {"role": self.tokens[token]}}
            return 200, {"type": "user", "name": "me", "orgs": [{"name": "Lab"}], "auth": role}
        given = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            self.repositories[name], self.private[name] = {}, given["visibility"] == "private"
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            yaml.safe_load(given["content"].split("---\n")[1])
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch").split("/")[1:3])
        if (files := self.repositories.get(name)) is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/objects/batch"):
            assert given["operation"] == "upload" and "basic" in given["transfers"]
            uploads = [
                {**entry, "actions": {"upload": {"href": f"{self.endpoint}/objects/{entry['oid']}"}}}
                for entry in given["objects"]
            ]
            return 200, {"transfer": "basic", "objects": uploads}
        if "/preupload/" in path:
            modes = [
                {"path": entry["path"], "shouldIgnore": False, "oid": None, "uploadMode": mode}
                for entry in given["files"]
                for mode in ["lfs" if entry["path"].endswith(".safetensors") else "regular"]
            ]
            return 200, {"files": modes}
        if "/tree/" in path:
            return 200, [{"type": "file", "path": it, "size": len(files[it]), "oid": "0" * 40} for it in files]
        assert path.endswith("/commit/main"), path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.answer(self.command, self.path, body, token)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
