"""One file over the network: asked about, fetched, resumed. huggingface_hub and pooch do the talking.

huggingface_hub's `hf_hub_download` throws a partial file away when a transfer fails, and accepts bytes that
do not match their etag. So its two building blocks are used instead: `get_hf_file_metadata`, and `http_get`,
which resumes; the partial file is ours, and nothing enters the cache before its hash was checked. Xet
transfers are faster but start over after an interruption, so plain HTTP it is.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import __version__, console
from ..errors import ModelUnavailableError
from .manifest import Artifact, RemoteFile, whole_selection

TransferReport = Callable[[int], None]
"""Told of each change in the number of bytes on disk."""

RETRIES = 3
"""How often a busy server, or a broken connection that brought nothing new, is tried again."""
CHUNK = 1 << 20
_BUSY = (429, 500, 502, 503, 504)
_UNREACHABLE = {"ConnectError", "TimeoutException", "ProxyError", "ConnectionError", "Timeout"}
_CUT = {"RemoteProtocolError", "ReadError", "ProtocolError", "ChunkedEncodingError"}


@dataclass(frozen=True)
class Announcement:
    """What the server says of a file before it is fetched.

    Args:
        etag: SHA-256 (64 hex) of a large file, git's SHA-1 (40 hex) of a small one, or a mirror's own.
        size: bytes, or None where the server does not say.
    """

    url: str
    etag: str
    size: int | None


class SourceError(ModelUnavailableError):
    """The place that a file comes from does not give it; another place might."""


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def endpoint() -> str:
    """The Hub, or the mirror that HF_ENDPOINT names; read at each call."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def announce(artifact: Artifact, file: RemoteFile) -> Announcement:
    """Ask the Hub about a file at its pinned commit.

    Raises:
        ModelUnavailableError: not allowed, not there, not reachable.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    assert artifact.repo is not None
    url = hf_hub_url(artifact.repo, file.path, revision=artifact.commit, endpoint=endpoint())
    with _quiet_hub(), _explained(artifact, file.path, url):
        for attempt in range(RETRIES + 1):
            try:
                found = get_hf_file_metadata(url, token=_token(), endpoint=endpoint())
                break
            except Exception as error:
                status = _status(error)
                if attempt == RETRIES or status not in _BUSY:
                    raise
                pause = _pause(error, attempt)
                console.note(f"{urlsplit(url).netloc} is busy (HTTP {status}); trying again in {pause:g} s")
                time.sleep(pause)
    if not found.etag or found.commit_hash != artifact.commit:
        raise SourceError(
            f"{urlsplit(url).netloc} does not answer like the Hugging Face Hub when asked for {file.path} "
            f"of {artifact.name}",
            "check HF_ENDPOINT and the proxy of your network",
        )
    return Announcement(url, found.etag, found.size)


def fetch(
    artifact: Artifact, file: RemoteFile, said: Announcement, partial: Path, report: TransferReport
) -> bool:
    """Fetch a Hub file into `partial`, going on where an earlier transfer stopped.

    Returns:
        Whether bytes of an earlier transfer were kept.

    Raises:
        ModelUnavailableError: with what arrived kept in `partial` for the next attempt.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=_token(), library_name="fastface", library_version=__version__)
    headers["Accept-Encoding"] = "identity"
    started = partial.stat().st_size if partial.exists() else 0
    if started and (said.size is None or started > said.size):
        partial.unlink()
        report(-started)
        started = 0
    with _quiet_hub(), _explained(artifact, file.path, said.url, partial):
        fruitless = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                with _CountingFile(partial, report) as target:
                    http_get(said.url, target, resume_size=before, headers=headers, expected_size=said.size)
                return started > 0
            except Exception as error:
                fruitless = 0 if partial.stat().st_size > before else fruitless + 1
                if not _names(error) & _CUT or fruitless > RETRIES:
                    raise
                time.sleep(_pause(error, fruitless))


def fetch_url(artifact: Artifact, url: str, target: Path, report: TransferReport) -> None:
    """Fetch a file that is not on the Hub, whole, with pooch.

    Raises:
        ModelUnavailableError: not there, not reachable.
    """
    import pooch

    logger = logging.getLogger("pooch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with _explained(artifact, url.rsplit("/", 1)[-1], url):
            pooch.retrieve(
                url,
                known_hash=None,
                fname=target.name,
                path=target.parent,
                downloader=pooch.HTTPDownloader(
                    progressbar=_PoochBar(report), chunk_size=CHUNK, timeout=(10, 60)
                ),
            )
    finally:
        logger.setLevel(level)


def list_folder(artifact: Artifact) -> tuple[RemoteFile, ...]:
    """The files that a whole-folder Hub reference means, with sizes and hashes.

    Raises:
        ModelUnavailableError: not allowed, not there, not reachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    assert artifact.repo is not None
    where = f"{endpoint()}/{artifact.repo}"
    with _quiet_hub(), _explained(artifact, artifact.folder or "its list of files", where):
        entries = HfApi(endpoint=endpoint(), token=_token()).list_repo_tree(
            artifact.repo, revision=artifact.commit, recursive=True
        )
        files = {
            entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }
    wanted = whole_selection(sorted(files), artifact.folder)
    if not wanted:
        raise ModelUnavailableError(
            f"{artifact.name} holds no model files", "name one of its files after a ':'"
        )
    return tuple(files[path] for path in wanted)


class _CountingFile(io.BufferedWriter):
    """Appends to a file and reports every change of its length."""

    def __init__(self, path: Path, report: TransferReport) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._report = report

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._report(written)
        return written

    def truncate(self, size: int | None = None) -> int:
        self.flush()
        before = os.fstat(self.fileno()).st_size
        after = super().truncate(size)
        self._report(after - before)
        return after


class _PoochBar:
    """What pooch expects of a progress bar, passed on as changes of length."""

    def __init__(self, report: TransferReport) -> None:
        self._report = report
        self._seen = 0
        self.total = 0

    def update(self, amount: int) -> None:
        self._report(amount)
        self._seen += amount

    def reset(self) -> None:
        self._report(-self._seen)
        self._seen = 0

    def close(self) -> None:
        self._seen = 0


def _token() -> str | bool:
    """The user's token, or False: then none is sent."""
    from huggingface_hub import get_token

    return get_token() or False


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """huggingface_hub neither prints nor waits for 10 MB before it hands over bytes.

    Whether the network may be used is the store's decision, whatever was set when the library was imported.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level, loud = logger.level, not are_progress_bars_disabled()
    chunk, offline = constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_OFFLINE = CHUNK, False
    if loud:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_OFFLINE = chunk, offline
        if loud:
            enable_progress_bars()


@contextlib.contextmanager
def _explained(artifact: Artifact, what: str, url: str, partial: Path | None = None) -> Iterator[None]:
    """Every failure of the network or the disk becomes one sentence and a next step."""
    try:
        yield
    except ModelUnavailableError:
        raise
    except Exception as error:
        raise explain(error, artifact, what, url, partial) from error


def explain(
    error: Exception, artifact: Artifact, what: str, url: str, partial: Path | None = None
) -> ModelUnavailableError:
    """The failure of one transfer in the user's words.

    Args:
        error: what huggingface_hub, pooch or the file system raised.
        what: the file that was wanted.
        url: where from.
        partial: what holds the bytes that did arrive.
    """
    subject = f"{artifact.name} ({what})" if what not in artifact.name else artifact.name
    host = urlsplit(url).netloc
    status = _status(error)
    if status is not None:
        return SourceError(*_refused(status, error, artifact, subject, url))
    names = _names(error)
    if isinstance(error, OSError) and error.errno is not None and not names & (_UNREACHABLE | _CUT):
        return disk_error(error, f"cannot write {subject}", partial)
    arrived = partial.stat().st_size if partial is not None and partial.exists() else 0
    if names & _CUT or "Consistency check" in str(error) or (arrived and names & _UNREACHABLE):
        return SourceError(
            f"the transfer of {subject} from {host} broke off"
            + (f" after {arrived:,} bytes" if arrived else ""),
            "run the same command again" + (": it goes on where it stopped" if arrived else ""),
        )
    if names & _UNREACHABLE:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return SourceError(
            f"cannot reach {host} for {subject}: {reason}",
            "check the connection and the proxy; HF_ENDPOINT names a mirror; "
            "`fastface generate --recipe pocket` needs no network",
        )
    return SourceError(
        f"cannot fetch {subject} from {host}: {type(error).__name__}: {error}",
        "run the same command again; FASTFACE_DEBUG=1 shows all of it",
    )


def _refused(status: int, error: Exception, artifact: Artifact, subject: str, url: str) -> tuple[str, str]:
    host = urlsplit(url).netloc
    if status in (401, 403):
        return (
            f"{host} does not give {subject} to this account (HTTP {status})",
            f"accept its terms at {artifact.page}, then set HF_TOKEN to a token of that account"
            + (" (the HF_TOKEN that is set was not accepted)" if os.environ.get("HF_TOKEN") else ""),
        )
    if status in (404, 410):
        return (
            f"{subject} is not at {url} any more (HTTP {status})",
            "set HF_ENDPOINT to a mirror that has it, or name a local copy in the recipe",
        )
    if status == 429:
        wait = _retry_after(error)
        return (
            f"{host} answers that too many requests came from here (HTTP 429) while fetching {subject}",
            f"wait {f'{wait} seconds' if wait else 'some minutes'} and run the same command again; "
            "a HF_TOKEN raises the limit",
        )
    return (
        f"{host} fails on {subject} (HTTP {status})",
        "run the same command again later: it goes on where it stopped",
    )


def disk_error(error: OSError, action: str, path: Path | None = None) -> ModelUnavailableError:
    """What the file system refused, and what to do about it."""
    place = path or error.filename
    where = f" in {Path(place).parent}" if place else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelUnavailableError(
            f"{action}: the disk is full{where}",
            "free some room (`fastface cache list` shows what is there) and run the same command again, "
            "or set FASTFACE_HOME to a folder on a larger disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelUnavailableError(
            f"{action}: no permission to write{where}",
            "set FASTFACE_HOME (or HF_HUB_CACHE) to a folder that is yours",
        )
    return ModelUnavailableError(
        f"{action}: {error.strerror or error}: {place}" if place else f"{action}: {error.strerror or error}",
        "set FASTFACE_HOME to a folder that can be written",
    )


def _names(error: BaseException) -> set[str]:
    """Names of the error's classes: the HTTP library under huggingface_hub has changed its name before."""
    return {cls.__name__ for cls in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: BaseException) -> int | None:
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return int(value) if str(value).isdigit() else None


def _pause(error: BaseException, attempt: int) -> float:
    return min(_retry_after(error) or 2**attempt, 30)
