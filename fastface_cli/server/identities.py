"""Faces in uploaded photos, and saved identities."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..app.stack import ModelStack
from ..errors import UsageError
from ..files import remove_abandoned
from ..identity.analyzer import Box
from ..identity.identity import MAX_BYTES, Identity
from ..identity.photos import Photo, open_photo
from ..identity.search import bgr, check_choice, find_faces
from ..output.images import encode_png
from ..recipe.schema import Recipe
from .limits import MIB, Limits
from .runs import MissingError

if TYPE_CHECKING:
    from ..identity.analyzer import Face

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")


class FaceService:
    """Face models of their own, so that looking at photos does not wait for a run.

    Args:
        stack: only its face models are used.
    """

    def __init__(self, stack: ModelStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()

    def faces(self, photo: Photo, recipe: Recipe) -> list[Face]:
        """The faces of a photo in pixels of the upright original, the largest first."""
        with self._lock:
            faces = find_faces(bgr(photo.image), self._stack.analyzer(recipe))
        return [face.moved(0, 0, 1 / photo.scale) for face in faces]

    def identity(
        self, photos: Sequence[Photo], recipe: Recipe, face_index: int | None, face_box: Box | None
    ) -> Identity:
        """The identity of the person in photos.

        Raises:
            NoFaceError: the photos show no usable face.
        """
        check_choice(face_index, face_box)
        with self._lock:
            return self._stack.identity(recipe, photos, face_index=face_index, face_box=face_box)


class IdentityBook:
    """Saved identities by name, in memory, and in a folder if there is one.

    Args:
        folder: files are NAME.safetensors; None keeps nothing on disk.
        limit: number of identities.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._identities: dict[str, Identity] = {}
        self._lock = threading.Lock()
        if folder is not None and folder.is_dir():
            remove_abandoned(folder)
            for path in sorted(folder.glob("*.safetensors"))[:limit]:
                self._identities[path.stem] = Identity.load(path)

    def add(self, name: str, identity: Identity) -> None:
        """Save an identity; one of the same name is replaced.

        Raises:
            UsageError: the name is not valid, or there are too many.
            FastFaceError: the file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name[:80]}' is not a name for an identity",
                "use up to 64 letters, digits, spaces, dots, dashes and underscores",
            )
        with self._lock:
            if name not in self._identities and len(self._identities) >= self._limit:
                raise UsageError(f"there are {self._limit} saved identities", "delete one first")
            if self._folder is not None:
                identity.save(self._folder / f"{name}.safetensors", force=True)
            self._identities[name] = identity

    def find(self, name: str) -> Identity:
        """A saved identity.

        Raises:
            MissingError: there is none of that name.
        """
        with self._lock:
            identity = self._identities.get(name)
        if identity is None:
            raise MissingError(f"there is no saved identity '{name[:80]}'", "see /api/identities")
        return identity

    def remove(self, name: str) -> None:
        """Delete a saved identity.

        Raises:
            MissingError: there is none of that name.
        """
        self.find(name)
        with self._lock:
            self._identities.pop(name, None)
            if self._folder is not None:
                (self._folder / f"{name}.safetensors").unlink(missing_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """All saved identities, sorted by name."""
        with self._lock:
            return [record(name, identity) for name, identity in sorted(self._identities.items())]


def record(name: str, identity: Identity) -> dict[str, Any]:
    """A saved identity as the API describes it."""
    return {
        "name": name,
        "photos": len(identity.weight),
        "digest": identity.digest(),
        "features": sorted(identity.features),
    }


def read_identity(data: bytes) -> Identity:
    """An uploaded identity file.

    Raises:
        UsageError: it is not one.
    """
    if len(data) > MAX_BYTES:
        raise UsageError(f"the identity file is larger than {MAX_BYTES // MIB} MiB")
    # The reader checks the header of a file. The file has no name that a client chose, and is removed.
    handle, name = tempfile.mkstemp(suffix=".safetensors")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return Identity.load(name)
    except UsageError as error:
        raise UsageError("the file is not an identity file of fastface", error.hint) from error
    finally:
        Path(name).unlink(missing_ok=True)


def crop_png(identity: Identity) -> bytes:
    """The face crop of an identity as PNG."""
    return encode_png(Image.fromarray(identity.crop()[:, :, ::-1].copy()))


def read_photos(uploads: Sequence[bytes], limits: Limits) -> list[Photo]:
    """Decode uploaded photos.

    Raises:
        UsageError: there are too many, or one is not a readable photo.
    """
    if len(uploads) > limits.photos:
        raise UsageError(f"there are {len(uploads)} photos, the limit is {limits.photos}")
    photos = []
    for number, data in enumerate(uploads, start=1):
        if len(data) > limits.photo_bytes:
            raise UsageError(f"photo {number} is larger than {limits.photo_bytes // MIB} MiB")
        if not data:
            raise UsageError(f"photo {number} is empty")
        photos.append(open_photo(data, f"photo {number}" if len(uploads) > 1 else "the photo"))
    return photos
