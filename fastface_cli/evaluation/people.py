"""The people of a run: copies of their photos, and one identity per person, stress and face pack."""

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
"""Formats that browsers display; photos in other formats are copied as PNG."""
REFERENCES = "references"


def reference_path(subject: Subject) -> str:
    """Return the path of the reference photo, relative to the run."""
    return _kept(subject.name, subject.photos[0])


def held_out_path(subject: Subject) -> str | None:
    """Return the path of the held-out photo, relative to the run."""
    return None if subject.held_out is None else _kept(f"{subject.name}+held-out", subject.held_out)


def degraded_path(subject: Subject, stress: str) -> str:
    """Return the path of the degraded photo, relative to the run."""
    return f"{REFERENCES}/{subject.name}+{stress}.png"


def _kept(stem: str, photo: Path) -> str:
    suffix = photo.suffix.lower()
    return f"{REFERENCES}/{stem}{suffix if suffix in SHOWN else '.png'}"


class People:
    """Identities by person, stress and face pack. Each is computed once per run, also when the run is
    resumed.

    Args:
        run: folder of the run.
        analyzers: loaders of face analyzers, by the face reference of the recipe.
        log: receives messages about photos.
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
        """Return the identity of a person.

        Args:
            stress: degradation of the photos; None for the original photos.
            face: the face reference of the recipe.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: no usable face in the photos.
        """
        key = (subject.name, stress, face)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if key in self._refused:
            kind, message, hint = self._refused[key]
            raise kind(message, hint)
        try:
            identity = self._stored(subject, stress, face)
        except (UsageError, NoFaceError) as error:
            # Not the exception itself: its traceback would keep every refused photo in memory.
            self._refused[key] = (type(error), error.message, error.hint)
            raise
        self._last = (key, identity)
        return identity

    def keep_photos(self, subject: Subject) -> None:
        """Copy the reference and held-out photo of a person into the run; skip unreadable photos."""
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
        identity = make_identity(photos, analyzer, log=lambda text: self._log(f"{subject.name}: {text}"))
        identity.save(file, force=True)
        return identity

    def _degraded(self, subject: Subject, stress: str, analyzer: FaceAnalyzer) -> list[Image.Image]:
        from ..identity.photos import read_photo
        from ..identity.search import bgr, find_faces

        degraded = []
        for index, photo in enumerate(subject.photos):
            image = read_photo(photo)
            faces = find_faces(bgr(image), analyzer)
            if not faces:
                raise NoFaceError(f"no face found in {photo} before it was degraded", "use another photo")
            degraded.append(degrade(image, stress, f"{subject.name}/{index}", faces[0].box))
        write_atomically(self._run / degraded_path(subject, stress), encode_png(degraded[0]), force=True)
        return degraded

    def _analyzer(self, face: str) -> FaceAnalyzer:
        if face not in self._analyzers:
            self._analyzers[face] = self._makers[face]()
        return self._analyzers[face]


def _folder(face: str) -> str:
    """Return a folder name for a face reference."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in face)[-80:]
