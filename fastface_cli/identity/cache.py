"""Optional cache of identities by the hash of their photos, so that no photo is analyzed twice.

An identity is personal data. It is cached only with `--remember`, and `fastface cache remove identities`
removes all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FastFaceError, UsageError
from ..files import content_mark
from ..store.links import make_folder, outside_link, remove_entry

if TYPE_CHECKING:
    from ..store.manifest import Artifact
    from .analyzer import Box
    from .identity import Identity
    from .photos import Photo

NAME = "identities"
"""Name in `fastface cache`, and name of the folder."""
FORMAT = 1
"""Version of what `key_of` hashes. A change of it invalidates all cached identities."""


class Remembered:
    """The cached identities of this machine.

    Args:
        home: `Settings.home`.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / NAME

    def find(self, key: str) -> Identity | None:
        """Return a cached identity, or None if it is missing or cannot be read."""
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
        """Save an identity that only its user can read.

        Raises:
            FastFaceError: the file cannot be written.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FastFaceError(
                f"cannot write {self.folder}: {error.strerror}", "leave out --remember"
            ) from error
        make_folder(self.folder, self.folder.parent)  # refuses a link that leads outside the cache
        identity.save(self._file(key), force=True)

    def files(self) -> list[Path]:
        """The files of all cached identities; none if a link leads the folder outside the cache."""
        if outside_link(self.folder / "file", self.folder.parent) is not None:
            return []
        return sorted(self.folder.glob("*.safetensors"))

    def clear(self) -> int:
        """Remove all cached identities and return the number of bytes freed."""
        return sum(remove_entry(path, self.folder.parent) for path in self.files())

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def key_of(
    photos: Sequence[Photo],
    pack: Artifact,
    face_index: int | None,
    face_box: Box | None,
    features: Sequence[str] = (),
    encoders: Sequence[Artifact] = (),
) -> str | None:
    """Return the cache key: a hash of the photos' files, the models, the face chosen and the features.

    None if a photo was not read from a file.
    """
    hashes = [photo.sha256 for photo in photos]
    if None in hashes:
        return None
    inputs = {
        "format": FORMAT,
        "photos": hashes,
        "face": _mark(pack),
        "index": face_index,
        "box": face_box,
    }
    if features:
        inputs["features"] = list(features)
    if encoders:
        inputs["encoders"] = [_mark(encoder) for encoder in encoders]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _mark(artifact: Artifact) -> object:
    """What identifies the files of a model."""
    return content_mark(artifact.local) if artifact.local else artifact.name
