"""The people of a run: their photos as they were used, and the identities made of them, once each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FastFaceError, NoFaceError, UsageError
from ..files import write_atomically
from ..output.images import encode_png
from .dataset import Subject
from .stress import degrade

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import FaceAnalyzer
    from ..identity.identity import Identity

SHOWN = (".png", ".jpg", ".jpeg", ".webp")
"""Formats that browsers show; a photo in another one is kept as PNG."""
REFERENCES = "references"


def reference_path(subject: Subject) -> str:
    """Where a run keeps the photo that is scored against, relative to its folder."""
    return _kept(subject.name, subject.photos[0])


def held_out_path(subject: Subject) -> str | None:
    """Where a run keeps the photo that does not condition."""
    return None if subject.held_out is None else _kept(f"{subject.name}+held-out", subject.held_out)


def degraded_path(subject: Subject, stress: str) -> str:
    """Where a run keeps the photo that conditioned under stress."""
    return f"{REFERENCES}/{subject.name}+{stress}.png"


def _kept(stem: str, photo: Path) -> str:
    suffix = photo.suffix.lower()
    return f"{REFERENCES}/{stem}{suffix if suffix in SHOWN else '.png'}"


class People:
    """Identities by person, stress and face pack; made once a run, also when it is taken up again.

    Args:
        run: the run's folder.
        analyzers: what sees faces, by the recipe's face reference.
        log: takes remarks about photos.
    """

    def __init__(
        self, run: Path, analyzers: Mapping[str, Callable[[], FaceAnalyzer]], log: Callable[[str], None]
    ) -> None:
        self._run = run
        self._makers = analyzers
        self._analyzers: dict[str, FaceAnalyzer] = {}
        self._log = log
        self._last: tuple[tuple[str, str | None, str], Identity] | None = None
        self._refused: dict[tuple[str, str | None, str], tuple[type[FastFaceError], str, str | None]] = {}

    def identity(self, subject: Subject, stress: str | None, face: str) -> Identity:
        """Who a person is.

        Args:
            stress: how the photos are degraded first; None: not at all.
            face: the recipe's face reference.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: there is no usable face.
        """
        key = (subject.name, stress, face)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if key in self._refused:
            kind, message, hint = self._refused[key]
            raise kind(message, hint)
        try:
            found = self._stored(subject, stress, face)
        except (UsageError, NoFaceError) as error:
            # Not the exception: its traceback would keep every refused photo in memory.
            self._refused[key] = (type(error), error.message, error.hint)
            raise
        self._last = (key, found)
        return found

    def keep_photos(self, subject: Subject) -> None:
        """Copy a person's reference and held-out photo into the run; one that cannot be read is left out."""
        pairs = [(reference_path(subject), subject.photos[0])]
        held_out = held_out_path(subject)
        if held_out is not None and subject.held_out is not None:
            pairs.append((held_out, subject.held_out))
        for kept, photo in pairs:
            target = self._run / kept
            if target.is_file():
                continue
            try:
                self._keep(photo, target)
            except (UsageError, OSError) as error:
                self._log(f"{subject.name}: {getattr(error, 'message', error)}")

    def _keep(self, photo: Path, target: Path) -> None:
        from ..identity.photos import read_photo

        image = read_photo(photo)
        if photo.suffix.lower() == target.suffix:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.copyfile(photo, temporary)
            temporary.replace(target)
        else:
            write_atomically(target, encode_png(image), force=True)

    def _stored(self, subject: Subject, stress: str | None, face: str) -> Identity:
        from ..identity.identity import Identity, make_identity

        name = subject.name if stress is None else f"{subject.name}+{stress}"
        file = self._run / "identities" / _folder(face) / f"{name}.safetensors"
        if file.is_file():
            return Identity.load(file)
        analyzer = self._analyzer(face)
        photos: list[Path] | list[Image.Image] = list(subject.photos)
        if stress is not None:
            photos = self._degraded(subject, stress, analyzer)
        found = make_identity(photos, analyzer, log=lambda remark: self._log(f"{subject.name}: {remark}"))
        found.save(file, force=True)
        return found

    def _degraded(self, subject: Subject, stress: str, analyzer: FaceAnalyzer) -> list[Image.Image]:
        from ..identity.photos import read_photo
        from ..identity.search import bgr, find_faces

        found = []
        for index, photo in enumerate(subject.photos):
            image = read_photo(photo)
            faces = find_faces(bgr(image), analyzer)
            if not faces:
                raise NoFaceError(f"no face found in {photo} before it was degraded", "use another photo")
            found.append(degrade(image, stress, f"{subject.name}/{index}", faces[0].box))
        write_atomically(self._run / degraded_path(subject, stress), encode_png(found[0]), force=True)
        return found

    def _analyzer(self, face: str) -> FaceAnalyzer:
        if face not in self._analyzers:
            self._analyzers[face] = self._makers[face]()
        return self._analyzers[face]


def _folder(face: str) -> str:
    """A face reference as the name of a folder."""
    return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in face)[-80:]
