"""HTTP transfers with resume and retries: file metadata, file contents and repository listings.

huggingface_hub's own download discards a partial file when a transfer fails, and accepts bytes that do not
match their etag. So this module fetches over plain HTTP: partial files are kept, contents are hashed while
they arrive, and the caller verifies them before they enter the cache. Xet transfers cannot be resumed.
Proxies are those of the environment (HTTPS_PROXY, NO_PROXY).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from .. import __version__
from ..errors import ModelUnavailableError
from .links import open_for_writing
from .manifest import Artifact, RemoteFile, whole_selection

if TYPE_CHECKING:  # imported where it is used: commands without transfers start faster
    import httpx2

log = logging.getLogger(__name__)

TransferReport = Callable[[int], None]
"""Called with each change in the number of bytes on disk."""

RETRIES = 3
"""Number of retries after a temporary failure; a transfer that brought new bytes starts the count again."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most."""
CHUNK = 1 << 20
_TEMPORARY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Announcement:
    """The metadata of a file that the server gives before the transfer.

    Args:
        url: address of the file.
        etag: SHA-256 (64 hex) of a large file, git blob hash (40 hex) of a small one, another value of a
            mirror, or empty.
        size: bytes, or None if unknown.
    """

    url: str
    etag: str
    size: int | None


@dataclass(frozen=True)
class TransferResult:
    """A complete transfer.

    Args:
        sha256: hash (hex) of the file.
        resumed: whether the file contains bytes of an earlier call.
    """

    sha256: str
    resumed: bool


class SourceError(ModelUnavailableError):
    """A source cannot provide a file; another source might."""


class _IncompleteError(Exception):
    """The server ended a transfer early without an error."""


def is_offline() -> bool:
    """Whether the environment disables the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def endpoint() -> str:
    """The URL of the Hub, or of the mirror in HF_ENDPOINT; read at each call."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def announce(artifact: Artifact, file: RemoteFile) -> Announcement:
    """Request the metadata of a Hub file at its pinned commit.

    Raises:
        ModelUnavailableError: refused, not found, or unreachable.
    """
    from huggingface_hub import hf_hub_url

    assert artifact.repo is not None
    url = hf_hub_url(artifact.repo, file.path, revision=artifact.commit, endpoint=endpoint())
    with _explained(artifact, file.path, url), _client(_hub_headers()) as client:
        response = _request(client, "HEAD", url)
        # A redirect to the CDN carries the metadata. One within the Hub leads to a renamed repository.
        while response.next_request is not None and "X-Linked-Etag" not in response.headers:
            target = response.next_request.url
            if target.netloc != response.url.netloc:
                break
            response = _request(client, "HEAD", str(target))
    headers = response.headers
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    if not etag or headers.get("X-Repo-Commit") != artifact.commit:
        raise SourceError(
            f"{urlsplit(url).netloc} does not answer like the Hugging Face Hub when asked for {file.path} "
            f"of {artifact.name}",
            "check HF_ENDPOINT and the proxy of your network",
        )
    length = headers.get("X-Linked-Size")
    if length is None and not response.is_redirect:
        length = headers.get("Content-Length")
    size = int(length) if length is not None and length.isdigit() else None
    return Announcement(url, etag, size)


def fetch(
    artifact: Artifact, what: str, announcement: Announcement, partial: Path, report: TransferReport
) -> TransferResult:
    """Fetch a file into `partial`, and resume an earlier transfer.

    Args:
        artifact: the artifact that needs the file.
        what: the file, for messages.
        announcement: its URL and size.
        partial: the target; contains the bytes of an earlier transfer, if any.
        report: called with each change in bytes.

    Raises:
        ModelUnavailableError: the received bytes stay in `partial` for the next attempt.
    """
    url, size = announcement.url, announcement.size
    headers = _hub_headers() if artifact.repo and url.startswith(endpoint() + "/") else {}
    with _explained(artifact, what, url, partial), PartialFile(partial, report) as target:
        if size is None or target.size > size:
            target.restart()
        resumed = target.size > 0
        retry = _Retry(url)
        with _client(headers) as client:
            while size is None or target.size < size:
                before = target.size
                try:
                    complete = _receive(client, url, target)
                    resumed = resumed and target.kept
                    if complete and (size is None or target.size >= size):
                        break
                    raise _IncompleteError(f"{target.size} of {size} bytes")
                except Exception as error:
                    if target.size > before:
                        retry.failures = 0
                    retry.wait(error)
        return TransferResult(target.digest.hexdigest(), resumed)


def _receive(client: httpx2.Client, url: str, target: PartialFile) -> bool:
    """Append the rest of a file to `target`; returns whether the response has ended."""
    headers = {"Range": f"bytes={target.size}-"} if target.size else {}
    with client.stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.status_code == 416:  # the file on the server is shorter than the partial file
            target.restart()
            return False
        response.raise_for_status()
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if target.size and (response.status_code != 206 or start != str(target.size)):
            target.restart()  # the server ignores ranges and sends the file from the start
        for block in response.iter_bytes():
            target.write(block)
    return True


def list_folder(artifact: Artifact) -> tuple[RemoteFile, ...]:
    """The files of a reference to an entire folder, with sizes and hashes.

    Raises:
        ModelUnavailableError: refused, not found, or unreachable.
    """
    assert artifact.repo is not None
    url = f"{endpoint()}/api/models/{artifact.repo}/tree/{quote(str(artifact.commit))}?recursive=true"
    files: dict[str, RemoteFile] = {}
    with (
        _explained(artifact, artifact.folder or "its list of files", f"{endpoint()}/{artifact.repo}"),
        _client(_hub_headers()) as client,
    ):
        page: str | None = url
        while page is not None:
            response = _request(client, "GET", page, follow_redirects=True)
            for entry in response.json():
                if entry["type"] == "file":
                    sha256 = entry["lfs"]["oid"] if entry.get("lfs") else None
                    files[entry["path"]] = RemoteFile(entry["path"], entry["size"], sha256)
            page = response.links.get("next", {}).get("url")
    selection = whole_selection(sorted(files), artifact.folder)
    if not selection:
        raise ModelUnavailableError(
            f"{artifact.name} contains no model files", "name one of its files after a ':'"
        )
    return tuple(files[path] for path in selection)


class PartialFile:
    """A file that grows during a transfer, with the hash of its contents.

    Args:
        path: the file; existing bytes are kept and hashed.
        report: called with each change in bytes.
    """

    def __init__(self, path: Path, report: TransferReport) -> None:
        self.digest = hashlib.sha256()
        self.kept = True
        self._report = report
        self._file = open_for_writing(path)
        while block := self._file.read(CHUNK):
            self.digest.update(block)
        self.size = self._file.tell()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, block: bytes) -> None:
        """Append bytes."""
        self._file.write(block)
        self.digest.update(block)
        self.size += len(block)
        self._report(len(block))

    def restart(self) -> None:
        """Discard everything."""
        self._file.seek(0)
        self._file.truncate()
        self._report(-self.size)
        self.digest, self.size, self.kept = hashlib.sha256(), 0, False


class _Retry:
    """Waits before another attempt after a temporary failure."""

    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc
        self.failures = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt; raise `error` if it is permanent or there were too many failures."""
        if self.failures >= RETRIES or not _is_temporary(error):
            raise error
        pause = min(_retry_after(error) or 2.0**self.failures, LONGEST_PAUSE)
        self.failures += 1
        status = _status(error)
        reason = f"HTTP {status}" if status else type(error).__name__
        log.info("%s: temporary failure (%s); trying again in %g s", self.host, reason, pause)
        time.sleep(pause)


def _request(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
    """Send a request and repeat it after temporary failures; a redirect is a success."""
    retry = _Retry(url)
    while True:
        try:
            response = client.request(method, url, **options)
            if not response.has_redirect_location:
                response.raise_for_status()
            return response
        except Exception as error:
            retry.wait(error)


def _client(headers: dict[str, str]) -> httpx2.Client:
    import httpx2

    # Without compression, sizes and ranges refer to the bytes of the file.
    fixed = {"User-Agent": f"fastface/{__version__}", "Accept-Encoding": "identity"}
    return httpx2.Client(headers=fixed | headers, timeout=httpx2.Timeout(60, connect=10))


def _hub_headers() -> dict[str, str]:
    """The token of the user, if any. The client drops it when a redirect leaves the Hub."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _is_temporary(error: Exception) -> bool:
    import httpx2

    if isinstance(error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)):
        return True
    return isinstance(error, _IncompleteError) or _status(error) in _TEMPORARY


@contextlib.contextmanager
def _explained(artifact: Artifact, what: str, url: str, partial: Path | None = None) -> Iterator[None]:
    """Turn every failure of the network or the disk into a message with a hint."""
    try:
        yield
    except ModelUnavailableError:
        raise
    except Exception as error:
        raise explain(error, artifact, what, url, partial) from error


def explain(
    error: Exception, artifact: Artifact, what: str, url: str, partial: Path | None = None
) -> ModelUnavailableError:
    """The error message for a failed transfer.

    Args:
        error: the exception of the HTTP client or the file system.
        artifact: the artifact that needs the file.
        what: the file.
        url: its address.
        partial: the file with the bytes received so far.
    """
    import httpx2

    subject = f"{artifact.name} ({what})" if what not in artifact.name else artifact.name
    host = urlsplit(url).netloc
    status = _status(error)
    if status is not None:
        return SourceError(*_refused(status, error, artifact, subject, url))
    if isinstance(error, OSError):
        return disk_error(error, f"cannot write {subject}", partial)
    arrived = partial.stat().st_size if partial is not None and partial.exists() else 0
    broken = isinstance(error, (_IncompleteError, httpx2.RemoteProtocolError, httpx2.ReadError))
    if broken or (arrived and isinstance(error, httpx2.TransportError)):
        return SourceError(
            f"the transfer of {subject} from {host} was interrupted"
            + (f" after {arrived:,} bytes" if arrived else ""),
            "run the same command again" + (": it resumes where it stopped" if arrived else ""),
        )
    if isinstance(error, httpx2.TransportError):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return SourceError(
            f"cannot reach {host} for {subject}: {reason}",
            "check the connection and the proxy; HF_ENDPOINT can name a mirror; "
            "`fastface generate --recipe pocket` needs no network",
        )
    return SourceError(
        f"cannot fetch {subject} from {host}: {type(error).__name__}: {error}",
        "run the same command again; FASTFACE_DEBUG=1 shows the traceback",
    )


def _refused(status: int, error: Exception, artifact: Artifact, subject: str, url: str) -> tuple[str, str]:
    host = urlsplit(url).netloc
    if status in (401, 403):
        return (
            f"{host} refuses this account access to {subject} (HTTP {status})",
            f"accept its terms at {artifact.page}, then set HF_TOKEN to a token of that account"
            + (" (the current HF_TOKEN was rejected)" if os.environ.get("HF_TOKEN") else ""),
        )
    if status in (404, 410):
        return (
            f"{subject} was not found at {url} (HTTP {status})",
            "set HF_ENDPOINT to a mirror that has it, or name a local copy in the recipe",
        )
    if status == 429:
        wait = _retry_after(error)
        return (
            f"{host} refuses {subject} because of too many requests (HTTP 429)",
            f"wait {f'{wait} seconds' if wait else 'a few minutes'} and run the same command again; "
            "an HF_TOKEN raises the limit",
        )
    return (
        f"{host} failed on {subject} (HTTP {status})",
        "run the same command again later: it resumes where it stopped",
    )


def disk_error(error: OSError, action: str, path: Path | None = None) -> ModelUnavailableError:
    """The error message for a failure of the file system."""
    place = path or error.filename
    where = f" in {Path(place).parent}" if place else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelUnavailableError(
            f"{action}: the disk is full{where}",
            "free some disk space (`fastface cache list` shows the downloaded models) and run the same "
            "command again, or set FASTFACE_HOME to a folder on a larger disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelUnavailableError(
            f"{action}: no permission to write{where}",
            "set FASTFACE_HOME (or HF_HUB_CACHE) to a folder that you can write to",
        )
    return ModelUnavailableError(
        f"{action}: {error.strerror or error}: {place}" if place else f"{action}: {error.strerror or error}",
        "set FASTFACE_HOME to a writable folder",
    )


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: BaseException) -> int | None:
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return int(value) if str(value).isdigit() else None
