"""A hub that answers what huggingface_hub asks for, and misbehaves where it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".parquet", ".gguf", ".bin")
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(.*))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Commits with their files, and branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + b"\0" + content)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass
class FakeHub:
    """What the hub holds, how it misbehaves, and what it was asked for."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    """File to `half` (cut off, then refused), `wrong` (a byte is another) or `huge` (in lists)."""
    fetched: list[str] = field(default_factory=list)
    """Files that were sent, in order."""
    url: str = ""

    def repository(self, kind: str, name: str) -> Repository:
        return self.repositories.setdefault((kind, name), Repository())

    def listed(self, path: str, content: bytes) -> dict[str, Any]:
        size = 10**15 if self.faults.get(path) == "huge" else len(content)
        entry: dict[str, Any] = {
            "type": "file", "path": path, "size": size, "oid": _blob_hash(content),
        }  # fmt: skip
        if path.endswith(_LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _API.fullmatch(path):
            kind, name, what, revision, rest = found.groups()
            files = self._files(kind, name, revision or "main")
            if files is not None:
                self._api(name, what, rest, *files)
        elif found := _FILE.fullmatch(path):
            prefix, name, revision, file = found.groups()
            files = self._files("datasets" if prefix else "models", name, revision)
            if files is not None:
                self._file(file, *files)
        else:
            self._refuse(404, "EntryNotFound")

    def _files(
        self, kind: str, name: str, revision: str
    ) -> tuple[Repository, str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    def _api(
        self, name: str, what: str, rest: str, repository: Repository, commit: str,
        files: dict[str, bytes],
    ) -> None:  # fmt: skip
        if what == "paths-info":
            length = int(self.headers["Content-Length"])
            paths = json.loads(self.rfile.read(length))["paths"]
            found = [self.hub.listed(path, files[path]) for path in paths if path in files]
            folders = {path for path in paths if any(file.startswith(f"{path}/") for file in files)}
            return self._send(
                [*found, *({"type": "directory", "path": f, "oid": "0" * 40} for f in folders)]
            )
        if what == "tree":
            under = rest.strip("/")
            inside = {f: c for f, c in files.items() if not under or f.startswith(f"{under}/")}
            if "recursive=true" not in self.path.lower():
                depth = len(under.split("/")) if under else 0
                folders = {
                    "/".join(f.split("/")[: depth + 1]) for f in inside if f.count("/") > depth
                }
                inside = {f: c for f, c in inside.items() if f.count("/") == depth}
            else:
                folders = set()
            return self._send(
                [{"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)]
                + [self.hub.listed(path, content) for path, content in inside.items()]
            )
        self._send(
            {
                "id": name, "sha": commit, "private": False, "gated": repository.is_gated,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )  # fmt: skip

    def _file(
        self, path: str, repository: Repository, commit: str, files: dict[str, bytes]
    ) -> None:
        if repository.is_gated:
            return self._refuse(403, "GatedRepo")
        if path not in files:
            return self._refuse(404, "EntryNotFound", commit)
        fault, content = self.hub.faults.get(path), files[path]
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "refused" and self.command == "GET":
            return self._refuse(503, "")
        entry = self.hub.listed(path, files[path])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{entry["oid"]}"')
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", f'"{entry["lfs"]["oid"]}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "half":
            self.hub.faults[path] = "refused"
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        self.hub.fetched.append(path)
        return None

    def _send(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Let the hub answer, at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
