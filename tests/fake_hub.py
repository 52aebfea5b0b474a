"""A hub on loopback that answers what `huggingface_hub.snapshot_download` asks: revision, tree and files of a repo."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class FakeHub:
    """`repos`: id → file name → content. `requested`: the files that were downloaded."""

    def __init__(self, repos: dict[str, dict[str, bytes]], gated: frozenset[str] = frozenset()):
        self.repos = repos
        self.gated = gated
        self.requested: list[str] = []
        self.url = ""

    def answer(self, path: str, *, is_get: bool) -> tuple[int, dict[str, str], bytes]:
        """status, headers and body for one request."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if len(parts) < 4:
            return 404, {}, b""
        if parts[:2] == ["api", "models"]:
            repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repo, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo]
        if what == "revision":
            return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode()
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
            return 200, {}, json.dumps(rows).encode()
        name = "/".join(parts[4:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if is_get:
            self.requested.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[name]


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port; its `url` is set inside."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(is_get=True)

        def do_HEAD(self) -> None:
            self._reply(is_get=False)

        def _reply(self, *, is_get: bool) -> None:
            status, headers, body = hub.answer(self.path, is_get=is_get)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if is_get:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
