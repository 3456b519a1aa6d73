"""Train a tiny CLIP: two text towers for the UNet, a vision tower for the adapter, both for prompt scores.

The first text tower has no projection in SDXL's layout; its training projection is discarded. The vision
tower is also trained to distinguish identities on aligned crops (embeddings of the teacher), in RGB and in
BGR order, because the adapter receives crops in BGR order.
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
"""Mean and standard deviation of CLIPImageProcessor."""


def text_config(vocabulary: int) -> dict[str, Any]:
    """Return the configuration of both text towers."""
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
    """Return the configuration of the vision tower: 64x64 pixels, 64 patches."""
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=VISION_SIDE,
        patch_size=8,
        projection_dim=PROJECTION,
        hidden_act="quick_gelu",
        # For short sequences, eager attention has a faster backward pass than the fused kernel.
        attn_implementation="eager",
    )


class Clip(nn.Module):
    """The three towers, and the layers that only training needs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_1 = CLIPTextModel(CLIPTextConfig(**text_config(vocabulary)))
        self.text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(vocabulary)))
        self.vision = CLIPVisionModelWithProjection(vision_config())
        self.project_1 = nn.Linear(TEXT_WIDTH, PROJECTION, bias=False)
        self.person = nn.Linear(96, 192)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors of both towers, [n, 64] each, for token ids [n, length]."""
        first = self.project_1(self.text_1(ids).pooler_output)
        second = self.text_2(ids).text_embeds
        return F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors [n, 64] and hidden_states[-2] [n, 65, 96] of pixels [n, 3, 64, 64]."""
        output = self.vision(pixels, output_hidden_states=True)
        return F.normalize(output.image_embeds.float(), dim=1), output.hidden_states[-2]


def normalize(images: np.ndarray) -> Tensor:
    """Normalize images, uint8 [n, 64, 64, 3], as CLIPImageProcessor does; return [n, 3, 64, 64]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device()).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
    return (pixels - mean) / torch.tensor(STD, device=pixels.device)[:, None, None]


def shrink(image: np.ndarray) -> np.ndarray:
    """Resize to the input size of the vision tower."""
    return np.asarray(cv2.resize(image, (VISION_SIDE, VISION_SIDE), interpolation=cv2.INTER_AREA))


def trained(work: Path) -> tuple[Clip, CLIPTokenizer]:
    """Return the towers of the checkpoint, with averaged weights, and their tokenizer.

    The first text tower is used only by the base and trained with it, so the base checkpoint has its latest
    weights.
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


def contrast(texts: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of matching pairs, [n, 64] each."""
    logits = scale.exp().clamp(max=100) * texts @ images.T
    places = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def main() -> None:
    """Train within the time budget."""
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
        images = np.stack([shrink(portraits.images[i, s]) for i, s in zip(index, style, strict=True)])
        flip = draws.random(BATCH) < 0.5
        images[flip] = images[flip][:, :, ::-1]
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
            image_vectors, _ = model.images(normalize(images))
            _, states = model.images(normalize(crops))
            people = F.normalize(model.person(states.mean(1)).float(), dim=1)
        targets = torch.from_numpy(portraits.embeddings[index[:48]]).to(device())
        person = 1 - (people * targets).sum(1).mean()
        first_loss, second_loss = (
            contrast(first, image_vectors, model.scale),
            contrast(second, image_vectors, model.scale),
        )
        descend(first_loss + second_loss + person, optimizer, run.rate(1.5e-3, warm_up=50))
        ema.update(model)
        run.log(25, first=first_loss.item(), second=second_loss.item(), person=person.item())


if __name__ == "__main__":
    main()
