"""The state of artifacts on this machine, and its description in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ModelUnavailableError
from .manifest import Artifact

State = Literal["present", "missing", "partial", "unverified", "bad"]


@dataclass(frozen=True)
class FileStatus:
    """One file of an artifact on this machine.

    Args:
        path: path inside the repository, or the local path.
        bytes: size, exact or approximate; 0 if unknown.
        state: present (verified), missing, partial, unverified (on disk, hashed when needed), bad.
        here: number of bytes on this disk.
        detail: the reason for state bad.
    """

    path: str
    bytes: int
    state: State
    here: int
    detail: str = ""


@dataclass(frozen=True)
class Missing:
    """The files of an artifact that must be fetched."""

    artifact: Artifact
    files: tuple[FileStatus, ...]

    @property
    def bytes(self) -> int:
        """Bytes to fetch; approximate if a size is not known exactly."""
        return sum(max(file.bytes - file.here, 0) for file in self.files)


@dataclass(frozen=True)
class Entry:
    """An artifact that uses disk space."""

    artifact: Artifact
    files: int
    bytes: int
    partial_bytes: int
    complete: bool


def human_bytes(count: float) -> str:
    """Format a number of bytes in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_size(count: int) -> str:
    """Format a download size, where 0 means unknown."""
    return human_bytes(count) if count else "size unknown"


def license_line(artifact: Artifact) -> str:
    """The license of an artifact and its terms for commercial use, in one line."""
    use = {"yes": "commercial use allowed", "no": "no commercial use"}.get(
        artifact.commercial, "commercial use unclear"
    )
    note = f", {artifact.commercial_note}" if artifact.commercial_note else ""
    link = f" ({artifact.license_link})" if artifact.license_link else ""
    return f"{artifact.license}{link}: {use}{note}"


def count_models(count: int) -> str:
    """`1 model`, or `2 models`."""
    return "1 model" if count == 1 else f"{count} models"


def offline_error(missing: Sequence[Missing]) -> ModelUnavailableError:
    """The error for missing artifacts when the network may not be used."""
    names = ", ".join(
        f"{item.artifact.name} ({human_bytes(item.bytes)})" if item.bytes else item.artifact.name
        for item in missing
    )
    total = human_size(sum(item.bytes for item in missing))
    plural = "is" if len(missing) == 1 else "are"
    return ModelUnavailableError(
        f"{count_models(len(missing))} {plural} missing and offline mode is on: {names}"
        + (f"; {total} in total" if len(missing) > 1 else ""),
        "run `fastface download` without --offline and with HF_HUB_OFFLINE unset; "
        "`fastface generate --recipe pocket` needs no download",
    )
