"""Does the picture show what the prompt says: cosines of CLIP embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from ...errors import ModelUnavailableError
from .base import Column, Context, Needs, Sample, Scores
from .memory import Memory, digest

if TYPE_CHECKING:
    import torch

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on, by channel."""
TOKENS = 77
"""Longer prompts are cut: CLIP reads no more."""


class Clip:
    """A pair of CLIP towers that share a space.

    Args:
        texts: prompts -> [n, d].
        pictures: prepared pixels [n, 3, side, side] -> [n, d].
        side: of the pixels that the vision tower reads.
        device: where both are.
    """

    def __init__(
        self,
        texts: Callable[[list[str]], torch.Tensor],
        pictures: Callable[[torch.Tensor], torch.Tensor],
        side: int,
        device: str,
    ) -> None:
        self._texts = texts
        self._pictures = pictures
        self.side = side
        self.device = device
        self._told: Memory[np.ndarray] = Memory()
        self._seen: Memory[np.ndarray] = Memory()

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors of prompts, [n, d] float32; remembered. Each is read alone: which of them are new
        depends on where a run was cut off, and batches of other sizes round differently."""
        found = self._told.many(
            prompts, lambda new: [self._unit(self._texts, [prompts[place]])[0] for place in new]
        )
        return np.stack(found)

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of pictures, [n, d] float32; remembered."""
        keys = [digest(picture) for picture in pictures]
        found = self._seen.many(
            keys, lambda new: list(self.tensors([centred(pictures[place]) for place in new]))
        )
        return np.stack(found)

    def tensors(self, pictures: Sequence[torch.Tensor]) -> np.ndarray:
        """Unit vectors of pictures given as [3, height, width] in [-1, 1], [n, d] float32."""
        import torch

        pixels = torch.stack([prepare(one.to(self.device), self.side) for one in pictures])
        return self._unit(self._pictures, pixels)

    @staticmethod
    def _unit(tower: Callable[[Any], torch.Tensor], given: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vectors = tower(given).float()
            return np.asarray((vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy())


def centred(picture: Image.Image) -> torch.Tensor:
    """A picture as [3, height, width] float32 in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def prepare(picture: torch.Tensor, side: int) -> torch.Tensor:
    """What the vision tower reads of a picture: shorter side scaled to `side` (bicubic), the middle of the
    longer one, normalized. On floats without rounding between, as the published evaluation does.

    Args:
        picture: [3, height, width], meant to be in [-1, 1].

    Returns:
        [3, side, side].
    """
    import torch
    from torch.nn import functional

    height, width = picture.shape[1:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    pixels = (picture + 1) / 2
    if size != (height, width):
        pixels = functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (round((length - side) / 2) for length in size)
    pixels = pixels[:, top : top + side, left : left + side]
    mean = torch.tensor(MEAN, device=picture.device)[:, None, None]
    return (pixels - mean) / torch.tensor(DEVIATION, device=picture.device)[:, None, None]


def load_clip(folder: Path, device: str) -> Clip:
    """A CLIP model of the Hub, in float32.

    Raises:
        ModelUnavailableError: the folder does not hold one.
    """
    from transformers import CLIPModel, CLIPTokenizer

    def load() -> Clip:
        model = _strictly(CLIPModel, folder, device)
        words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

        def texts(prompts: list[str]) -> torch.Tensor:
            found: torch.Tensor = model.get_text_features(**tokens(words, prompts, device)).pooler_output
            return found

        def pictures(pixels: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model.get_image_features(pixel_values=pixels).pooler_output
            return found

        return Clip(texts, pictures, int(model.config.vision_config.image_size), device)

    return _loaded(load, folder)


def load_pocket_clip(base: Path, encoder: Path, device: str) -> Clip:
    """The pocket stack's second text encoder and its image encoder, which were trained as a pair."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    def load() -> Clip:
        speaker = _strictly(CLIPTextModelWithProjection, base / "text_encoder_2", device, variant="fp16")
        seer = _strictly(CLIPVisionModelWithProjection, encoder, device)
        words = CLIPTokenizer.from_pretrained(base / "tokenizer_2", local_files_only=True)

        def texts(prompts: list[str]) -> torch.Tensor:
            found: torch.Tensor = speaker(**tokens(words, prompts, device)).text_embeds
            return found

        def pictures(pixels: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = seer(pixel_values=pixels).image_embeds
            return found

        return Clip(texts, pictures, int(seer.config.image_size), device)

    return _loaded(load, encoder)


def tokens(words: Any, prompts: list[str], device: str) -> dict[str, torch.Tensor]:
    """What a text tower reads: ids padded to their full length. What pads comes after the end that is pooled,
    and the towers are causal: it changes nothing."""
    given = words(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {"input_ids": given["input_ids"].to(device)}


def _strictly(kind: Any, folder: Path, device: str, **options: Any) -> Any:
    """A model in float32, every one of its weights from the folder."""
    import torch

    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    absent = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    if absent or report["mismatched_keys"]:
        raise ValueError(f"it lacks {next(iter(absent), 'weights of the right shape')}")
    return model.eval().requires_grad_(False).to(device)


def _loaded(load: Callable[[], Clip], folder: Path) -> Clip:
    from ...models.quiet import quiet_libraries

    try:
        with quiet_libraries():
            return load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelUnavailableError(
            f"the CLIP model in {folder} does not load: {(str(error).splitlines() or [''])[0]}",
            "fetch it again with: fastface download",
        ) from error


class ClipScore:
    """Cosine of prompt and picture; a subclass says by which CLIP."""

    name: str
    summary: str
    columns: tuple[Column, ...]
    needs: Needs
    _clip: Clip

    def load(self, context: Context) -> None:
        """See `Metric`."""
        self._clip = hub_clip(context, self.needs.artifacts[0])

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        texts = self._clip.texts([sample.prompt for sample in samples])
        pictures = self._clip.pictures([sample.picture for sample in samples])
        return [{self.columns[0].name: float(cosine)} for cosine in (texts * pictures).sum(axis=1)]


def hub_clip(context: Context, artifact: str) -> Clip:
    """The CLIP that all metrics of a context share."""
    return context.once(artifact, lambda: load_clip(context.paths[artifact], context.device))


CLIP_L14 = "clip-vit-large-patch14"


class ClipL14(ClipScore):
    """Cosine by CLIP ViT-L/14 (METHOD: evaluation)."""

    name = "clip-l14"
    summary = "cosine of prompt and picture by CLIP ViT-L/14"
    columns = (Column("clip_l14", "CLIP L/14", True, "", "Cosine of prompt and picture by CLIP ViT-L/14."),)
    needs = Needs(artifacts=(CLIP_L14,))


class ClipB32(ClipScore):
    """Cosine by CLIP ViT-B/32 (METHOD: evaluation)."""

    name = "clip-b32"
    summary = "cosine of prompt and picture by CLIP ViT-B/32"
    columns = (Column("clip_b32", "CLIP B/32", True, "", "Cosine of prompt and picture by CLIP ViT-B/32."),)
    needs = Needs(artifacts=("clip-vit-base-patch32",))


class PocketClip(ClipScore):
    """Cosine by the pocket stack's own CLIP, which knows its words and pictures and works offline.

    The same text tower conditions the pictures: good enough to compare recipes, no independent judge.
    """

    name = "clip-pocket"
    summary = "cosine of prompt and picture by the pocket's own CLIP; works offline"
    columns = (
        Column(
            "clip_pocket",
            "CLIP (pocket)",
            True,
            "",
            "Cosine of prompt and picture by the pocket stack's own CLIP.",
        ),
    )
    needs = Needs(artifacts=("pocket-base", "pocket-clip"))
    SHARED: ClassVar[str] = "pocket clip"

    def load(self, context: Context) -> None:
        """See `Metric`."""
        base, encoder = (context.paths[name] for name in self.needs.artifacts)
        self._clip = context.once(self.SHARED, lambda: load_pocket_clip(base, encoder, context.device))
