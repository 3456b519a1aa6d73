"""CLIP: embeddings of prompts and images in one space; their cosine measures prompt adherence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cachetools import LRUCache, cachedmethod
from PIL import Image

from ..errors import ModelUnavailableError
from .cache import CACHE_SIZE, image_key

if TYPE_CHECKING:
    import torch

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation per channel of the images that CLIP was trained on."""
TOKENS = 77
"""Longer prompts are truncated: the limit of CLIP."""


class Clip:
    """A text tower and a vision tower that share one embedding space.

    Args:
        texts: prompts -> [n, d].
        images: prepared pixels [n, 3, side, side] -> [n, d].
        side: input size of the vision tower in pixels.
        device: device of both towers.
        dtype: of the pixels; None is float32.
    """

    def __init__(
        self,
        texts: Callable[[list[str]], torch.Tensor],
        images: Callable[[torch.Tensor], torch.Tensor],
        side: int,
        device: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._texts = texts
        self._images = images
        self.side = side
        self.device = device
        self.dtype = dtype
        self._prompt_cache: LRUCache[Any, np.ndarray] = LRUCache(CACHE_SIZE)
        self._image_cache: LRUCache[bytes, np.ndarray] = LRUCache(CACHE_SIZE)

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return unit vectors of prompts, [n, d] float32; cached."""
        return np.stack([self._text(prompt) for prompt in prompts])

    @cachedmethod(lambda self: self._prompt_cache)
    def _text(self, prompt: str) -> np.ndarray:
        # Not in batches: which prompts are new depends on where a run was interrupted, and results round
        # differently in batches of different sizes.
        vector: np.ndarray = self._unit(self._texts, [prompt])[0]
        return vector

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return unit vectors of images, [n, d] float32; cached."""
        keys = [image_key(image) for image in images]
        vectors = {key: self._image_cache[key] for key in keys if key in self._image_cache}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in vectors}
        if missing:
            embedded = self.tensors([to_tensor(image) for image in missing.values()])
            vectors.update(zip(missing, embedded, strict=True))
            self._image_cache.update(vectors)
        return np.stack([vectors[key] for key in keys])

    def tensors(self, images: Sequence[torch.Tensor]) -> np.ndarray:
        """Return unit vectors of images given as [3, height, width] in [-1, 1], [n, d] float32."""
        import torch

        pixels = torch.stack([prepare(image.to(self.device), self.side) for image in images])
        return self._unit(self._images, pixels.to(self.dtype or torch.float32))

    def similarity(self, prompt: str, image: Image.Image) -> float:
        """Return the cosine of a prompt and an image."""
        return float((self.texts([prompt]) * self.images([image])).sum())

    @staticmethod
    def _unit(tower: Callable[[Any], torch.Tensor], inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vectors = tower(inputs).float()
            return np.asarray((vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an image as [3, height, width] float32 in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def prepare(image: torch.Tensor, side: int) -> torch.Tensor:
    """Prepare an image for the vision tower: scale the shorter side to `side` (bicubic), crop the center and
    normalize. All in float without rounding in between, as in the published evaluation.

    Args:
        image: [3, height, width], expected in [-1, 1].

    Returns:
        [3, side, side].
    """
    import torch
    from torch.nn import functional

    height, width = image.shape[1:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    pixels = (image + 1) / 2
    if size != (height, width):
        pixels = functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (round((length - side) / 2) for length in size)
    pixels = pixels[:, top : top + side, left : left + side]
    mean = torch.tensor(MEAN, device=image.device)[:, None, None]
    return (pixels - mean) / torch.tensor(DEVIATION, device=image.device)[:, None, None]


def load_clip(folder: Path, device: str, dtype: torch.dtype | None = None) -> Clip:
    """Load a CLIP model of the Hub.

    Args:
        folder: model and tokenizer.
        device: where to.
        dtype: of the weights; None is float32.

    Raises:
        ModelUnavailableError: the folder does not contain one.
    """
    from transformers import CLIPModel, CLIPTokenizer

    def load() -> Clip:
        model = _strictly(CLIPModel, folder, device, dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

        def texts(prompts: list[str]) -> torch.Tensor:
            embeddings: torch.Tensor = model.get_text_features(
                **tokens(tokenizer, prompts, device)
            ).pooler_output
            return embeddings

        def images(pixels: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = model.get_image_features(pixel_values=pixels).pooler_output
            return embeddings

        return Clip(texts, images, int(model.config.vision_config.image_size), device, dtype)

    return _loaded(load, folder)


def load_pocket_clip(base: Path, encoder: Path, device: str) -> Clip:
    """Load the pocket stack's second text encoder and its image encoder, which were trained as a pair."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    def load() -> Clip:
        text_model = _strictly(CLIPTextModelWithProjection, base / "text_encoder_2", device, variant="fp16")
        vision_model = _strictly(CLIPVisionModelWithProjection, encoder, device)
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer_2", local_files_only=True)

        def texts(prompts: list[str]) -> torch.Tensor:
            embeddings: torch.Tensor = text_model(**tokens(tokenizer, prompts, device)).text_embeds
            return embeddings

        def images(pixels: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = vision_model(pixel_values=pixels).image_embeds
            return embeddings

        return Clip(texts, images, int(vision_model.config.image_size), device)

    return _loaded(load, encoder)


def tokens(tokenizer: Any, prompts: list[str], device: str) -> dict[str, torch.Tensor]:
    """Return token ids padded to full length. Padding does not change the result: it follows the end token
    that is pooled, and the towers are causal."""
    encoded = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return {"input_ids": encoded["input_ids"].to(device)}


def _strictly(kind: Any, folder: Path, device: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Load a model and refuse one with missing weights."""
    import torch

    model, report = kind.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    absent = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    if absent or report["mismatched_keys"]:
        raise ValueError(f"it has no {next(iter(absent), 'weights of the right shape')}")
    return model.eval().requires_grad_(False).to(device)


def _loaded(load: Callable[[], Clip], folder: Path) -> Clip:
    from ..quiet import quiet_libraries

    try:
        with quiet_libraries():
            return load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelUnavailableError(
            f"the CLIP model in {folder} does not load: {(str(error).splitlines() or [''])[0]}",
            "download it again with: fastface download",
        ) from error
