"""Identities kept by the hash of their photos, where the user asks for it: no face is measured twice.

A kept identity is who somebody is. None is kept unless `--remember` asks for it, and
`fastface cache remove identities` removes them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FastFaceError, UsageError

if TYPE_CHECKING:
    from ..store.manifest import Artifact
    from .analyzer import Box
    from .identity import Identity

NAME = "identities"
"""How `fastface cache` calls them, and their folder."""
FORMAT = 1
"""Of what `key` hashes; another number is another key."""


class Remembered:
    """The kept identities of this machine.

    Args:
        home: of the settings.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / NAME

    def find(self, key: str) -> Identity | None:
        """A kept identity; one that cannot be read counts as not there."""
        from .identity import Identity

        path = self._file(key)
        if not path.is_file():
            return None
        try:
            return Identity.load(path)
        except UsageError:
            path.unlink(missing_ok=True)
            return None

    def keep(self, key: str, identity: Identity) -> None:
        """Keep an identity, readable by its user alone.

        Raises:
            FastFaceError: it cannot be written.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FastFaceError(
                f"cannot write {self.folder}: {error.strerror}", "leave out --remember"
            ) from error
        identity.save(self._file(key), force=True)

    def files(self) -> list[Path]:
        """All of them."""
        return sorted(self.folder.glob("*.safetensors"))

    def clear(self) -> int:
        """Remove all of them; how many bytes that frees."""
        freed = 0
        for path in self.files():
            freed += path.stat().st_size
            path.unlink()
        return freed

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def key_of(
    photos: Sequence[Path], pack: Artifact, face_index: int | None, face_box: Box | None
) -> str | None:
    """What an identity is remembered by: a hash of the photos' bytes, the face models and the choice of face.

    None where a photo cannot be read: whoever measures it says why.
    """
    from ..output.metadata import content_mark

    try:
        seen = [hashlib.sha256(photo.read_bytes()).hexdigest() for photo in photos]
    except OSError:
        return None
    told = {
        "format": FORMAT,
        "photos": seen,
        "face": content_mark(pack.local) if pack.local else pack.name,
        "index": face_index,
        "box": face_box,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
