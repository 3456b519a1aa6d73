"""A real HTTP server on loopback that speaks the Hub's resolve protocol, and can be made to fail.

Large files are redirected to a second server, as the Hub redirects to its CDN; both log what was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 33 + "1"
LARGE = 1000
"""Files of at least this many bytes are kept like LFS files: named by SHA-256, served by the CDN."""


@dataclass
class Request:
    """One request that was seen."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    cdn: bool


@dataclass
class Hub:
    """What is served, and how it misbehaves; tests change the fields while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)
    """`owner/name/path` -> content, all at COMMIT."""
    plain: dict[str, bytes] = field(default_factory=dict)
    """Paths served without any protocol, for files that are not on the Hub."""
    status: dict[str, int] = field(default_factory=dict)
    """`owner/name` or a plain path -> the HTTP status that every request for it gets."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with each refusal."""
    served: dict[str, bytes] = field(default_factory=dict)
    """`owner/name/path` -> bytes that are sent in place of those announced."""
    etags: dict[str, str] = field(default_factory=dict)
    """`owner/name/path` of a small file -> its etag in place of git's SHA-1."""
    cuts: list[int] = field(default_factory=list)
    """The next transfers of large files break off after this many bytes each."""
    refusals: list[int] = field(default_factory=list)
    """The next transfers of large files are refused with these HTTP statuses; 0 is none."""
    stalls: list[float] = field(default_factory=list)
    """The next requests are answered after this many seconds each."""
    latency: float = 0.0
    """Seconds before each answer."""
    rate: float = 0.0
    """Bytes per second and connection of large files; 0 is unlimited."""
    pause: float = 0.0
    """Seconds between pieces of 64 kB."""
    busy: int = 0
    """Number of large files or ranges that are sent now."""
    peak: int = 0
    """The largest value of `busy`."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Guards the lists and counters above."""
    ranges: bool = True
    """Whether Range is understood."""
    token: str | None = None
    """The token without which everything is refused."""
    stale: str | None = None
    """A token that is refused, although public files need none."""
    redirects: bool = False
    """Whether small files are redirected within the Hub, as huggingface.co does."""
    commit: str = COMMIT
    """The commit at which the files are."""
    log: list[Request] = field(default_factory=list)
    url: str = ""
    cdn: str = ""

    def asked(self, method: str = "GET", part: str = "") -> list[Request]:
        """The requests of one method whose path contains `part`."""
        return [request for request in self.log if request.method == method and part in request.path]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a Hub and its CDN on loopback."""
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), _handler(hub, cdn)) for cdn in (False, True)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that downloads from the Hub into a folder of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {
        "FASTFACE_HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.url,
        "NO_PROXY": "127.0.0.1",
    }


def sha256(content: bytes) -> str:
    """SHA-256 in hex; content that knows its own is not read."""
    return getattr(content, "sha256", None) or hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what some tests are about."""


def _handler(hub: Hub, cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            with hub.lock:
                stall = hub.stalls.pop(0) if hub.stalls else 0.0
            time.sleep(stall + hub.latency)
            path = unquote(urlsplit(self.path).path)
            hub.log.append(
                Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"), cdn)
            )
            if cdn:
                self._cdn(path.removeprefix("/cdn/"))
            elif path in hub.plain or path in hub.status:
                if path in hub.status:
                    self._refuse(hub.status[path])
                else:
                    self._content(hub.plain[path])
            elif path.startswith("/api/resolve-cache/models/"):
                owner, name, _commit, file = path.removeprefix("/api/resolve-cache/models/").split("/", 3)
                self._small(f"{owner}/{name}/{file}", announce=self.command == "HEAD")
            elif path.startswith("/api/models/"):
                self._tree(*path.removeprefix("/api/models/").split("/tree/"))
            else:
                self._resolve(path.lstrip("/"))

        def _cdn(self, key: str) -> None:
            with hub.lock:
                refusal = hub.refusals.pop(0) if hub.refusals else 0
                hub.busy += 1
                hub.peak = max(hub.peak, hub.busy)
            if refusal:
                self._refuse(refusal)
            else:
                self._content(hub.served.get(key, hub.files[key]), cuttable=True)
            with hub.lock:
                hub.busy -= 1

        def _resolve(self, path: str) -> None:
            repo, _, rest = path.partition("/resolve/")
            commit, _, file = rest.partition("/")
            key = f"{repo}/{file}"
            if repo in hub.status:
                self._refuse(hub.status[repo])
            elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._refuse(401, {"X-Error-Code": "GatedRepo"})
            elif hub.stale and self.headers.get("Authorization") == f"Bearer {hub.stale}":
                self._refuse(401)
            elif commit != hub.commit:
                self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
            elif key not in hub.files:
                self._refuse(404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._file(key, hub.files[key])

        def _file(self, key: str, content: bytes) -> None:
            if len(content) < LARGE and hub.redirects:
                owner, name, file = key.split("/", 2)
                location = f"/api/resolve-cache/models/{owner}/{name}/{hub.commit}/{file}"
                self._head(307, {"Location": location}, 0)
                return
            if len(content) < LARGE:
                self._small(key, announce=True)
                return
            about = {
                "X-Repo-Commit": hub.commit,
                "X-Linked-Etag": f'"{sha256(content)}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{hub.cdn}/cdn/{key}",
            }
            self._head(302, about, 0)

        def _small(self, key: str, *, announce: bool) -> None:
            content = hub.files[key]
            about = {"ETag": f'"{hub.etags.get(key, git_sha1(content))}"'}
            if announce:
                about["X-Repo-Commit"] = hub.commit
            self._content(hub.served.get(key, content), about)

        def _tree(self, repo: str, _commit: str) -> None:
            if repo in hub.status:
                self._refuse(hub.status[repo])
                return
            entries = []
            for key, content in hub.files.items():
                if not key.startswith(repo + "/"):
                    continue
                entry = {
                    "type": "file",
                    "path": key.removeprefix(repo + "/"),
                    "size": len(content),
                    "oid": git_sha1(content),
                }
                if len(content) >= LARGE:
                    entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._content(json.dumps(entries).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
            self._head(status, {**hub.headers, **(headers or {})}, 0)

        def _head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()

        def _content(
            self, content: bytes, headers: dict[str, str] | None = None, *, cuttable: bool = False
        ) -> None:
            asked = self.headers.get("Range") if hub.ranges else None
            start, end = 0, len(content)
            extra = dict(headers or {})
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), min(end, int(last) + 1) if last else end
                if start >= len(content):
                    self._refuse(416)
                    return
                extra["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._head(206 if asked else 200, extra, end - start)
            if self.command == "HEAD":
                return
            with hub.lock:
                cut = hub.cuts.pop(0) if cuttable and hub.cuts else None
            end = end if cut is None else min(end, start + cut)
            began = time.monotonic()
            for place in range(start, end, 1 << 16):
                self.wfile.write(memoryview(content)[place : min(place + (1 << 16), end)])
                if hub.rate and cuttable:
                    time.sleep(max(0.0, began + (place + (1 << 16) - start) / hub.rate - time.monotonic()))
                if hub.pause:
                    time.sleep(hub.pause)
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

    return Handler
