"""What is here of an artifact and what is not, and how to say so."""

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
        path: path inside the repository (for a place on this machine: that place).
        bytes: its size, exact or approximate; 0 where nothing is known.
        state: present (verified), missing, partial, unverified (there, hashed when needed), bad.
        here: how many of its bytes are on this disk.
        detail: what is wrong, where something is.
    """

    path: str
    bytes: int
    state: State
    here: int
    detail: str = ""


@dataclass(frozen=True)
class Missing:
    """What an artifact still needs."""

    artifact: Artifact
    files: tuple[FileStatus, ...]

    @property
    def bytes(self) -> int:
        """Bytes to fetch; approximate where a size is not known."""
        return sum(max(file.bytes - file.here, 0) for file in self.files)


@dataclass(frozen=True)
class Entry:
    """An artifact that takes room on this disk."""

    artifact: Artifact
    files: int
    bytes: int
    partial_bytes: int
    complete: bool


def human_bytes(count: float) -> str:
    """A number of bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_size(count: int) -> str:
    """The size of something to fetch, which is 0 where nobody has said it yet."""
    return human_bytes(count) if count else "size not known"


def license_line(artifact: Artifact) -> str:
    """The license of an artifact and what it says of commercial use, in one line."""
    use = {"yes": "commercial use allowed", "no": "no commercial use"}.get(
        artifact.commercial, "commercial use unclear"
    )
    note = f", {artifact.commercial_note}" if artifact.commercial_note else ""
    link = f" ({artifact.license_link})" if artifact.license_link else ""
    return f"{artifact.license}{link}: {use}{note}"


def count_models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"


def offline_error(missing: Sequence[Missing]) -> ModelUnavailableError:
    names = ", ".join(
        f"{one.artifact.name} ({human_bytes(one.bytes)})" if one.bytes else one.artifact.name
        for one in missing
    )
    total = human_size(sum(one.bytes for one in missing))
    plural = "is" if len(missing) == 1 else "are"
    return ModelUnavailableError(
        f"{count_models(len(missing))} {plural} missing and the network is off: {names}"
        + (f"; {total} in all" if len(missing) > 1 else ""),
        "run `fastface download` for them without --offline and HF_HUB_OFFLINE; "
        "`fastface generate --recipe pocket` needs no download",
    )
