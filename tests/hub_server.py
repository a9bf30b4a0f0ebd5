"""A Hub on loopback: as much of its HTTP interface as ``huggingface_hub`` uses for models.

Repositories are commits in memory, a commit is a mapping from path to bytes. Large files take the
LFS route, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"

Files = dict[str, bytes]


class Hub:
    """What the server knows: commits and branches by repository, and uploaded large files."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}

    def create(self, repo: str) -> bool:
        if repo in self.commits:
            return False
        self.commits[repo], self.branches[repo] = {}, {}
        self.commit(repo, "main", {})
        return True

    def commit(self, repo: str, branch: str, files: Files) -> str:
        sha = hashlib.sha1(repr((branch, len(self.commits[repo]), sorted(files))).encode())
        self.commits[repo][sha.hexdigest()] = files
        self.branches[repo][branch] = sha.hexdigest()
        return sha.hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        sha = self.branches.get(repo, {}).get(revision, revision)
        files = self.commits.get(repo, {}).get(sha)
        return None if files is None else (sha, files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    url: str

    def do_HEAD(self) -> None:
        self._serve_file()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            return self._serve_file()
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        if match is None:
            return self._answer(404, {"error": path})
        found = self.hub.find(match[1], match[3] or "main")
        if found is None:
            return self._not_found(match[1])
        sha, files = found
        if match[2] == "tree":
            return self._answer(200, [_tree_entry(p, data) for p, data in files.items()])
        siblings = [{"rfilename": name} for name in files]
        info = {"id": match[1], "modelId": match[1], "sha": sha, "siblings": siblings}
        return self._answer(200, {**info, "private": False, "tags": [], "downloads": 0})

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": "content does not match its name"})
        self.hub.large[oid] = data
        return self._answer(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said.get('organization') or 'me'}/{said['name']}"
            created = self.hub.create(repo)
            answer = {"url": f"{self.url}/{repo}"}
            return self._answer(200 if created else 409, answer)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._answer(
                200, {"objects": [self._lfs(o) for o in json.loads(body)["objects"]]}
            )
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if match is None or match[1] not in self.hub.commits:
            return self._not_found(path)
        repo, action, revision = match.groups()
        if action == "branch":
            self.hub.branches[repo].setdefault(revision, self.hub.branches[repo]["main"])
            return self._answer(200, {})
        if action == "preupload":
            return self._answer(
                200, {"files": [_upload_mode(file) for file in json.loads(body)["files"]]}
            )
        sha = self._commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        answer = {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha}
        return self._answer(200, {"success": True, **answer})

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> str:
        found = self.hub.find(repo, branch)
        assert found is not None
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        return self.hub.commit(repo, branch, files)

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/lfs/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload}}

    def _serve_file(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = self.hub.find(match[1], match[2]) if match else None
        if match is None or found is None:
            return self._not_found(path)
        sha, files = found
        headers = {"X-Repo-Commit": sha}
        if match[3] not in files:
            return self._answer(
                404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
            )
        data = files[match[3]]
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(200, data, {**headers, **etag}, "application/octet-stream")

    def _not_found(self, what: str) -> None:
        self._answer(404, {"error": what}, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), headers or {}, "application/json")

    def _send(self, status: int, data: bytes, headers: dict[str, str], kind: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: Any) -> None:
        pass


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def running_hub() -> Iterator[tuple[str, Hub]]:
    """Serve an empty Hub on a free port; gives its URL and what it holds."""
    handler = type("Handler", (_Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.url, handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
