"""Best of several: score candidates by identity similarity and prompt adherence, and choose one.

The recognizer that conditions the adapter also scores what the adapter was trained to reproduce. dlib is
independent of it, so it is used if it is installed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import pocket
from ..errors import ModelUnavailableError, UsageError
from ..identity.analyzer import has_recognizer
from ..scorers.dlib_recognizer import DlibRecognizer, similarities

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import FaceAnalyzer
    from ..identity.identity import Identity
    from ..recipe.schema import AdapterName, Recipe
    from ..scorers.clip import Clip
    from .pipeline import GeneratedImage, Pipeline, Request

log = logging.getLogger(__name__)

MOST = 1000
"""Candidates of one image."""

PROMPT_SCORER = "clip-vit-large-patch14"
"""The artifact that scores prompts if a stack has no CLIP pair of its own."""


@dataclass(frozen=True)
class Score:
    """The scores of one candidate; higher is better."""

    seed: int
    likeness: float | None
    """Similarity to the person; None without a face."""
    prompt: float | None
    """Cosine of image and prompt; None without a CLIP model."""

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"seed": self.seed, "likeness": _rounded(self.likeness), "prompt": _rounded(self.prompt)}


@dataclass(frozen=True)
class Candidates:
    """Several images of one prompt, and their scores."""

    images: tuple[GeneratedImage, ...]
    scores: tuple[Score, ...]
    judge: str

    @property
    def kept(self) -> int:
        """Index of the one to keep: see `choose`."""
        return choose(self.scores)

    def summary(self) -> dict[str, Any]:
        """How the image was chosen, for its metadata; contains no data about the person."""
        kept = self.scores[self.kept]
        return {
            "count": len(self.scores),
            "first_seed": self.scores[0].seed,
            "judge": self.judge,
            "likeness": _rounded(kept.likeness),
            "prompt": _rounded(kept.prompt),
        }


@dataclass(frozen=True)
class Best:
    """The image that was kept, and the scores of all candidates."""

    image: Image.Image
    """8-bit RGB."""
    seed: int
    """Of the image that was kept."""
    scores: tuple[Score, ...]
    """Of every candidate, in the order of their seeds."""
    judge: str
    """Name of the recognizer that scored the likeness."""


class Judge(Protocol):
    """Scores the similarity of a face to a person."""

    name: str
    """Its name in messages."""

    def check(self, identity: Identity) -> None:
        """Refuse an identity that it cannot compare; fast.

        Raises:
            UsageError: its embedding is of another recognizer.
        """
        ...

    def describe(self, image: np.ndarray, crop: np.ndarray, face: Any) -> np.ndarray:
        """The embedding of a face.

        Args:
            image: [height, width, 3] uint8, BGR.
            crop: the aligned face, [224, 224, 3] BGR.
            face: the detected face.
        """
        ...

    def reference(self, identity: Identity) -> np.ndarray:
        """The embedding of a person."""
        ...

    def likeness(self, embedding: np.ndarray, reference: np.ndarray) -> float:
        """Similarity of two embeddings; higher is more similar."""
        ...


class DlibJudge:
    """dlib's recognizer on the crop that the stack's detector aligned.

    dlib's own detector is not used, so that an identity file, which contains only crops, is as good a
    reference as the photo.
    """

    name = "dlib"

    def __init__(self) -> None:
        self._recognizer = DlibRecognizer()

    def check(self, identity: Identity) -> None:
        """See `Judge`: every identity has a crop."""

    def describe(self, image: np.ndarray, crop: np.ndarray, face: Any) -> np.ndarray:
        """See `Judge`: [128] float64."""
        return self._recognizer.describe_crop(crop)

    def reference(self, identity: Identity) -> np.ndarray:
        """The mean over the photos, with the weights of the identity."""
        each = [self._recognizer.describe_crop(crop) for crop in identity.face_crop_bgr]
        return np.average(each, axis=0, weights=identity.weight)

    def likeness(self, embedding: np.ndarray, reference: np.ndarray) -> float:
        """1 minus the distance; photos of one person are above 0.4."""
        return float(similarities(embedding[None], reference[None])[0, 0])


class RecipeJudge:
    """The recognizer of the recipe's face models: cosine of its embeddings.

    Args:
        analyzer: the face models.
        conditions: whether the adapter reads the embedding.
    """

    def __init__(self, analyzer: FaceAnalyzer, *, conditions: bool) -> None:
        self._analyzer = analyzer
        self.name = "the conditioning recognizer" if conditions else "the recipe's recognizer"

    def check(self, identity: Identity) -> None:
        """See `Judge`."""
        own = getattr(self._analyzer, "recognizer", None)
        if None not in (own, identity.recognizer) and identity.recognizer != own:
            raise UsageError(
                f"the identity was made with the recognizer {identity.recognizer}, and --best-of compares "
                f"images by {own}",
                "make the identity again from the photo, or install dlib: pip install 'fastface-cli[dlib]'",
            )

    def describe(self, image: np.ndarray, crop: np.ndarray, face: Any) -> np.ndarray:
        """See `Judge`: [512] float32, unit norm."""
        return self._analyzer.embed(image, face)

    def reference(self, identity: Identity) -> np.ndarray:
        """The embedding of the identity; see `check`."""
        self.check(identity)
        return identity.mean()

    def likeness(self, embedding: np.ndarray, reference: np.ndarray) -> float:
        """Cosine."""
        return float(embedding.astype(np.float64) @ reference.astype(np.float64))


def pick_judge(analyzer: FaceAnalyzer, kind: AdapterName) -> Judge:
    """dlib if it is installed, otherwise the recipe's recognizer, with a warning if it conditions the image.

    Args:
        analyzer: the face models of the stack.
        kind: of the adapter.

    Raises:
        ModelUnavailableError: dlib is not installed, and the face models contain no recognizer.
    """
    try:
        return DlibJudge()
    except ModelUnavailableError as error:
        if not has_recognizer(analyzer):
            raise ModelUnavailableError(
                "--best-of compares faces, and this recipe has no face recognizer",
                "pip install 'fastface-cli[dlib]'",
            ) from error
    conditions = kind != "plus_face"  # it reads the crop alone
    if conditions:
        log.warning(
            "likeness is scored by the recognizer that conditions the image, which favors copies; "
            "for an independent recognizer: pip install 'fastface-cli[dlib]'"
        )
    return RecipeJudge(analyzer, conditions=conditions)


def has_own_clip(recipe: Recipe) -> bool:
    """Whether the encoders of a recipe are a CLIP pair.

    The second text encoder and the image encoder of the pocket stack are. SDXL's text encoders are CLIP
    ViT-L/14 and ViT-bigG/14, FaceID's image encoder is a ViT-H/14: no two of them share an embedding space.
    """
    return (recipe.model.base, recipe.model.image_encoder) == (pocket.BASE, pocket.IMAGE_ENCODER)


@dataclass
class Scorer:
    """Scores candidates: the face against the person, the image against its prompt."""

    analyzer: FaceAnalyzer
    judge: Judge
    clip: Clip | None
    """Scores how well an image follows its prompt; None if no CLIP model is installed."""

    def __post_init__(self) -> None:
        self._references: dict[str, np.ndarray] = {}

    def score(self, image: Image.Image, *, identity: Identity, prompt: str, seed: int) -> Score:
        """Score one image by its largest face."""
        from ..identity.analyzer import align
        from ..identity.search import bgr, find_faces

        prompt_score = self.clip.similarity(prompt, image) if self.clip else None
        pixels = bgr(image)
        faces = find_faces(pixels, self.analyzer)
        if not faces:
            return Score(seed, None, prompt_score)
        key = identity.digest()
        if key not in self._references:
            self._references[key] = self.judge.reference(identity)
        embedding = self.judge.describe(pixels, align(pixels, faces[0]), faces[0])
        likeness = self.judge.likeness(embedding, self._references[key])
        return Score(seed, likeness if math.isfinite(likeness) else None, prompt_score)


def make_candidates(
    pipeline: Pipeline, scorer: Scorer, requests: Sequence[Request], **options: Any
) -> Candidates:
    """Generate and score the candidates of one image.

    Args:
        requests: one prompt and one person with several seeds.
        options: of `Pipeline.generate`.
    """
    images = tuple(pipeline.generate(requests, **options))
    scores = tuple(
        scorer.score(
            image.image,
            identity=image.request.identity,
            prompt=image.request.prompt,
            seed=image.request.seed,
        )
        for image in images
    )
    return Candidates(images, scores, scorer.judge.name)


def choose(scores: Sequence[Score]) -> int:
    """Which candidate to keep.

    Candidates without a face are out. Of the others the third that follows the prompt least is left out
    (rounded down: of two or fewer none), where prompts were scored. The one most like the person is kept.
    Where no candidate shows a face, the one that follows the prompt best is kept, else the first.

    Args:
        scores: of at least one candidate.

    Returns:
        Its index; of equals the first.
    """
    return max(standing(scores), key=lambda index: _order(scores[index]))


def standing(scores: Sequence[Score]) -> list[int]:
    """The candidates that `choose` compares: those with a face that follow the prompt."""
    shown = [index for index, score in enumerate(scores) if score.likeness is not None]
    if not shown:
        return list(range(len(scores)))
    by_prompt = sorted(shown, key=lambda index: _or_lowest(scores[index].prompt))
    scored = any(scores[index].prompt is not None for index in shown)
    return sorted(by_prompt[len(shown) // 3 :]) if scored else shown


def _order(score: Score) -> tuple[float, float]:
    return _or_lowest(score.likeness), _or_lowest(score.prompt)


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
