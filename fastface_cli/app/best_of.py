"""Best of several: who an image shows, whether it follows its prompt, and which one to keep.

The recognizer that conditions the adapter is a poor judge of its own work: it scores what the adapter was
trained to repeat. dlib's network never took part, so it judges where it is installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import ModelUnavailableError

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import FaceAnalyzer
    from ..identity.identity import Identity
    from .pipeline import GeneratedImage, Pipeline, Request

MOST = 1000
"""Candidates of one image."""

PROMPT_SCORER = "clip-vit-large-patch14"
"""Artifact that scores prompts where a stack has no matched pair of encoders of its own."""

_FACE_IN_CROP = (32, 63, 192, 223)
"""Where the face lies in an aligned crop of 224 pixels, as dlib's landmarks want it: brows to chin."""


@dataclass(frozen=True)
class Score:
    """The scores of one candidate; higher is better."""

    seed: int
    likeness: float | None
    """By the judge; None where no face was found."""
    prompt: float | None
    """Cosine of image and prompt; None where nothing could score it."""

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
        """How the image was chosen, for its metadata; contains nothing about the person."""
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
    """What measured the likeness."""


class Judge(Protocol):
    """Measures how much a face looks like a person."""

    name: str
    """As messages call it."""

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
    """dlib's ResNet, trained apart from every adapter: one minus the distance of its 128 numbers.

    It looks at the crop aligned by the detector of the stack, not at what dlib's own detector finds, so that
    an identity file, which holds only such crops, is as good a reference as the photo.
    """

    name = "dlib"

    def __init__(self) -> None:
        import dlib

        found = importlib.util.find_spec("face_recognition_models")
        if found is None or found.origin is None:
            raise ImportError("face_recognition_models")
        # Not imported: it asks for setuptools' retired pkg_resources; only its folder is needed.
        folder = Path(found.origin).parent / "models"
        self._dlib: Any = dlib
        self._points = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(
            str(folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def describe(self, image: np.ndarray, crop: np.ndarray, face: Any) -> np.ndarray:
        """See `Judge`: [128] float64."""
        rgb = np.ascontiguousarray(crop[..., ::-1])
        points = self._points(rgb, self._dlib.rectangle(*_FACE_IN_CROP))
        return np.array(self._network.compute_face_descriptor(rgb, points))

    def reference(self, identity: Identity) -> np.ndarray:
        """The mean over the photos, weighted as the identity weighs them."""
        each = [self.describe(crop, crop, None) for crop in identity.face_crop_bgr]
        return np.average(each, axis=0, weights=identity.weight)

    def likeness(self, embedding: np.ndarray, reference: np.ndarray) -> float:
        """One minus the distance; dlib takes two faces for one person's from 0.4 on."""
        return 1.0 - float(np.linalg.norm(embedding - reference))


class ConditioningJudge:
    """The recognizer that conditioned the image: cosine of its embeddings. Better than nothing."""

    name = "the conditioning recognizer"

    def __init__(self, analyzer: FaceAnalyzer) -> None:
        self._analyzer = analyzer

    def describe(self, image: np.ndarray, crop: np.ndarray, face: Any) -> np.ndarray:
        """See `Judge`: [512] float32, unit norm."""
        return self._analyzer.embed(image, face)

    def reference(self, identity: Identity) -> np.ndarray:
        """The embedding that conditions."""
        return identity.mean()

    def likeness(self, embedding: np.ndarray, reference: np.ndarray) -> float:
        """Cosine."""
        return float(embedding.astype(np.float64) @ reference.astype(np.float64))


def pick_judge(analyzer: FaceAnalyzer, log: Callable[[str], None] = lambda _: None) -> Judge:
    """dlib where it is installed, else the conditioning recognizer, with a notice.

    Args:
        analyzer: the face models of the stack.
        log: takes one line of notice.
    """
    try:
        return DlibJudge()
    except ImportError:
        log(
            "likeness is judged by the recognizer that conditions the image, which favours copies; "
            "for an independent judge: pip install 'fastface-cli[dlib]'"
        )
        return ConditioningJudge(analyzer)


PromptScorer = Callable[[str, "Image.Image"], float]
"""Prompt and image -> cosine of their CLIP embeddings."""


def own_prompt_scorer(pipeline: Pipeline) -> PromptScorer | None:
    """The stack's own encoders as a judge of the prompt, where they were trained as a pair.

    The pocket's second text encoder and its image encoder were. SDXL's text encoders are CLIP ViT-L/14 and
    ViT-bigG/14, FaceID's image encoder is a ViT-H/14: no two of them share a space.
    """
    model = pipeline.recipe.model
    if (model.base, model.image_encoder) != ("pocket-base", "pocket-clip"):
        return None
    from transformers import CLIPImageProcessorPil

    parts = pipeline.parts
    size = parts.image_encoder.config.image_size
    return _cosine(
        words=parts.tokenizer_2,
        text=lambda ids: parts.text_encoder_2(ids).text_embeds,
        processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
        vision=lambda pixels: parts.image_encoder(pixels).image_embeds,
        device=parts.image_encoder.device,  # where memory is saved, not the pipeline's
        dtype=pipeline.dtype,
    )


def clip_prompt_scorer(folder: Path, pipeline: Pipeline) -> PromptScorer:
    """A CLIP model from a folder, put beside the stack.

    Raises:
        ModelUnavailableError: the folder does not hold one.
    """
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from ..quiet import quiet_libraries

    # Where memory is saved there is no room for it on the card.
    device = torch.device("cpu") if pipeline.level.encoders else pipeline.device
    dtype = torch.float32 if device.type == "cpu" else pipeline.dtype
    try:
        with quiet_libraries():
            model: Any = CLIPModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
            words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelUnavailableError(
            f"the prompt scorer in {folder} does not load: {(str(error).splitlines() or [''])[0]}",
            f"check it with: fastface download {PROMPT_SCORER} --verify",
        ) from error
    model = model.eval().to(device)
    size = model.config.vision_config.image_size
    return _cosine(
        words=words,
        text=lambda ids: model.text_projection(model.text_model(ids).pooler_output),
        processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
        vision=lambda pixels: model.visual_projection(model.vision_model(pixels).pooler_output),
        device=device,
        dtype=dtype,
    )


def _cosine(
    *,
    words: Any,
    text: Callable[[Any], Any],
    processor: Any,
    vision: Callable[[Any], Any],
    device: Any,
    dtype: Any,
) -> PromptScorer:
    import torch
    from torch.nn import functional

    encoded: dict[str, Any] = {}

    @torch.inference_mode()
    def score(prompt: str, image: Image.Image) -> float:
        if prompt not in encoded:
            ids = words(
                prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            ).input_ids
            encoded[prompt] = text(ids.to(device)).float()
        pixels = processor(image, return_tensors="pt").pixel_values.to(device, dtype)
        return float(functional.cosine_similarity(encoded[prompt], vision(pixels).float()))

    return score


@dataclass
class Scorer:
    """Scores candidates: the face against the person, the image against its prompt."""

    analyzer: FaceAnalyzer
    judge: Judge
    prompt: PromptScorer | None

    def __post_init__(self) -> None:
        self._references: dict[str, np.ndarray] = {}

    def score(self, image: Image.Image, *, identity: Identity, prompt: str, seed: int) -> Score:
        """Score one image by its largest face."""
        from ..identity.analyzer import align
        from ..identity.search import bgr, find_faces

        prompt_score = self.prompt(prompt, image) if self.prompt else None
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
