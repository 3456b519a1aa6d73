"""HTTP transfers with resume and retries: file metadata, file contents and repository listings.

huggingface_hub's own download discards a partial file when a transfer fails, and accepts bytes that do not
match their etag. So this module fetches over plain HTTP: large files over several connections, partial files
are kept, contents are hashed while they arrive, and the caller verifies them before they enter the cache. Xet
transfers cannot be resumed. Proxies are those of the environment (HTTPS_PROXY, ALL_PROXY, NO_PROXY).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from .. import __version__
from ..errors import FastFaceError, ModelUnavailableError
from .failures import (
    IncompleteError,
    StoppedError,
    explain,
    http_status,
    hub_token,
    no_hub,
    retry_after,
    token_origin,
)
from .manifest import Artifact, RemoteFile, whole_selection
from .partial import Part, PartialFile, TransferReport

if TYPE_CHECKING:  # imported where it is used: commands without transfers start faster
    import httpx2

log = logging.getLogger(__name__)

CONNECTIONS = 8
"""Number of connections for one file, at most; each fetches another part."""
RETRIES = 5
"""Number of retries after a temporary failure; a transfer that brought new bytes starts the count again."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most."""
PATIENCE = (10.0, 20.0, 40.0, 60.0)
"""Seconds without a byte after which the first, second, ... attempt counts as failed."""
_TEMPORARY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Announcement:
    """The metadata of a file that the server gives before the transfer.

    Args:
        url: address of the file.
        etag: SHA-256 (64 hex) of a large file, git blob hash (40 hex) of a small one, another value of a
            mirror, or empty.
        size: bytes, or None if unknown.
        commit: the commit of a Hub file, or None.
    """

    url: str
    etag: str
    size: int | None
    commit: str | None = None

    @property
    def names_sha256(self) -> bool:
        """Whether the etag is a SHA-256."""
        return re.fullmatch(r"[0-9a-f]{64}", self.etag) is not None


@dataclass(frozen=True)
class TransferResult:
    """A complete transfer.

    Args:
        sha256: hash (hex) of the file.
        resumed: whether the file contains bytes of an earlier call.
    """

    sha256: str
    resumed: bool


class _ExpiredError(Exception):
    """The address of the contents is no longer valid; the Hub gives a new one."""


class _NoRangesError(Exception):
    """The server sends only complete files."""


def is_offline() -> bool:
    """Whether the environment disables the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def endpoint() -> str:
    """The URL of the Hub, or of the mirror in HF_ENDPOINT; read at each call."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_url(artifact: Artifact, file: RemoteFile, commit: str | None = None) -> str:
    """The address of a Hub file.

    Args:
        artifact: names the repository.
        file: the file.
        commit: None is the pinned commit.
    """
    from huggingface_hub import hf_hub_url

    assert artifact.repo is not None
    return hf_hub_url(artifact.repo, file.path, revision=commit or artifact.commit, endpoint=endpoint())


@contextlib.contextmanager
def transfer_client(retries: int = RETRIES) -> Iterator[TransferClient]:
    """An HTTP client for any number of transfers.

    Args:
        retries: number of retries after a temporary failure.

    Raises:
        ModelUnavailableError: the proxy of the environment cannot be used.
    """
    import httpx2

    # Without compression, sizes and ranges refer to the bytes of the file.
    headers = {"User-Agent": f"fastface/{__version__}", "Accept-Encoding": "identity"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30)
    try:
        http = httpx2.Client(headers=headers, limits=limits)
    except (ImportError, ValueError) as error:
        raise ModelUnavailableError(
            f"the proxy of this environment cannot be used: {str(error).splitlines()[0]}",
            "set HTTPS_PROXY or ALL_PROXY to a proxy that starts with http://, https:// or socks5:// "
            "(SOCKS needs the package socksio: pip install socksio)",
        ) from error
    with http:
        yield TransferClient(http, retries)


class TransferClient:
    """Sends requests; several threads may use it.

    Args:
        http: the HTTP client. The token is sent to the Hub alone.
        retries: number of retries after a temporary failure.
    """

    def __init__(self, http: httpx2.Client, retries: int) -> None:
        self._http = http
        self.retries = retries
        self._rejected = False  # whether a server has rejected the token
        self.stopped = threading.Event()
        """Set it to end all transfers soon; received bytes are kept."""

    def announce(self, artifact: Artifact, file: RemoteFile) -> Announcement:
        """Request the metadata of a file: of a Hub file at its pinned commit, otherwise at its address.

        Raises:
            ModelUnavailableError: refused, not found, or unreachable.
        """
        if artifact.url is not None:
            with _explained(artifact, file.path, artifact.url):
                return _announced(self._request("HEAD", artifact.url), artifact.url)
        url = hub_url(artifact, file)
        with _explained(artifact, file.path, url):
            announced = _announced(self._request("HEAD", url, follow=False), url)
        if not announced.etag or announced.commit != artifact.commit:
            raise no_hub(artifact, file.path, url)
        return announced

    def fetch(
        self,
        artifact: Artifact,
        what: str,
        source: Announcement,
        partial: Path,
        report: TransferReport,
        check: Callable[[Announcement], None] | None = None,
    ) -> TransferResult:
        """Fetch a file into `partial`, and resume an earlier transfer.

        Args:
            artifact: the artifact that needs the file.
            what: the file, for messages.
            source: its URL, and what is known about it.
            partial: the target; contains the bytes of an earlier transfer, if any.
            report: called with each change in bytes, by one thread at a time.
            check: called with the announcement of a Hub file before its contents are received; raises to
                refuse them.

        Raises:
            ModelUnavailableError: the received bytes stay in `partial` for the next attempt.
        """
        with (
            _explained(artifact, what, source.url, partial),
            PartialFile(partial, source.size, report) as target,
        ):
            resumed = target.done > 0
            try:
                _FileTransfer(self, source, target, check).run()
            except _NoRangesError:
                target.restart(divide=False)
                _FileTransfer(self, source, target, check).run()
            return TransferResult(target.finish(), resumed and target.kept)

    def list_folder(self, artifact: Artifact) -> tuple[RemoteFile, ...]:
        """The files of a reference to an entire folder, with sizes and hashes.

        Raises:
            ModelUnavailableError: refused, not found, or unreachable.
        """
        assert artifact.repo is not None
        url = f"{endpoint()}/api/models/{artifact.repo}/tree/{quote(str(artifact.commit))}?recursive=true"
        files: dict[str, RemoteFile] = {}
        with _explained(artifact, artifact.folder or "its list of files", f"{endpoint()}/{artifact.repo}"):
            page: str | None = url
            while page is not None:
                response = self._request("GET", page)
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

    def _request(self, method: str, url: str, *, follow: bool = True) -> httpx2.Response:
        """Send a request, and repeat it after temporary failures; returns the complete response."""
        retry = Retry(url, self.stopped, self.retries)
        while True:
            try:
                with self.send(method, url, {}, retry.patience, follow=follow) as response:
                    response.read()
                return response
            except Exception as error:
                retry.wait(error)

    @contextlib.contextmanager
    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        patience: float,
        *,
        follow: bool = True,
        observe: Callable[[httpx2.Response], None] | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send a request and follow redirects; yields the response before its contents are received.

        Args:
            method, url, headers: of the request.
            patience: seconds without a byte after which it fails.
            follow: follow all redirects; False stops at the response that names the contents of a file.
            observe: called with each response of the chain.
        """
        for _ in range(10):
            response = self._once(method, url, headers, patience)
            try:
                if not response.has_redirect_location:
                    response.raise_for_status()
                if observe is not None:
                    observe(response)
                redirect = response.next_request
                # A redirect within the Hub leads to a renamed repository, another one to the contents.
                names_contents = redirect is None or (
                    "X-Linked-Etag" in response.headers or redirect.url.netloc != response.url.netloc
                )
                if redirect is None or (names_contents and not follow):
                    yield response
                    return
            finally:
                response.close()
            url = str(redirect.url)
        raise IncompleteError("too many redirects")

    def _once(self, method: str, url: str, headers: dict[str, str], patience: float) -> httpx2.Response:
        """Send one request; a rejected token is left out of a second one."""
        use_token = url.startswith(endpoint() + "/") and not self._rejected
        token = hub_token() if use_token else None
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        response = self._send_plain(method, url, headers | authorization, patience)
        if token and response.status_code in (401, 403):
            response.close()
            public = self._send_plain(method, url, headers, patience)
            if public.status_code < 400:
                if response.status_code == 401:  # the token itself is invalid, not the access to this file
                    self._rejected = True
                log.warning(
                    "%s rejected the token %s; continuing without it", urlsplit(url).netloc, token_origin()
                )
                return public
            public.close()
        return response

    def _send_plain(self, method: str, url: str, headers: dict[str, str], patience: float) -> httpx2.Response:
        import httpx2

        request = self._http.build_request(method, url, headers=headers, timeout=httpx2.Timeout(patience))
        return self._http.send(request, stream=True)


class _FileTransfer:
    """One file: requests its missing parts, over several connections."""

    def __init__(
        self,
        client: TransferClient,
        source: Announcement,
        target: PartialFile,
        check: Callable[[Announcement], None] | None,
    ) -> None:
        self.client, self.source, self.target, self.check = client, source, target, check
        self.location: str | None = None
        """Where the contents are, once the Hub has named it."""
        self._located, self._failed = threading.Event(), threading.Event()

    def run(self) -> None:
        """Fetch every missing part.

        Raises:
            _NoRangesError: the file must be requested as one part.
        """
        if self.target.parts[0].end is None:
            self._fill(self.target.parts[0])
        missing = [part for part in self.target.parts if not part.complete]
        calls = [functools.partial(self._fill, part) for part in missing]
        if len(missing) > 1:
            # The others wait until the first response has named the location of the contents.
            calls[1:] = [functools.partial(self._fill, part, later=True) for part in missing[1:]]
        run_all(CONNECTIONS, calls, self._failed)

    def _fill(self, part: Part, *, later: bool = False) -> None:
        """Fetch the rest of a part, and retry after temporary failures."""
        if later:
            self._located.wait()
        retry = Retry(self.source.url, self.client.stopped, self.client.retries)
        try:
            while not part.complete:
                self._check_running()
                before = part.done
                try:
                    self._receive(part, retry.patience)
                    if not part.complete:
                        raise IncompleteError(f"{part.start + part.done} of {part.end} bytes")
                except Exception as error:
                    if part.done > before:
                        retry.failures = 0
                    retry.wait(error)
            self.target.hash_ready_parts()
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._located.set()

    def _check_running(self) -> None:
        if self._failed.is_set() or self.client.stopped.is_set():
            raise StoppedError("the transfer was stopped")

    def _receive(self, part: Part, patience: float) -> None:
        """Append the contents of one response to a part."""
        location = self.location
        try:
            with self.client.send(
                "GET", location or self.source.url, self._range(part), patience, observe=self._observe
            ) as response:
                self._align(part, response)
                self.location = str(response.url)
                self._located.set()
                for block in response.iter_bytes():
                    self._check_running()
                    if part.complete:  # more bytes than announced: the hash will differ
                        break
                    left = None if part.end is None else part.end - part.start - part.done
                    self.target.write(part, block[:left])
            if part.end is None:  # nothing announced the size
                part.end = part.start + part.done
        except Exception as error:
            status = http_status(error)
            if location not in (None, self.source.url) and status in (401, 403, 404, 410):
                self.location = None
                raise _ExpiredError(f"HTTP {status}") from error
            if status == 416:  # the file on the server is shorter than the partial file
                if len(self.target.parts) > 1:
                    raise _NoRangesError from error
                self.target.restart(divide=False)
                raise IncompleteError("nothing is left to send") from error
            raise

    def _range(self, part: Part) -> dict[str, str]:
        """The header that requests the rest of a part."""
        first, last = part.start + part.done, ""
        if part.end is None:
            last = str(self.target.step - 1)  # the response names the size
        elif part is not self.target.parts[-1]:
            last = str(part.end - 1)
        elif not first:
            return {}
        return {"Range": f"bytes={first}-{last}"}

    def _align(self, part: Part, response: httpx2.Response) -> None:
        """Compare the range of a response with the requested one, and take the size from it."""
        header = response.headers.get("Content-Range", "")
        first = part.start + part.done
        if response.status_code == 206 and header.startswith(f"bytes {first}-"):
            size = header.rpartition("/")[2]
            if part.end is None and size.isdigit():
                self.target.set_size(int(size))
        elif len(self.target.parts) > 1:
            raise _NoRangesError
        elif first:
            self.target.restart(divide=False)  # the server ignores ranges and sends the file from the start

    def _observe(self, response: httpx2.Response) -> None:
        """Compare what the Hub announces with what is expected, before the contents arrive."""
        on_hub = str(response.url).startswith(endpoint() + "/")
        announces = not response.is_redirect or "X-Linked-Etag" in response.headers
        if self.check is not None and on_hub and announces:
            self.check(_announced(response, self.source.url))


class Retry:
    """The retry policy of every request: waits before another attempt after a temporary failure.

    Args:
        url: for the log.
        stopped: ends a pause.
        retries: number of retries.
    """

    def __init__(self, url: str, stopped: threading.Event, retries: int) -> None:
        self.host = urlsplit(url).netloc
        self.stopped = stopped
        self.retries = retries
        self.failures = 0

    @property
    def patience(self) -> float:
        """Seconds that the next attempt may wait for a byte."""
        return PATIENCE[min(self.failures, len(PATIENCE) - 1)]

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt; raise `error` if it is permanent or there were too many failures."""
        if self.failures >= self.retries or not _is_temporary(error):
            raise error
        seconds = min(retry_after(error) or 2.0**self.failures, LONGEST_PAUSE)
        self.failures += 1
        status = http_status(error)
        reason = f"HTTP {status}" if status else type(error).__name__.strip("_")
        log.info("%s: temporary failure (%s); trying again in %g s", self.host, reason, seconds)
        pause(seconds, self.stopped)
        if self.stopped.is_set():
            raise StoppedError("the transfer was stopped")


def run_all(workers: int, calls: Sequence[Callable[[], None]], stopped: threading.Event) -> None:
    """Run calls in threads; the first failure stops the others and is raised.

    Args:
        workers: number of threads, at most.
        calls: end soon once `stopped` is set.
        stopped: set at a failure; the calls observe it.
    """

    def run(call: Callable[[], None]) -> None:
        try:
            if stopped.is_set():
                raise StoppedError("the transfer was stopped")
            call()
        except BaseException:
            stopped.set()
            raise

    if len(calls) <= 1:
        for call in calls:
            run(call)
        return
    with ThreadPoolExecutor(min(workers, len(calls))) as pool:
        futures = [pool.submit(run, call) for call in calls]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C arrives here, in the main thread
            stopped.set()
            raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, StoppedError))


def pause(seconds: float, stopped: threading.Event) -> None:
    """Wait, unless the transfers are stopped."""
    stopped.wait(seconds)


def _announced(response: httpx2.Response, url: str) -> Announcement:
    """What the headers of a response say about a file."""
    headers = response.headers
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    length = headers.get("X-Linked-Size")
    if length is None and not response.is_redirect:
        complete = headers.get("Content-Range", "").rpartition("/")[2]
        length = complete or headers.get("Content-Length")
    size = int(length) if length is not None and length.isdigit() else None
    return Announcement(url, etag, size, headers.get("X-Repo-Commit"))


def _is_temporary(error: Exception) -> bool:
    import httpx2

    temporary = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    if isinstance(error, (*temporary, IncompleteError, _ExpiredError)):
        return True
    return http_status(error) in _TEMPORARY


@contextlib.contextmanager
def _explained(artifact: Artifact, what: str, url: str, partial: Path | None = None) -> Iterator[None]:
    """Turn every failure of the network or the disk into a message with a hint."""
    try:
        yield
    except FastFaceError:  # also that of an observer, which ends the transfer
        raise
    except Exception as error:
        raise explain(error, artifact, what, url, partial) from error
