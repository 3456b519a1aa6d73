"""Errors for the user, each with an exit code and a hint."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class FastFaceError(Exception):
    """An error message of one sentence, and a hint that says what to do next.

    Args:
        message: one sentence that says what happened and where.
        hint: the next step, or None.
    """

    exit_code = 1
    kind = "run_failed"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.partial: dict[str, Any] = {}
        """Results completed before the error, for `--json`."""

    def record(self) -> dict[str, Any]:
        """The error as `--json` prints it."""
        return {"kind": self.kind, "code": self.exit_code, "message": self.message, "hint": self.hint}


class UsageError(FastFaceError):
    """The command line, a recipe or an input file is invalid."""

    exit_code = 2
    kind = "usage"


class RecipeError(UsageError):
    """A recipe is invalid."""

    kind = "recipe"


class LicenseError(UsageError):
    """The license of a model part forbids the requested use."""

    kind = "licence"


class ModelUnavailableError(FastFaceError):
    """A model file is missing and cannot be downloaded, or has the wrong content."""

    exit_code = 3
    kind = "models"


class DeviceError(FastFaceError):
    """The device cannot run the request: no CUDA, out of memory."""

    exit_code = 4
    kind = "device"


class NoFaceError(FastFaceError):
    """The photo shows no usable face."""

    exit_code = 5
    kind = "no_face"


def unexpected(error: BaseException) -> FastFaceError:
    """Convert an unexpected exception to an error of one sentence."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return UsageError(
            f"no permission to use {error.filename}",
            "check the permissions of this path and its parent folders",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return FastFaceError(f"the disk is full{where}", "free disk space, or choose another folder")
    lines = str(error).strip().splitlines()
    detail = f": {lines[0][:300]}" if lines else ""
    return FastFaceError(
        f"unexpected {type(error).__name__}{detail}", "set FASTFACE_DEBUG=1 to see the traceback"
    )


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None
