"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import FastFaceError
from .shell import shell_line

Severity = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        check: what was checked.
        level: `failure` if the recipe cannot run because of it.
        message: the result of the check.
        command: the command that fixes the problem.
        error: the error that `generate` would raise because of it.
        fixable: whether `fastface doctor --fix` runs the command.
    """

    check: str
    level: Severity
    message: str
    command: str | None = None
    error: type[FastFaceError] = FastFaceError
    fixable: bool = False

    def record(self) -> dict[str, str | None]:
        """Return the finding for JSON output."""
        return {"check": self.check, "level": self.level, "message": self.message, "mend": self.command}


def download_command(recipe_name: str) -> str:
    """Return the command that downloads a recipe's models."""
    return shell_line(["fastface", "download", recipe_name])
