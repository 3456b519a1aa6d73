"""A tiny CLIP: two text towers for the UNet, a vision tower for the adapter, their cosine for prompt scores.

The first text tower has no projection in SDXL's layout; it learns through one that is thrown away.
The vision tower also learns to tell people apart on aligned crops (teacher's embeddings), in RGB and
in BGR order, because the adapter is shown crops in BGR.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from training import captions, data, tokenizer
from training.common import Ema, Run, autocast, descend, device, options
from training.recognizer import degrade

TEXT_WIDTH = 64
PROJECTION = 64
VISION_SIDE = 64
BATCH = 128
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIPImageProcessor's own normalisation."""


def text_config(vocabulary: int) -> dict[str, Any]:
    """Shape of either text tower."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": PROJECTION,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "attn_implementation": "eager",
    }


def vision_config() -> CLIPVisionConfig:
    """Shape of the vision tower: 64x64 pixels, 64 patches."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=VISION_SIDE,
        patch_size=8,
        projection_dim=PROJECTION,
        hidden_act="quick_gelu",
        # For sequences this short the plain matrix products beat the fused kernel's backward pass.
        attn_implementation="eager",
    )


class Clip(nn.Module):
    """The three towers and what only training needs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_1 = CLIPTextModel(CLIPTextConfig(**text_config(vocabulary)))
        self.text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(vocabulary)))
        self.vision = CLIPVisionModelWithProjection(vision_config())
        self.project_1 = nn.Linear(TEXT_WIDTH, PROJECTION, bias=False)
        self.person = nn.Linear(96, 192)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [n, length] -> unit vectors of both towers, [n, 64] each."""
        first = self.project_1(self.text_1(ids).pooler_output)
        second = self.text_2(ids).text_embeds
        return F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)

    def pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized pixels [n, 3, 64, 64] -> unit vectors [n, 64] and hidden_states[-2] [n, 65, 96]."""
        output = self.vision(pixels, output_hidden_states=True)
        return F.normalize(output.image_embeds.float(), dim=1), output.hidden_states[-2]


def normalize(pictures: np.ndarray) -> Tensor:
    """uint8 [n, 64, 64, 3] -> what CLIPImageProcessor makes of them, [n, 3, 64, 64]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(device()).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
    return (pixels - mean) / torch.tensor(STD, device=pixels.device)[:, None, None]


def shrink(picture: np.ndarray) -> np.ndarray:
    """To the vision tower's side."""
    return np.asarray(cv2.resize(picture, (VISION_SIDE, VISION_SIDE), interpolation=cv2.INTER_AREA))


def trained(work: Path) -> tuple[Clip, CLIPTokenizer]:
    """The towers of the checkpoint, averaged weights, and their tokenizer.

    The first text tower serves the base alone and goes on learning with it: its checkpoint has the later one.
    """
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    state = torch.load(work / "clip.pt", map_location="cpu", weights_only=True)
    model = Clip(len(words))
    ema = Ema(model)
    ema.load_state_dict(state["ema"])
    ema.copy_to(model)
    base = work / "unet.pt"
    later = torch.load(base, map_location="cpu", weights_only=True) if base.exists() else {}
    if "text_ema" in later:
        model.text_1.load_state_dict(later["text_ema"]["shadow"], strict=False)
    return model.eval().requires_grad_(False).to(device()), words


def contrast(texts: Tensor, pictures: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of matching pairs, [n, 64] each."""
    logits = scale.exp().clamp(max=100) * texts @ pictures.T
    places = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def main() -> None:
    """Train within the budget."""
    settings = options("clip", 8)
    portraits = data.load(settings)
    all_facts = captions.all_facts(portraits)
    words = tokenizer.build([all_facts[i] for i in portraits.train], settings.seed)
    words.save_pretrained(settings.work / "tokenizer")
    model = Clip(len(words)).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    ema = Ema(model, 0.995)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / "clip.pt", settings.minutes, parts)
    draws = np.random.default_rng(settings.seed + run.step)
    sentences = random.Random(settings.seed + run.step)
    for _ in run.steps():
        index = draws.choice(portraits.train, BATCH, replace=False)
        style = np.where(draws.random(BATCH) < 0.35, 0, draws.integers(0, len(data.STYLE_NAMES), BATCH))
        pictures = np.stack([shrink(portraits.pictures[i, s]) for i, s in zip(index, style, strict=True)])
        flip = draws.random(BATCH) < 0.5
        pictures[flip] = pictures[flip][:, :, ::-1]
        texts = [
            captions.caption(all_facts[i], data.STYLE_NAMES[s], sentences)
            for i, s in zip(index, style, strict=True)
        ]
        crops = np.stack([shrink(degrade(portraits.crops[i], draws, 0.5)) for i in index[:48]])
        crops[:32] = crops[:32, :, :, ::-1]
        ids = words(texts, padding=True, truncation=True, return_tensors="pt").input_ids.to(device())
        model.train()
        with autocast():
            first, second = model.texts(ids)
            seen, _ = model.pictures(normalize(pictures))
            _, states = model.pictures(normalize(crops))
            people = F.normalize(model.person(states.mean(1)).float(), dim=1)
        wanted = torch.from_numpy(portraits.embeddings[index[:48]]).to(device())
        person = 1 - (people * wanted).sum(1).mean()
        first_loss, second_loss = contrast(first, seen, model.scale), contrast(second, seen, model.scale)
        descend(first_loss + second_loss + person, optimizer, run.rate(1.5e-3, warm_up=50))
        ema.update(model)
        run.log(25, first=first_loss.item(), second=second_loss.item(), person=person.item())


if __name__ == "__main__":
    main()
