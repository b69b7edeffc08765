"""A Hugging Face Hub of this machine's own: files with ETags and a commit, gates, and downloads that break."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_a_reader"


@dataclasses.dataclass
class Hub:
    """What the server has, and what it was asked.

    Attributes:
        repos: files by name, by repository.
        gated: repositories that TOKEN alone may read.
        private: likewise, and nobody else learns that they exist.
        breaks: how often a download of a file of these is cut in its middle.
        asked: method, path and Range of every request.
    """

    repos: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    gated: set[str] = dataclasses.field(default_factory=set)
    private: set[str] = dataclasses.field(default_factory=set)
    breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    endpoint: str = ""

    def add(self, repo: str, folder: Path, *names: str) -> None:
        """Puts files of a folder into a repository."""
        self.repos.setdefault(repo, {}).update({name: (folder / name).read_bytes() for name in names})

    def downloads(self, name: str) -> list[str]:
        """The Range of every GET of a file."""
        return [ranged for method, path, ranged in self.asked if method == "GET" and path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does, as far as a download goes."""

    hub: Hub

    def log_message(self, *given: Any) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = found or file
        repo, revision = (match[1], match[2] or "main") if match else ("", "")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in hub.repos or (repo in hub.private and not known):
            return self.refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if found:
            siblings = [{"rfilename": name} for name in hub.repos[repo]]
            return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), "api")
        if repo in hub.gated and not known:
            return self.refuse(403, "GatedRepo")
        assert file is not None
        if file[3] not in hub.repos[repo]:
            return self.refuse(404, "EntryNotFound")
        return self.send(hub.repos[repo][file[3]], file[3])

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, name: str) -> None:
        start = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks.get(name, 0):
            self.hub.breaks[name] -= 1
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(body[start:])


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serves a hub while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
