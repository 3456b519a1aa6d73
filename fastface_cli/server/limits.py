"""What the server accepts, and how long it keeps results."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

MIB = 2**20

SAFE_FIELDS = (
    "sampling.width",
    "sampling.height",
    "adapter.scale",
    "guidance.identity",
    "guidance.text",
    "guidance.rescale",
)
"""Recipe fields that every client may set. None of them names a file or loads other models."""


@dataclass(frozen=True)
class Limits:
    """Limits of requests and results."""

    photos: int = 16
    """Photos per request."""
    photo_bytes: int = 32 * MIB
    body_bytes: int = 96 * MIB
    images: int = 64
    """Generated images per run, including candidates."""
    pixels: int = 2048 * 2048
    """Pixels of one generated image."""
    prompt_characters: int = 4000
    queue: int = 32
    """Waiting runs."""
    keep_runs: int | None = 100
    """Finished runs kept; None is unlimited."""
    keep_hours: float | None = None
    """Time for which finished runs are kept; None is unlimited."""
    identities: int = 256
    header_seconds: float = 10.0
    """Time for the first request of a connection to arrive."""
    body_seconds: float = 60.0
    """Time for the body of a request to arrive."""
    fields: tuple[str, ...] = SAFE_FIELDS
    """Recipe fields that clients may set."""


def parse_keep(text: str) -> tuple[int | None, float | None]:
    """Runs and hours from "100" (runs) or "24h" (hours).

    Raises:
        UsageError: neither.
    """
    match = re.fullmatch(r"(\d{1,6})(h?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--keep {text} is neither a count nor a time", "write --keep 100 or --keep 24h")
    return (None, float(match[1])) if match[2] else (int(match[1]), None)
