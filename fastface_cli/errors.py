"""The one family of errors that a user meets; each knows its exit code and the next step."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class FastFaceError(Exception):
    """What went wrong in one sentence, and a hint that says what to do next.

    Args:
        message: one sentence that names what and where.
        hint: the next step, or None where there is none.
    """

    exit_code = 1
    kind = "run_failed"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.partial: dict[str, Any] = {}
        """What was done before it went wrong, for `--json`."""

    def record(self) -> dict[str, Any]:
        """As JSON output tells it."""
        return {"kind": self.kind, "code": self.exit_code, "message": self.message, "hint": self.hint}


class UsageError(FastFaceError):
    """The command line, a recipe or an input file is not what it must be."""

    exit_code = 2
    kind = "usage"


class RecipeError(UsageError):
    """A recipe does not say something that can be run."""

    kind = "recipe"


class LicenseError(UsageError):
    """A model part's license forbids the use that was asked for."""

    kind = "licence"


class ModelUnavailableError(FastFaceError):
    """A model file is missing and cannot be had, or is not the file it should be."""

    exit_code = 3
    kind = "models"


class DeviceError(FastFaceError):
    """The device cannot do what is asked: no CUDA, out of memory."""

    exit_code = 4
    kind = "device"


class NoFaceError(FastFaceError):
    """No usable face in the photograph."""

    exit_code = 5
    kind = "no_face"


def unexpected(error: BaseException) -> FastFaceError:
    """An exception that nobody foresaw, as one sentence."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return UsageError(
            f"no permission to use {error.filename}",
            "check the permissions of it and of the folders above it",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return FastFaceError(f"the disk is full{where}", "make room, or write to another place")
    lines = str(error).strip().splitlines()
    said = f": {lines[0][:300]}" if lines else ""
    return FastFaceError(
        f"unexpected {type(error).__name__}{said}", "set FASTFACE_DEBUG=1 to see where it comes from"
    )


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None
