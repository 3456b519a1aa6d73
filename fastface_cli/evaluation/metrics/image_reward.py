"""Which image people would prefer for a prompt: ImageReward v1.0 (Xu et al., arXiv 2304.05977), in the BLIP
that transformers has. The published weights keep their own names; `STATE` says which is which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .aesthetic import broken, predict, read_pickle, regression
from .base import Column, Context, Needs, Sample, Scores

if TYPE_CHECKING:
    import torch

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the rewards before they are given, over the set that ImageReward was made with."""
TOKENS = 35
"""Longer prompts are cut, shorter ones padded."""
SIDE = 224
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
"""ViT-L/16 as BLIP has it. transformers' own default for the last is 1e-5."""
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
"""The published med_config.json."""
STATE = (
    (r"visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"visual_encoder\.blocks\.(\d+)\.norm1\.", r"vision.encoder.layers.\1.layer_norm1."),
    (r"visual_encoder\.blocks\.(\d+)\.norm2\.", r"vision.encoder.layers.\1.layer_norm2."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"text_encoder\.", "text."),
)
"""Beginnings of names in the published file, after `blip.`, and what they are here."""
UNUSED = (r"blip\.(vision_proj|text_proj)\.", r"blip\.text_encoder\.embeddings\.position_ids")
"""Projections of BLIP's other tasks, and indices that are not weights."""


class Towers:
    """BLIP's vision tower, its text tower that looks at what the first saw, and the regression to a reward.

    Args:
        vision: overrides of `VISION`.
        text: overrides of `TEXT`.
    """

    def __init__(
        self, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
    ) -> None:
        import torch
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        seeing = BlipVisionConfig(**{**VISION, **(vision or {})}, attention_dropout=0.0)
        # `is_decoder` gives it its cross-attention; it reads in both directions all the same.
        reading = BlipTextConfig(
            **{**TEXT, **(text or {})},
            encoder_hidden_size=seeing.hidden_size,
            is_decoder=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.device("meta"):
            self.vision: Any = BlipVisionModel(seeing)
            self.text: Any = BlipTextModel(reading, add_pooling_layer=False)
        self.head: Any = None

    def load(self, state: Mapping[str, torch.Tensor], device: str) -> None:
        """Take over the weights of the published file, in float32.

        Raises:
            ValueError: a weight is missing, unknown or of another shape.
        """
        import torch

        parts: dict[str, dict[str, torch.Tensor]] = {"vision": {}, "text": {}, "mlp": {}}
        for name, tensor in state.items():
            if not any(re.match(pattern, name) for pattern in UNUSED):
                part, _, rest = our_name(name).partition(".")
                parts[part][rest] = tensor.float()
        for part, model in (("vision", self.vision), ("text", self.text)):
            try:
                model.load_state_dict(parts[part], strict=True, assign=True)
            except RuntimeError as error:
                raise ValueError(" ".join(str(error).split())[:300]) from error
            # Indices that are computed, not stored.
            if part == "text":
                embeddings = model.embeddings
                count = embeddings.position_embeddings.num_embeddings
                embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
            model.eval().requires_grad_(False).to(device)
        self.head = regression(parts["mlp"], device)

    def read(self, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Encode prompts with cross-attention to images.

        Args:
            ids: [n, tokens].
            mask: [n, tokens], 0 where padded.
            pixels: [n, 3, side, side], normalized.

        Returns:
            [n, width] at the first token.
        """
        seen = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        first: torch.Tensor = states.last_hidden_state[:, 0]
        return first


def our_name(name: str) -> str:
    """Where a weight of the published file goes: `vision.`, `text.` or `mlp.` and the name in that part.

    Raises:
        ValueError: it is none of ImageReward's.
    """
    if name.startswith("mlp."):
        return name
    bare = name.removeprefix("blip.")
    for pattern, replacement in STATE:
        if re.match(pattern, bare):
            return re.sub(pattern, replacement, bare, count=1)
    raise ValueError(f"it holds {name}, which is not ImageReward's")


class ImageReward:
    """ImageReward v1.0."""

    name = "image-reward"
    summary = "ImageReward v1.0: which image people would prefer for the prompt"
    columns = (
        Column(
            "image_reward",
            "ImageReward",
            True,
            "",
            "Predicted human preference for the image given the prompt, about -2 to 2.",
        ),
    )
    needs = Needs(artifacts=("image-reward", "bert-base-uncased-vocabulary"))
    _towers: Towers
    _device: str

    def load(self, context: Context) -> None:
        """See `Metric`."""
        from transformers import CLIPImageProcessorPil

        file = context.paths["image-reward"] / "ImageReward.pt"
        towers = Towers()
        try:
            towers.load(read_pickle(file, "ImageReward"), context.device)
        except ValueError as error:
            raise broken(file, "ImageReward", error) from error
        self._towers, self._device = towers, context.device
        self._words = read_words(context.paths["bert-base-uncased-vocabulary"])
        # CLIP's mean and deviation are the ones that ImageReward was trained with.
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        rewards = self.rewards([sample.prompt for sample in samples], [sample.image for sample in samples])
        return [{"image_reward": float(reward)} for reward in rewards]

    def rewards(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
        """[n]"""
        import torch

        words = self._words(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        pixels = self._processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        with torch.inference_mode():
            first = self._towers.read(
                words["input_ids"].to(self._device),
                words["attention_mask"].to(self._device),
                pixels.to(self._device, torch.float32),
            )
        raw = predict(self._towers.head, first.cpu().numpy())
        return np.asarray((raw - MEAN) / DEVIATION)


def read_words(file: Path) -> Any:
    """BERT's tokenizer, lower case, from its vocabulary.

    Raises:
        ModelUnavailableError: the file is not one.
    """
    from transformers import BertTokenizer

    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        vocabulary = {word: number for number, word in enumerate(lines)}
        return BertTokenizer(vocab=vocabulary, do_lower_case=True)
    except (OSError, ValueError, KeyError) as error:
        raise broken(file, "BERT's vocabulary", error) from error
