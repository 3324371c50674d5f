# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the Hub on this machine: the HTTP API that `huggingface_hub` uses to create a repository, to upload
files (small ones inside the commit, weights as Git LFS objects), to branch and to download."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LARGE = (".safetensors", ".bin")
USER = "stranger"


class StandIn(ThreadingHTTPServer):
    """
    Use it as a context manager; `url` is the endpoint.

    Fields:
        repositories: id to branch to {path: bytes}.
        refused: requests that it does not know, as (method, path): nothing that a client asks for goes unnoticed.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.refused: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Environment variables of a client that has its own cache and knows this Hub only."""
        off = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0"}
        return {**own, **dict.fromkeys(off, "1")}


class Missing(Exception):
    """What a client asked for is not there; `code` is the Hub's word for it."""

    def __init__(self, code: str):
        super().__init__(code)
        self.code = code


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    # ---- requests ------------------------------------------------------------------------------------------------

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def log_message(self, *_):
        pass

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        try:
            for wanted, pattern, act in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and wanted == method:
                    with self.server.lock:
                        act(self, body, **found.groupdict())
                    return
        except Missing as missing:
            self._send(404, {"error": missing.code}, {"X-Error-Code": missing.code, "X-Error-Message": missing.code})
            return
        self.server.refused.append((method, path))
        self._send(404, {"error": f"the stand-in knows no {method} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _branch(self, repo: str, revision: str) -> dict[str, bytes]:
        if repo not in self.server.repositories:
            raise Missing("RepoNotFound")
        branches = self.server.repositories[repo]
        for name, files in branches.items():
            if revision in (name, _commit(files)):
                return files
        raise Missing("RevisionNotFound")

    # ---- what they do --------------------------------------------------------------------------------------------

    def who(self, _):
        self._send(200, {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}})

    def check_card(self, body):
        """The Hub refuses metadata that it cannot read."""
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(head[1]) if head else {}
        errors = [] if isinstance(data, dict) else [{"message": "metadata is no mapping"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        known = repo in self.server.repositories
        self.server.repositories.setdefault(repo, {"main": {}})
        self._send(409 if known else 200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def branch(self, body, repo, revision):
        branches = self.server.repositories[repo]
        known = revision in branches
        branches.setdefault(revision, dict(branches["main"]))
        self._send(409 if known else 200, {})

    def preupload(self, body, repo, revision):
        self._branch(repo, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._send(200, {"files": files})

    def batch(self, body, repo):
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(200, {})

    def commit(self, body, repo, revision):
        files = self._branch(repo, revision)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = _commit(files)
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, _, repo, revision="main"):
        files = self._branch(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send(200, {"id": repo, "modelId": repo, "sha": _commit(files), "siblings": siblings, "tags": []})

    def tree(self, _, repo, revision, folder=""):
        files = self._branch(repo, revision)
        inside = [path for path in sorted(files) if path.startswith(folder and f"{folder}/")]
        if folder and not inside:
            raise Missing("EntryNotFound")
        entry = {"type": "file", "oid": "0" * 40}
        self._send(200, [{**entry, "path": path, "size": len(files[path])} for path in inside])

    def resolve(self, _, repo, revision, path):
        files = self._branch(repo, revision)
        if path not in files:
            raise Missing("EntryNotFound")
        tag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"ETag": f'"{tag}"', "X-Repo-Commit": _commit(files)})


def _commit(files: dict[str, bytes]) -> str:
    """A name for the content of a branch."""
    text = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
    return hashlib.sha1(text.encode()).hexdigest()


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/validate-yaml", Handler.check_card),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.put),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}/(?P<folder>.+)", Handler.tree),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
