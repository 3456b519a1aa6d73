"""Photos -> Identity: who the person is, in numbers and as an aligned crop; identity files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import NoFaceError, UsageError, nearest
from ..files import check_target, write_atomically
from .analyzer import CROP, EMBEDDING, Box, FaceAnalyzer, align
from .photos import Photo, open_photo
from .search import bgr, check_choice, choose_face, describe_attempts, find_faces, rounded, scaled

MAX_PHOTOS = 64
"""Photos in an identity."""
MAX_BYTES = 64 * 2**20
"""Size of an identity file."""
UNIT_TOLERANCE = 1e-3
"""How far the norm of an embedding may be from 1 and still be rounding."""
SMALL_FACE = 48
"""Faces narrower than this, in pixels, are noted: ArcFace looks at 112 pixels."""
STRANGER = 0.25
"""Cosine below which two ArcFace embeddings are hardly one person's: strangers scatter around 0 with a
deviation below 0.1, photos of one person lie between 0.3 and 0.8."""
HALF_AS_ALIKE = 0.5
"""A photo less than half as similar to the others as they are to each other is an outlier too: some
recognizers score strangers well above `STRANGER`. Where the rest agree, losing a photo costs little."""

_TENSORS = {"id_embedding": "F32", "face_crop_bgr": "U8", "weight": "F32"}


@dataclass(frozen=True, eq=False)
class Identity:
    """A person, from n photos.

    Raises:
        UsageError: an array is not what it must be.
    """

    id_embedding: np.ndarray
    """[n, 512] float32, unit norm, one row a photo."""
    face_crop_bgr: np.ndarray
    """[n, 224, 224, 3] uint8, aligned, BGR."""
    weight: np.ndarray
    """[n] float32, above 0: how much each photo counts in the mean."""

    def __post_init__(self) -> None:
        n = len(self.id_embedding) if self.id_embedding.ndim else 0
        _expect("id_embedding", self.id_embedding, np.float32, (n, EMBEDDING))
        _expect("face_crop_bgr", self.face_crop_bgr, np.uint8, (n, CROP, CROP, 3))
        _expect("weight", self.weight, np.float32, (n,))
        if not 1 <= n <= MAX_PHOTOS:
            raise UsageError(f"an identity is made of 1 to {MAX_PHOTOS} photos, not {n}")
        if not (np.isfinite(self.weight).all() and (self.weight > 0).all()):
            raise UsageError("weight must be above 0 for every photo")
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(self.id_embedding.astype(np.float64), axis=1)
        if not (np.abs(norms - 1) <= UNIT_TOLERANCE).all():
            raise UsageError(
                f"id_embedding must have rows of norm 1, not {norms.min():.4g} to {norms.max():.4g}"
            )
        if _mean(self.id_embedding, self.weight) is None:
            raise UsageError("the embeddings cancel each other: they are not of one person")

    def mean(self) -> np.ndarray:
        """The weighted mean of the embeddings, renormalised: [512] float32."""
        found = _mean(self.id_embedding, self.weight)
        assert found is not None  # checked at the start
        return found.astype(np.float32)

    def crop(self) -> np.ndarray:
        """The crop whose embedding is nearest to the mean: [224, 224, 3] uint8, BGR."""
        crop: np.ndarray = self.face_crop_bgr[int(np.argmax(self.id_embedding @ self.mean()))]
        return crop

    def digest(self) -> str:
        """SHA-256 (hex) of the arrays; weights count relative to the largest.

        It tells two identities apart and gives nothing of the person away. The same photo measured by other
        versions or on other processors may differ in the last bits, and then in its digest.
        """
        weight = self.weight / self.weight.max()
        parts = (self.id_embedding.astype("<f4"), self.face_crop_bgr, weight.astype("<f4"))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write an identity file, whole or not at all.

        Args:
            path: a .safetensors file.
            force: replace an existing file.

        Returns:
            The path written.

        Raises:
            UsageError: the file exists and `force` is not given, or cannot be written there.
        """
        from safetensors.numpy import save

        path = Path(path)
        check_target(path, force=force)
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        return write_atomically(path, save(tensors), force=force)

    @classmethod
    def load(cls, path: Path | str) -> Identity:
        """Read an identity file: safetensors with `id_embedding` [n, 512] float32, `face_crop_bgr`
        [n, 224, 224, 3] uint8 (three dimensions: n = 1) and `weight` [n] float32 (absent: equal).

        Raises:
            UsageError: it is not such a file.
        """
        try:
            arrays = _read(Path(path))
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise UsageError(f"cannot read the identity file {path}: {error}") from error
        embedding, crop = arrays["id_embedding"], arrays["face_crop_bgr"]
        crop = crop[None] if crop.ndim == 3 else crop
        weight = arrays.get("weight", np.ones(len(embedding) if embedding.ndim else 0, np.float32))
        try:
            found = cls(embedding, crop, weight)
        except UsageError as error:
            raise UsageError(f"{path} is not an identity: {error.message}", error.hint) from error
        norms = np.linalg.norm(embedding.astype(np.float64), axis=1, keepdims=True)
        if np.abs(norms - 1).max() <= 1e-6:
            return found
        return cls((embedding / norms).astype(np.float32), crop, weight)


def make_identity(
    photos: Sequence[Path | str | Image.Image],
    analyzer: FaceAnalyzer,
    *,
    face_index: int | None = None,
    face_box: Box | None = None,
    log: Callable[[str], None] | None = None,
) -> Identity:
    """The identity of the one person on the photos. Photos count by the detector's certainty; those
    without a face, and those of somebody else, are named through `log` and left out.

    Args:
        photos: paths or opened images, at most 64.
        analyzer: see `load_face_models`.
        face_index: which face of each photo, numbered by size: 0 is the largest, which is the default.
        face_box: a rough frame around the face: left, top, right, bottom in pixels of the upright photo.
            Only with a single photo.
        log: is called with each remark, one sentence.

    Raises:
        NoFaceError: no photo shows a face, or not the one asked for.
        UsageError: a photo cannot be read, or the choice of the face makes no sense.
    """
    if not 1 <= len(photos) <= MAX_PHOTOS:
        raise UsageError(f"an identity is made of 1 to {MAX_PHOTOS} photos, not {len(photos)}")
    check_choice(face_index, face_box)
    if face_box is not None and len(photos) > 1:
        raise UsageError(
            "a face box belongs to one photo, and several are given",
            "choose by index, or cut the photos to the person",
        )
    say = _silent if log is None else log
    measured, without = [], []
    for number, source in enumerate(photos, 1):
        photo = open_photo(source, f"photo {number}" if len(photos) > 1 else "the photo")
        found = _measure(photo, analyzer, face_index, face_box, say)
        if isinstance(found, _Measured):
            measured.append(found)
        else:
            without.append((photo.name, found))
    if not measured:
        raise NoFaceError(
            f"no face found in {', '.join(name for name, _ in without)}: {without[0][1]}",
            "use a photo where the face is upright, lit and sharp, at least a tenth of the picture's width",
        )
    for name, _ in without:
        say(f"{name} left out: no face found in it")
    names = [item.name for item in measured]
    embedding = np.stack([item.embedding for item in measured])
    crop = np.stack([item.crop for item in measured])
    weight = np.array([item.score for item in measured], np.float32)
    kept = _without_outliers(embedding, weight, names, say)
    return Identity(embedding[kept], crop[kept], weight[kept])


@dataclass(frozen=True)
class _Measured:
    """The face taken from one photo."""

    name: str
    embedding: np.ndarray
    crop: np.ndarray
    score: float


def _measure(
    photo: Photo, analyzer: FaceAnalyzer, index: int | None, box: Box | None, say: Callable[[str], None]
) -> _Measured | str:
    """The chosen face of a photo, or what was tried where it shows none."""
    picture = bgr(photo.image)
    faces = find_faces(picture, analyzer)
    if not faces and box is None:
        return describe_attempts(picture)
    face = choose_face(photo, faces, analyzer, index=index, box=box)
    if len(faces) > 1 and index is None and box is None:
        say(
            f"{photo.name} shows {len(faces)} faces; the largest is taken, "
            f"at {rounded(scaled(face.box, 1 / photo.scale))}; --face-index 0 to {len(faces) - 1} "
            "(by size) or --face-box takes another"
        )
    if face.size[0] < SMALL_FACE:
        say(f"the face in {photo.name} is only {face.size[0]:.0f} pixels wide; expect less likeness")
    embedding = analyzer.embed(picture, face)
    if not abs(float(np.linalg.norm(embedding.astype(np.float64))) - 1) <= UNIT_TOLERANCE:
        raise NoFaceError(f"the face in {photo.name} cannot be recognised", "use another photo")
    return _Measured(photo.name, embedding, align(picture, face), min(max(face.score, 1e-3), 1.0))


def _without_outliers(
    embedding: np.ndarray, weight: np.ndarray, names: list[str], say: Callable[[str], None]
) -> list[int]:
    """Indices of the photos that show one person; says which are left out and whether doubt remains."""
    left_out = outliers(embedding, weight)
    for index, likeness in left_out.items():
        say(
            f"{names[index]} left out: it seems to show somebody else "
            f"(similarity {likeness:.2f} to the others)"
        )
    kept = [index for index in range(len(names)) if index not in left_out]
    if len(kept) > 1 and _agreement(embedding[kept]) < STRANGER:
        say(
            f"the photos may show different people (similarity {_agreement(embedding[kept]):.2f}): "
            f"{', '.join(names[index] for index in kept)}"
        )
    return kept


def outliers(embedding: np.ndarray, weight: np.ndarray) -> dict[int, float]:
    """Photos that do not show the person of the others, worst first, with their likeness to the others.

    One at a time, the photo whose embedding has the lowest cosine to the mean of the others is left out
    while that cosine is below `STRANGER`, or below half of what the others agree among themselves. Of two
    photos none can be told to be the wrong one.

    Args:
        embedding: [n, 512], unit norm.
        weight: [n], above 0.
    """
    kept = list(range(len(embedding)))
    found: dict[int, float] = {}
    while len(kept) > 2:
        likeness = {index: _likeness(embedding, weight, index, kept) for index in kept}
        worst = min(kept, key=lambda index: likeness[index])
        others = [index for index in kept if index != worst]
        if likeness[worst] >= max(STRANGER, HALF_AS_ALIKE * _agreement(embedding[others])):
            break
        kept = others
        found[worst] = likeness[worst]
    return found


def _likeness(embedding: np.ndarray, weight: np.ndarray, index: int, kept: list[int]) -> float:
    """Cosine of one embedding and the mean of the others."""
    others = [other for other in kept if other != index]
    mean = _mean(embedding[others], weight[others])
    return -1.0 if mean is None else float(embedding[index].astype(np.float64) @ mean)


def _agreement(embedding: np.ndarray) -> float:
    """Median cosine over all pairs of at least two embeddings: two persons in equal parts agree badly."""
    pairs = np.triu_indices(len(embedding), 1)
    return float(np.median((embedding.astype(np.float64) @ embedding.T)[pairs]))


def _mean(embedding: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Weighted mean on the unit sphere, [512] float64, or None where the embeddings cancel."""
    total = (weight.astype(np.float64) / weight.max()) @ embedding.astype(np.float64)
    norm = float(np.linalg.norm(total))
    return total / norm if norm > 1e-6 else None


def _expect(name: str, array: np.ndarray, kind: type, shape: tuple[int, ...]) -> None:
    if array.dtype != kind or array.shape != shape:
        wanted = ", ".join(str(side) for side in ("n", *shape[1:]))
        raise UsageError(
            f"{name} must be [{wanted}] {np.dtype(kind).name}, one row a photo, "
            f"not {list(array.shape)} {array.dtype.name}"
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an identity file, their names and types checked before any is read."""
    from safetensors import SafetensorError, safe_open

    make = "make one with --save-identity; a photo goes to --face"
    if path.is_dir():
        raise UsageError(f"the identity file {path} is a folder", make)
    if not path.is_file():
        raise UsageError(f"there is no identity file {path}", "check the path")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is not an identity file: it is larger than {MAX_BYTES >> 20} MB", make)
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            _check_tensors(path, kinds, make)
            return {name: file.get_tensor(name) for name in kinds}
    except SafetensorError as error:
        raise UsageError(f"{path} is not an identity file: {error}", make) from error


def _check_tensors(path: Path, kinds: dict[str, Any], make: str) -> None:
    for name, kind in kinds.items():
        if name not in _TENSORS:
            near = nearest(name, _TENSORS)
            raise UsageError(
                f"{path} is not an identity file: it holds {name[:80]!r}",
                f"did you mean '{near}'?" if near else make,
            )
        if kind != _TENSORS[name]:
            raise UsageError(f"{path} is not an identity file: {name} is {kind}, not {_TENSORS[name]}")
    for name in ("id_embedding", "face_crop_bgr"):
        if name not in kinds:
            raise UsageError(f"{path} is not an identity file: it has no {name}", make)


def _silent(_remark: str) -> None:
    """Where nobody listens."""
