"""A small local server that speaks as much of the Hub's HTTP API as its client needs for reading.

Serves folders as model and data set repositories with one revision each. No network is used.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Repository:
    """One repository: its files and the commit that stands for them."""

    def __init__(self, repo_id: str, folder: Path) -> None:
        self.repo_id = repo_id
        self.folder = folder
        self.files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        names = json.dumps(list(self.files)).encode()
        self.commit = hashlib.sha1(names + repo_id.encode()).hexdigest()

    def info(self) -> dict:
        return {
            "_id": self.commit[:24],
            "id": self.repo_id,
            "sha": self.commit,
            "private": False,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def entry(self, name: str) -> dict:
        path = self.files[name]
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest}

    def tree(self, prefix: str, recursive: bool) -> list[dict] | None:
        start = f"{prefix}/" if prefix else ""
        below = [name for name in self.files if name.startswith(start)]
        if not below and prefix:
            return None
        found, folders = [], set()
        for name in below:
            rest = name[len(start) :]
            if "/" in rest:
                folders.add(start + rest.split("/")[0])
                if not recursive:
                    continue
            found.append(self.entry(name))
        return found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[tuple[str, str], _Repository]
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}")
        repository, rest = self._find()
        if repository is None or rest[:1] != ["paths-info"]:
            return self._missing()
        paths = [asked["paths"]] if isinstance(asked["paths"], str) else asked["paths"]
        found = [repository.entry(path) for path in paths if path in repository.files]
        return self._json(found)

    def _find(self) -> tuple[_Repository | None, list[str]]:
        """(repository, the path's parts behind the repository's name)."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            parts = parts[1:]
        kind = "datasets" if parts[0] == "datasets" else "models"
        if parts[0] in ("models", "datasets"):
            parts = parts[1:]
        return self.repositories.get((kind, "/".join(parts[:2]))), parts[2:]

    def _answer(self, *, body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        repository, rest = self._find()
        if repository is None:
            return self._missing("RepoNotFound")
        if self.path.startswith("/api/"):
            if not rest or rest[0] == "revision":
                return self._json(repository.info())
            if rest[0] == "tree":
                query = urlsplit(self.path).query.lower()
                tree = repository.tree("/".join(rest[2:]), "recursive=true" in query)
                return self._missing("EntryNotFound") if tree is None else self._json(tree)
            return self._missing()
        if rest[:1] == ["resolve"] and "/".join(rest[2:]) in repository.files:
            return self._file(repository, repository.files["/".join(rest[2:])], body)
        return self._missing("EntryNotFound")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str = "EntryNotFound") -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _file(self, repository: _Repository, path: Path, body: bool) -> None:
        data = path.read_bytes()
        start = 0
        status = 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(status, data[start:], headers, body=body)

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str], *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """The test reads `requests`; nothing goes to the terminal."""


@contextmanager
def serve(models: Mapping[str, Path], datasets: Mapping[str, Path]) -> Iterator[tuple[str, list]]:
    """Serve folders as repositories: yields (the endpoint's address, the requests so far)."""
    found = {("models", name): _Repository(name, folder) for name, folder in models.items()}
    found |= {("datasets", name): _Repository(name, folder) for name, folder in datasets.items()}
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": found, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
