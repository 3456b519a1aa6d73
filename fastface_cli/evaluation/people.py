"""The people of a run: copies of their photos, and one identity per person, stress and identity models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FastFaceError, NoFaceError, UsageError
from ..files import write_atomically
from ..identity.identity import Identity, make_identity
from ..identity.photos import read_photo
from ..identity.search import find_upright
from ..output.images import encode_png
from .dataset import Subject
from .stress import degrade

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import FaceAnalyzer
    from ..identity.parsing import GrayFaceEncoder
    from ..recipe.schema import Recipe

REFERENCES = "references"


def reference_path(subject: Subject) -> str:
    """Return the path of the reference photo, relative to the run."""
    return f"{REFERENCES}/{subject.name}.png"


def held_out_path(subject: Subject) -> str | None:
    """Return the path of the held-out photo, relative to the run."""
    return None if subject.held_out is None else f"{REFERENCES}/{subject.name}+held-out.png"


def degraded_path(subject: Subject, stress: str) -> str:
    """Return the path of the degraded photo, relative to the run."""
    return f"{REFERENCES}/{subject.name}+{stress}.png"


def identity_key(recipe: Recipe) -> str:
    """Name the models that compute the identities of a recipe."""
    references = recipe.references()
    return "+".join(str(references[role]) for role in sorted(recipe.photo_roles()))


@dataclass(frozen=True)
class Features:
    """What the adapters of a run read of a photo, beside the embedding and the crop."""

    names: tuple[str, ...] = ()
    """Of `identity.features.SHAPES`."""
    load: Callable[[], GrayFaceEncoder] | None = None
    """Loads what computes those of EVA02-CLIP; None if they are not read."""


class People:
    """Identities by person, stress and identity models. Each is computed once per run, also when the run is
    resumed.

    Args:
        run: folder of the run.
        analyzers: loaders of face analyzers, by `identity_key`.
        log: receives messages about photos.
        features: by `identity_key`; a missing key means none.
    """

    def __init__(
        self,
        run: Path,
        analyzers: Mapping[str, Callable[[], FaceAnalyzer]],
        log: Callable[[str], None],
        features: Mapping[str, Features] | None = None,
    ) -> None:
        self._run = run
        self._makers = analyzers
        self._features = features or {}
        self._analyzers: dict[str, FaceAnalyzer] = {}
        self._encoders: dict[str, GrayFaceEncoder | None] = {}
        self._log = log
        self._last: tuple[tuple[str, str | None, str], Identity] | None = None
        self._refused: dict[tuple[str, str | None, str], tuple[type[FastFaceError], str, str | None]] = {}

    def identity(self, subject: Subject, stress: str | None, face: str) -> Identity:
        """Return the identity of a person.

        Args:
            stress: degradation of the photos; None for the original photos.
            face: the `identity_key` of the recipe.

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
        """Copy the pixels of the reference and the held-out photo into the run; skip unreadable photos.

        The copies have no metadata, such as the place or the camera, because reports are shared.

        Raises:
            FastFaceError: a copy cannot be written.
        """
        pairs = [(reference_path(subject), subject.photos[0])]
        held_out = held_out_path(subject)
        if held_out is not None and subject.held_out is not None:
            pairs.append((held_out, subject.held_out))
        for copy, photo in pairs:
            target = self._run / copy
            if _is_readable(target):
                continue
            try:
                image = read_photo(photo)
            except UsageError as error:
                self._log(f"{subject.name}: {error.message}")
                continue
            write_atomically(target, encode_png(image), force=True, private=True)

    def _stored(self, subject: Subject, stress: str | None, face: str) -> Identity:
        name = subject.name if stress is None else f"{subject.name}+{stress}"
        names = self._features.get(face, Features()).names
        file = self._run / "identities" / _folder(face) / f"{name}.safetensors"
        has_photo = stress is None or _is_readable(self._run / degraded_path(subject, stress))
        if file.is_file() and has_photo:
            try:
                identity = Identity.load(file)
                if set(names) <= identity.features.keys():
                    return identity
            except UsageError as error:  # damaged by a power failure, for example
                self._log(f"{subject.name}: {error.message}; the identity is computed again")
        analyzer = self._analyzer(face)
        photos: list[Path] | list[Image.Image] = list(subject.photos)
        if stress is not None:
            photos = self._degraded(subject, stress, analyzer)
        identity = make_identity(
            photos,
            analyzer,
            features=names,
            encoder=self._encoder(face),
            log=lambda text: self._log(f"{subject.name}: {text}"),
        )
        try:
            identity.save(file, force=True)
        except UsageError as error:  # of the run's folder, not of a photo
            raise FastFaceError(error.message, error.hint) from error
        return identity

    def _degraded(self, subject: Subject, stress: str, analyzer: FaceAnalyzer) -> list[Image.Image]:
        degraded = []
        for index, photo in enumerate(subject.photos):
            image, faces, _ = find_upright(read_photo(photo), analyzer)
            if not faces:
                raise NoFaceError(f"no face found in {photo} before it was degraded", "use another photo")
            degraded.append(degrade(image, stress, f"{subject.name}/{index}", faces[0].box))
        target = self._run / degraded_path(subject, stress)
        write_atomically(target, encode_png(degraded[0]), force=True, private=True)
        return degraded

    def _analyzer(self, face: str) -> FaceAnalyzer:
        if face not in self._analyzers:
            self._analyzers[face] = self._makers[face]()
        return self._analyzers[face]

    def _encoder(self, face: str) -> GrayFaceEncoder | None:
        load = self._features.get(face, Features()).load
        if face not in self._encoders:
            self._encoders[face] = None if load is None else load()
        return self._encoders[face]


def _folder(face: str) -> str:
    """Return a folder name for an identity key; a long one ends in its hash, because only a part is shown."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in face)
    return name if len(name) <= 80 else f"{name[-63:]}-{hashlib.sha256(face.encode()).hexdigest()[:16]}"


def _is_readable(photo: Path) -> bool:
    if not photo.is_file():
        return False
    try:
        read_photo(photo)
    except UsageError:
        return False
    return True
