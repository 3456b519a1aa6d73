"""Failures of transfers, explained: what happened and what to do about it."""

from __future__ import annotations

import errno
import os
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import ModelUnavailableError
from .manifest import Artifact
from .partial import received_bytes


class SourceError(ModelUnavailableError):
    """A source cannot provide a file; another source might.

    Args:
        message, hint: see `FastFaceError`.
        status: HTTP status, if the server answered.
    """

    def __init__(self, message: str, hint: str | None = None, status: int | None = None) -> None:
        super().__init__(message, hint)
        self.status = status


class StoppedError(ModelUnavailableError):
    """The transfer was stopped because another one failed or the user interrupted it."""


class IncompleteError(Exception):
    """The server ended a transfer early without an error."""


def hub_token() -> str | None:
    """The token of the user, if any."""
    from huggingface_hub import get_token

    return get_token()


def token_origin() -> str:
    """Where the token of the user is from, for messages."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"in {name}"
    if os.path.isfile(constants.HF_TOKEN_PATH):
        return f"in {constants.HF_TOKEN_PATH}"
    return "of this account"


def no_hub(artifact: Artifact, path: str, url: str) -> SourceError:
    """The error for a server that answers, but not like the Hub."""
    return SourceError(
        f"{urlsplit(url).netloc} does not answer like the Hugging Face Hub when asked for {path} "
        f"of {artifact.name}",
        "check HF_ENDPOINT and the proxy of your network",
    )


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
    status = http_status(error)
    if status is not None:
        return SourceError(*_refused(status, error, artifact, subject, url), status)
    if isinstance(error, OSError):
        return disk_error(error, f"cannot write {subject}", partial)
    arrived = received_bytes(partial) if partial is not None else 0
    broken = isinstance(error, (IncompleteError, httpx2.RemoteProtocolError, httpx2.ReadError))
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
            + (f" (the token {token_origin()} was rejected)" if hub_token() else ""),
        )
    if status in (404, 410):
        return (
            f"{subject} was not found at {url} (HTTP {status})",
            "set HF_ENDPOINT to a mirror that has it, or name a local copy in the recipe",
        )
    if status == 429:
        wait = retry_after(error)
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


def http_status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def retry_after(error: BaseException) -> int | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
    if value.isdigit():
        return int(value)
    try:
        return max(0, round(parsedate_to_datetime(value).timestamp() - time.time()))
    except (ValueError, TypeError):
        return None
