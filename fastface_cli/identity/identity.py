"""Make an identity (face embeddings and aligned face crops) from photos; read and write identity files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import NoFaceError, UsageError, nearest
from ..files import check_target, write_atomically
from .analyzer import CROP, EMBEDDING, Box, FaceAnalyzer, align
from .features import SHAPES, check_shape
from .photos import MAX_PHOTOS, Photo, open_photos
from .search import (
    bgr,
    check_choice,
    choose_face,
    describe_attempts,
    find_faces,
    find_upright,
    rounded,
    scaled,
)

if TYPE_CHECKING:
    from .parsing import GrayFaceEncoder

MAX_BYTES = 800 * 2**20
"""Maximum size of an identity file: 64 photos with the features of PuLID, 12 MB each."""
UNIT_TOLERANCE = 1e-3
"""Accepted rounding error of the norm of an embedding."""
SMALL_FACE = 48
"""Faces narrower than this, in pixels, are reported: the input of ArcFace is 112 pixels wide."""
STRANGER = 0.25
"""Cosine below which two ArcFace embeddings are unlikely to be of one person: different people score around 0
with a deviation below 0.1, photos of one person score 0.3 to 0.8."""
HALF_AS_ALIKE = 0.5
"""A photo less than half as similar to the others as they are to each other is an outlier too, because some
recognizers score different people well above `STRANGER`. Omitting a photo costs little."""

_TENSORS = {"id_embedding": "F32", "face_crop_bgr": "U8", "weight": "F32"}


@dataclass(frozen=True, eq=False)
class Identity:
    """The face of one person, from n photos.

    Raises:
        UsageError: an array has invalid values, shape or type.
    """

    id_embedding: np.ndarray
    """[n, 512] float32, unit norm, one row per photo."""
    face_crop_bgr: np.ndarray
    """[n, 224, 224, 3] uint8, aligned, BGR."""
    weight: np.ndarray
    """[n] float32, above 0: weight of each photo in the mean."""
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What only some adapters read, see `features.SHAPES`."""
    recognizer: str | None = None
    """The model of `id_embedding`; None if it is not known."""

    def __repr__(self) -> str:
        count = len(self.weight)
        return f"Identity({count} photo{'s' if count > 1 else ''}, {self.digest()[:12]})"

    def _repr_png_(self) -> bytes:
        """The face crops side by side, which notebooks show."""
        from ..output.images import encode_png

        row = np.concatenate(list(self.face_crop_bgr[:8, :, :, ::-1]), axis=1)
        return encode_png(Image.fromarray(np.ascontiguousarray(row)))

    def __post_init__(self) -> None:
        n = len(self.id_embedding) if self.id_embedding.ndim else 0
        _expect("id_embedding", self.id_embedding, np.float32, (n, EMBEDDING))
        _expect("face_crop_bgr", self.face_crop_bgr, np.uint8, (n, CROP, CROP, 3))
        _expect("weight", self.weight, np.float32, (n,))
        if not 1 <= n <= MAX_PHOTOS:
            raise UsageError(f"an identity requires 1 to {MAX_PHOTOS} photos, not {n}")
        if not (np.isfinite(self.weight).all() and (self.weight > 0).all()):
            raise UsageError("weight must be above 0 for every photo")
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(self.id_embedding.astype(np.float64), axis=1)
        if not (np.abs(norms - 1) <= UNIT_TOLERANCE).all():
            raise UsageError(
                f"id_embedding must have rows of norm 1, not {norms.min():.4g} to {norms.max():.4g}"
            )
        for name, feature in self.features.items():
            problem = check_shape(name, feature, n)
            if problem is not None:
                raise UsageError(problem)
        if _mean(self.id_embedding, self.weight) is None:
            raise UsageError("the embeddings cancel each other out: they are not of one person")

    def mean(self) -> np.ndarray:
        """The weighted mean of the embeddings, renormalized: [512] float32."""
        mean = _mean(self.id_embedding, self.weight)
        assert mean is not None  # checked in __post_init__
        return mean.astype(np.float32)

    def raw_mean(self) -> np.ndarray:
        """The weighted mean of the embeddings before they were scaled to length 1: [512] float32.

        Raises:
            KeyError: the identity has no `embedding_norm`.
        """
        raw = self.id_embedding * self.features["embedding_norm"][:, None]
        mean: np.ndarray = (self.weight / self.weight.sum()) @ raw
        return mean.astype(np.float32)

    def best(self) -> int:
        """Index of the photo whose embedding is nearest to the mean."""
        return int(np.argmax(self.id_embedding @ self.mean()))

    def crop(self) -> np.ndarray:
        """The crop of the best photo: [224, 224, 3] uint8, BGR."""
        crop: np.ndarray = self.face_crop_bgr[self.best()]
        return crop

    def posed(self, key_points: np.ndarray, size: tuple[int, int]) -> Identity:
        """The same person in the pose of another photo.

        Args:
            key_points: [5, 2] in pixels of that photo.
            size: its width and height.
        """
        n = len(self.weight)
        pose = {
            "key_points": np.repeat(key_points[None].astype(np.float32), n, axis=0),
            "photo_size": np.repeat(np.array([size], np.float32), n, axis=0),
        }
        return replace(self, features={**self.features, **pose})

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        arrays = (self.id_embedding, self.face_crop_bgr, self.weight, *self.features.values())
        return sum(array.nbytes for array in arrays)

    def digest(self) -> str:
        """SHA-256 (hex) of the arrays, with weights relative to the largest.

        It distinguishes identities and reveals nothing about the person. Other versions or processors may
        compute slightly different arrays for the same photo, and then another digest.
        """
        weight = self.weight / self.weight.max()
        features = [self.features[name].astype("<f4") for name in sorted(self.features)]
        parts = (self.id_embedding.astype("<f4"), self.face_crop_bgr, weight.astype("<f4"), *features)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write an identity file that only the user can read.

        Args:
            path: a .safetensors file.
            force: replace an existing file.

        Returns:
            The path written.

        Raises:
            UsageError: the file exists and `force` is not given, or cannot be written there.
        """
        path = Path(path)
        check_target(path, force=force)
        return write_atomically(path, self.encoded(), force=force, private=True)

    def encoded(self) -> bytes:
        """The bytes of an identity file."""
        from safetensors.numpy import save

        arrays = {name: getattr(self, name) for name in _TENSORS} | dict(self.features)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = None if self.recognizer is None else {"recognizer": self.recognizer}
        encoded: bytes = save(tensors, metadata)
        return encoded

    @classmethod
    def load(cls, path: Path | str) -> Identity:
        """Read an identity file: safetensors with `id_embedding` [n, 512] float32, `face_crop_bgr`
        [n, 224, 224, 3] uint8 (without n for one photo), `weight` [n] float32 (optional, default equal), and
        any of `features.SHAPES`.

        Raises:
            UsageError: the file is not a valid identity file.
        """
        try:
            arrays, recognizer = _read(Path(path))
        except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
            raise UsageError(f"cannot read the identity file {path}: {error}") from error
        embedding, crop = arrays["id_embedding"], arrays["face_crop_bgr"]
        crop = crop[None] if crop.ndim == 3 else crop
        weight = arrays.get("weight", np.ones(len(embedding) if embedding.ndim else 0, np.float32))
        try:
            features = {name: array for name, array in arrays.items() if name in SHAPES}
            identity = cls(embedding, crop, weight, features, recognizer)
        except UsageError as error:
            raise UsageError(f"{path} is not an identity: {error.message}", error.hint) from error
        norms = np.linalg.norm(embedding.astype(np.float64), axis=1, keepdims=True)
        if np.abs(norms - 1).max() <= 1e-6:
            return identity
        return replace(identity, id_embedding=(embedding / norms).astype(np.float32))


def random_identity(eva: tuple[int, int] | None = None) -> Identity:
    """An arbitrary identity for warm-up and benchmarks: random numbers, and key points in a plausible place.

    Args:
        eva: widths of EVA02-CLIP's output and hidden states; None omits the features of this tower.
    """
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((1, 512)).astype(np.float32)
    crop = rng.integers(0, 256, (1, CROP, CROP, 3), dtype=np.uint8)
    features = {
        "embedding_norm": np.array([20], np.float32),
        "key_points": np.array([[[90, 110], [150, 110], [120, 140], [95, 170], [145, 170]]], np.float32),
        "photo_size": np.array([[240, 280]], np.float32),
    }
    if eva is not None:
        features["eva_embedding"] = rng.standard_normal((1, eva[0]), dtype=np.float32)
        features["eva_hidden"] = rng.standard_normal((1, 5, 577, eva[1]), dtype=np.float32)
    return Identity(embedding / np.linalg.norm(embedding), crop, np.ones(1, np.float32), features=features)


def make_identity(
    photos: Sequence[Path | str | Image.Image | Photo],
    analyzer: FaceAnalyzer,
    *,
    face_index: int | None = None,
    face_box: Box | None = None,
    features: Collection[str] = (),
    encoder: GrayFaceEncoder | None = None,
    log: Callable[[str], None] | None = None,
) -> Identity:
    """Make the identity of one person from photos, weighted by the detector's confidence.

    Photos without a face and photos of another person are reported through `log` and omitted.

    Args:
        photos: paths or opened images, at most 64.
        analyzer: see `load_face_models`.
        face_index: which face of each photo, numbered by size; 0, the default, is the largest.
        face_box: a rough box around the face: left, top, right, bottom in pixels of the upright photo.
            Only for a single photo.
        features: of `features.SHAPES`, which the adapter reads.
        encoder: for `eva_embedding` and `eva_hidden`.
        log: called with each message, one sentence.

    Raises:
        NoFaceError: no photo shows a face, or not the requested one.
        UsageError: a photo cannot be read, or the choice of the face is invalid.
    """
    check_choice(face_index, face_box)
    if face_box is not None and len(photos) > 1:
        raise UsageError(
            "a face box applies to one photo, but several are given",
            "choose the face by index, or crop the photos to the person",
        )
    report: Callable[[str], None] = (lambda _message: None) if log is None else log
    faces: list[_MeasuredFace] = []
    failures: list[tuple[str, str]] = []
    for photo in open_photos(photos):
        face = _measure(photo, analyzer, face_index, face_box, report, features, encoder)
        if isinstance(face, _MeasuredFace):
            faces.append(face)
        else:
            failures.append((photo.name, face))
    if not faces:
        raise NoFaceError(
            f"no face found in {', '.join(name for name, _ in failures)}: {failures[0][1]}",
            "use a photo where the face is upright, well lit and sharp, a tenth of the width or more",
        )
    for name, _ in failures:
        report(f"{name} omitted: no face found in it")
    names = [face.name for face in faces]
    embedding = np.stack([face.embedding for face in faces])
    crop = np.stack([face.crop for face in faces])
    weight = np.array([face.score for face in faces], np.float32)
    kept = _without_outliers(embedding, weight, names, report)
    measured = {name: np.stack([face.features[name] for face in faces])[kept] for name in faces[0].features}
    recognizer = getattr(analyzer, "recognizer", None)
    return Identity(embedding[kept], crop[kept], weight[kept], measured, recognizer)


def key_points_of(photo: Photo, analyzer: FaceAnalyzer) -> tuple[np.ndarray, tuple[int, int]]:
    """The key points of the largest face of a photo, [5, 2] in pixels of `photo.image`, and its size.

    Raises:
        NoFaceError: there is no face.
    """
    image = bgr(photo.image)
    faces = find_faces(image, analyzer)
    if not faces:
        raise NoFaceError(
            f"no face found in {photo.name}: {describe_attempts(image)}", "use another photo for the pose"
        )
    return faces[0].key_points, photo.image.size


@dataclass(frozen=True)
class _MeasuredFace:
    """The face taken from one photo."""

    name: str
    embedding: np.ndarray
    crop: np.ndarray
    score: float
    features: Mapping[str, np.ndarray]


def _measure(
    photo: Photo,
    analyzer: FaceAnalyzer,
    index: int | None,
    box: Box | None,
    report: Callable[[str], None],
    features: Collection[str],
    encoder: GrayFaceEncoder | None,
) -> _MeasuredFace | str:
    """Return the chosen face of a photo, or the attempts made if it shows none."""
    if box is None:
        upright, faces, turns = find_upright(photo.image, analyzer)
        if turns:
            photo = replace(photo, image=upright)
            report(f"{photo.name} lies on its side; rotated by {90 * turns} degrees")
    image = bgr(photo.image)
    if box is not None:  # in pixels of the photo as it is
        faces = find_faces(image, analyzer)
    if not faces and box is None:
        return describe_attempts(image)
    face = choose_face(photo, faces, analyzer, index=index, box=box)
    if len(faces) > 1 and index is None and box is None:
        report(
            f"{photo.name} shows {len(faces)} faces; using the largest, "
            f"at {rounded(scaled(face.box, 1 / photo.scale))}; --face-index 0 to {len(faces) - 1} "
            "(by size) or --face-box selects another"
        )
    if face.size[0] < SMALL_FACE:
        report(f"the face in {photo.name} is only {face.size[0]:.0f} pixels wide; expect lower similarity")
    embedding = analyzer.embed(image, face)
    measured: dict[str, np.ndarray] = {}
    if "embedding_norm" in features:
        raw = analyzer.raw_embedding(image, face)
        measured["embedding_norm"] = np.asarray(np.linalg.norm(raw), np.float32)
    if "key_points" in features:
        measured["key_points"] = (face.key_points / photo.scale).astype(np.float32)
        measured["photo_size"] = np.array(photo.image.size, np.float32) / np.float32(photo.scale)
    if encoder is not None:
        measured |= encoder.features(image, face.key_points)
    if not abs(float(np.linalg.norm(embedding.astype(np.float64))) - 1) <= UNIT_TOLERANCE:
        raise NoFaceError(f"the face in {photo.name} cannot be recognized", "use another photo")
    score = min(max(face.score, 1e-3), 1.0)
    return _MeasuredFace(photo.name, embedding, align(image, face), score, measured)


def _without_outliers(
    embedding: np.ndarray, weight: np.ndarray, names: list[str], report: Callable[[str], None]
) -> list[int]:
    """Indices of the photos that show one person. Reports omitted photos and remaining doubt."""
    left_out = outliers(embedding, weight)
    for index, likeness in left_out.items():
        report(
            f"{names[index]} omitted: it seems to show another person "
            f"(similarity {likeness:.2f} to the others)"
        )
    kept = [index for index in range(len(names)) if index not in left_out]
    if len(kept) > 1 and _agreement(embedding[kept]) < STRANGER:
        report(
            f"the photos may show different people (similarity {_agreement(embedding[kept]):.2f}): "
            f"{', '.join(names[index] for index in kept)}"
        )
    return kept


def outliers(embedding: np.ndarray, weight: np.ndarray) -> dict[int, float]:
    """Photos that show another person than the rest, worst first, with their similarity to the others.

    Repeatedly omits the photo whose embedding has the lowest cosine to the mean of the others, while that
    cosine is below `STRANGER` or below half of the others' agreement. Of two photos, neither can be
    identified as the wrong one.

    Args:
        embedding: [n, 512], unit norm.
        weight: [n], above 0.
    """
    kept = list(range(len(embedding)))
    omitted: dict[int, float] = {}
    while len(kept) > 2:
        likeness = {index: _likeness(embedding, weight, index, kept) for index in kept}
        worst = min(kept, key=lambda index: likeness[index])
        others = [index for index in kept if index != worst]
        if likeness[worst] >= max(STRANGER, HALF_AS_ALIKE * _agreement(embedding[others])):
            break
        kept = others
        omitted[worst] = likeness[worst]
    return omitted


def _likeness(embedding: np.ndarray, weight: np.ndarray, index: int, kept: list[int]) -> float:
    """Cosine of one embedding and the mean of the others."""
    others = [other for other in kept if other != index]
    mean = _mean(embedding[others], weight[others])
    return -1.0 if mean is None else float(embedding[index].astype(np.float64) @ mean)


def _agreement(embedding: np.ndarray) -> float:
    """Median cosine over all pairs of at least two embeddings: low if half of them differ."""
    pairs = np.triu_indices(len(embedding), 1)
    return float(np.median((embedding.astype(np.float64) @ embedding.T)[pairs]))


def _mean(embedding: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Weighted mean on the unit sphere, [512] float64, or None where the embeddings cancel."""
    total = (weight.astype(np.float64) / weight.max()) @ embedding.astype(np.float64)
    norm = float(np.linalg.norm(total))
    return total / norm if norm > 1e-6 else None


def _expect(name: str, array: np.ndarray, kind: type, shape: tuple[int, ...]) -> None:
    if array.dtype != kind or array.shape != shape:
        expected = ", ".join(str(side) for side in ("n", *shape[1:]))
        raise UsageError(
            f"{name} must be [{expected}] {np.dtype(kind).name}, one row per photo, "
            f"not {list(array.shape)} {array.dtype.name}"
        )


def _read(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The tensors of an identity file, checked by name and type before reading, and the recognizer."""
    from safetensors import SafetensorError, safe_open

    hint = "create one with --save-identity; pass photos with --face"
    if path.is_dir():
        raise UsageError(f"the identity file {path} is a folder", hint)
    if not path.is_file():
        raise UsageError(f"there is no identity file {path}", "check the path")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is not an identity file: it is larger than {MAX_BYTES >> 20} MB", hint)
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            _check_tensors(path, kinds, hint)
            recognizer = (file.metadata() or {}).get("recognizer")
            return {name: file.get_tensor(name) for name in kinds}, recognizer
    except SafetensorError as error:
        raise UsageError(f"{path} is not an identity file: {error}", hint) from error


def _check_tensors(path: Path, kinds: dict[str, Any], hint: str) -> None:
    known = {**_TENSORS, **dict.fromkeys(SHAPES, "F32")}
    for name, kind in kinds.items():
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"{path} is not an identity file: it contains {name[:80]!r}",
                f"did you mean '{near}'?" if near else hint,
            )
        if kind != known[name]:
            raise UsageError(f"{path} is not an identity file: {name} is {kind}, not {known[name]}")
    for name in ("id_embedding", "face_crop_bgr"):
        if name not in kinds:
            raise UsageError(f"{path} is not an identity file: it lacks {name}", hint)
