"""A small server that speaks the endpoints of the Hugging Face Hub which pushing and pulling a model need.

It keeps repositories in memory, takes small files in the commit and large ones through LFS's "basic" transfer, knows
who may read and write, and misbehaves where a test asks for it. It is no Hub: what the real one does beyond this (Xet,
redirects to another host, multipart uploads) is not here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes: from here on a file goes through LFS
READ, WRITE = "hf_readreadreadreadread", "hf_writewritewritewrite"  # tokens


@dataclass
class Stored:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        text = json.dumps({n: hashlib.sha256(d).hexdigest() for n, d in sorted(self.branches[branch].items())})
        return hashlib.sha1(text.encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Of a branch, or of the state that a branch has now."""
        names = [b for b in self.branches if revision in (b, self.sha(b))]
        return self.branches[names[0]] if names else None


@dataclass
class Hub:
    """`damage(path, data)`: what is sent of a file; `answer(method, path)`: a status to answer with instead, or None.

    `asked`: every request, (method, path); `tokens`: those that came along."""

    url: str = ""
    repos: dict[str, Stored] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    damage: Callable[[str, bytes], bytes] = lambda _, data: data
    answer: Callable[[str, str], int | None] = lambda _, __: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._go()

    def do_GET(self) -> None:
        self._go()

    def do_POST(self) -> None:
        self._go()

    def do_PUT(self) -> None:
        self._go()

    def _go(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token:
            self.hub.tokens.add(self.token)
        status = self.hub.answer(self.command, path)
        if status is not None:
            self._send({"error": "as the test asks"}, status)
            return
        for pattern, method in ROUTES:
            verb, _, rest = pattern.partition(" ")
            found = re.fullmatch(rest, path)
            if found and verb in (self.command, "GET" if self.command == "HEAD" else ""):
                method(self, body, *found.groups())
                return
        self._send({"error": "no such endpoint here"}, 404)

    def _send(self, data: Any, status: int = 200, **headers: str) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _repo(self, name: str) -> Stored | None:
        """What this token may see; the Hub says of the rest that it is not there."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token not in (READ, WRITE)):
            self._send({"error": "Repository not found"}, 404 if self.token else 401, X_Error_Code="RepoNotFound")
            return None
        return found

    def _may_write(self) -> bool:
        if self.token != WRITE:
            self._send({"error": "Forbidden"}, 403 if self.token else 401)
        return self.token == WRITE

    def create(self, body: bytes) -> None:
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        if not self._may_write():
            return
        if name in self.hub.repos:
            self._send({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = Stored(said.get("visibility") == "private" or bool(said.get("private")))
        self._send({"url": f"{self.hub.url}/{name}"})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        if repo is not None and self._may_write():
            known = branch in repo.branches
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            self._send({}, 409 if known else 200)

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        files = repo.at(revision or "main")
        if files is None:
            self._send({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return
        branch = next(b for b, f in repo.branches.items() if f is files)
        siblings = [{"rfilename": n} for n in files]
        self._send({"id": name, "modelId": name, "sha": repo.sha(branch), "private": repo.private,
                    "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def tree(self, _: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            files = repo.at(revision) or {}
            self._send([{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                        for n, d in files.items()])  # fmt: skip

    def preupload(self, body: bytes, name: str, _revision: str) -> None:
        if self._repo(name) is not None and self._may_write():
            modes = {f["path"]: "lfs" if f["size"] >= LARGE else "regular" for f in json.loads(body)["files"]}
            self._send({"files": [{"path": p, "shouldIgnore": False, "uploadMode": m} for p, m in modes.items()]})

    def batch(self, body: bytes, name: str) -> None:
        if self._repo(name) is not None and self._may_write():
            objects = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]  # fmt: skip
            self._send({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        self.hub.large[oid] = body
        self._send({})

    def validate(self, _: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or not self._may_write():
            return
        files = dict(repo.branches[revision])
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            match said["key"]:
                case "header":
                    repo.commits.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repo.branches[revision] = files
        self._send({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha(revision)}", "commitOid": repo.sha(revision)})

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        data = (repo.at(revision) or {}).get(path)
        if data is None:
            self._send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        sent = data if self.command == "HEAD" else self.hub.damage(path, data)
        digest = hashlib.sha256(data).hexdigest()
        self.send_response(200)
        for key, value in {"Content-Length": len(data), "ETag": f'"{digest}"', "X-Repo-Commit": revision,
                           "Content-Type": "application/octet-stream"}.items():  # fmt: skip
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
            if len(sent) != len(data):
                self.close_connection = True


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{NAME}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{NAME}", _Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT /lfs/([0-9a-f]{64})", _Handler.upload),
    (rf"GET /{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
