"""Commands as a user types them in the shell of this platform."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence


def shell_line(*commands: Sequence[str]) -> str:
    """One line that runs commands after each other, each only if the one before succeeded.

    Windows: quoted for cmd; PowerShell 7 accepts the same, except that a quoted program needs `&` before it.
    """
    return " && ".join(_joined(command) for command in commands)


def _joined(command: Sequence[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
