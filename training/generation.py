"""Report rows about generated pictures, made with the product's own pipeline and recipes.

Identities are held-out portraits, read as a user's photo would be. dlib judges who it is; a small
classifier trained on real labels judges sex, smile and style; the pocket CLIP scores the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from training import captions, clip, data
from training.common import Ema, Options, Run, autocast, descend, device, pictures_to_tensor
from training.judge import Judge, ranks

RECIPES = ("baseline", "dcg", "am1", "am2", "fastface", "fastface-am2", "base")
STYLE_PROMPTS = {
    "photo": "photo",
    "pencil": "pencil drawing",
    "watercolour": "watercolour painting",
    "comic": "comic book style",
    "black_and_white": "black and white photograph",
    "pixel_art": "pixel art",
    "neon": "neon lights",
    "sepia": "sepia photograph",
}


class Attributes(nn.Module):
    """RGB pictures [n, 3, 64, 64] in [-1, 1] -> logits: sex, smile, then one a style, [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 10))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(pictures)
        return logits


def classifier(settings: Options, portraits: data.Portraits) -> Attributes:
    """Trained on the portraits' labels in every style, three minutes, cached; never used in training."""
    facts = captions.all_facts(portraits)
    model = Attributes().to(device())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    ema = Ema(model, 0.99)
    parts = {"model": model, "ema": ema, "optimiser": optimiser}
    run = Run(settings.work / "attributes.pt", 3, parts)
    draws = np.random.default_rng(settings.seed + run.step)
    for _ in run.steps():
        index = draws.choice(portraits.train, 64)
        style = draws.integers(0, len(data.STYLE_NAMES), 64)
        pictures = np.stack(
            [clip.shrink(portraits.pictures[i, s]) for i, s in zip(index, style, strict=True)]
        )
        if draws.random() < 0.5:
            pictures = pictures[:, :, ::-1]
        if draws.random() < 0.5:
            # Generated pictures are softer than portraits.
            pictures = np.stack([cv2.GaussianBlur(p, (0, 0), draws.uniform(0.3, 1.0)) for p in pictures])
        sex = torch.tensor([float(facts[i].sex == "female") for i in index], device=device())
        smile = torch.tensor([float(facts[i].smile) for i in index], device=device())
        model.train()
        with autocast():
            logits = model(pictures_to_tensor(pictures)).float()
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], sex)
        loss = loss + F.binary_cross_entropy_with_logits(logits[:, 1], smile)
        loss = loss + F.cross_entropy(logits[:, 2:], torch.from_numpy(style).to(device()))
        descend(loss, optimiser, run.rate(2e-3, warm_up=30))
        ema.update(model)
        run.log(100, loss=loss.item())
    ema.copy_to(model)
    return model.eval()


@torch.no_grad()
def classify(model: Attributes, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """RGB pictures -> logits [n, 10]."""
    small = np.stack([clip.shrink(picture) for picture in pictures])
    return np.asarray(model(pictures_to_tensor(small)).cpu().numpy())


@dataclass(frozen=True)
class Case:
    """One picture to make: whose, and of what."""

    place: int
    """Number of the identity among the held-out portraits."""
    style: str
    sex: str
    smile: bool

    @property
    def prompt(self) -> str:
        who = "a woman" if self.sex == "female" else "a man"
        mood = "smiling" if self.smile else "serious, not smiling"
        return f"{STYLE_PROMPTS[self.style]}; {who}, {mood}"


def cases(portraits: data.Portraits, count: int) -> list[Case]:
    """Each identity once, styles in turn, half of them photos, half smiling; the sex is the person's own."""
    styles = [name for name in STYLE_PROMPTS if name != "photo"]
    found = []
    for place, index in enumerate(portraits.held_out[:count]):
        style = "photo" if place % 2 == 0 else styles[(place // 2) % len(styles)]
        found.append(Case(place, style, portraits.labels[index]["sex"], (place // 2) % 2 == 0))
    return found


@functools.cache
def product(recipe: str) -> Any:
    """The product with one of the pocket recipes."""
    from fastface_cli import FastFace

    return FastFace(f"pocket-{recipe}", device="cpu", dtype="float32")


def identities(portraits: data.Portraits, count: int) -> list[Any]:
    """The product's identities of the first held-out portraits; None where it finds no face."""
    from fastface_cli.errors import FastFaceError

    face, found = product("baseline"), []
    for index in portraits.held_out[:count]:
        try:
            found.append(face.identity(Image.fromarray(np.asarray(portraits.originals[index]))))
        except FastFaceError:
            found.append(None)
    return found


def generate(recipe: str, wanted: Sequence[Case], people: Sequence[Any], batch: int = 8) -> list[np.ndarray]:
    """One picture a case, seed by place, uint8 RGB."""
    from fastface_cli.pipeline import Request

    face = product(recipe)
    requests = [Request(case.prompt, case.place, people[case.place]) for case in wanted]
    return [np.asarray(picture.image) for picture in face.pipeline.generate(requests, batch_size=batch)]


@torch.no_grad()
def prompt_scores(weights: Path, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Cosine of prompt and picture in the pocket CLIP, [n]."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    words: Any = CLIPTokenizer.from_pretrained(weights / "pipe" / "tokenizer_2")
    text: Any = CLIPTextModelWithProjection.from_pretrained(
        weights / "pipe" / "text_encoder_2", variant="fp16", dtype=torch.float32
    )
    vision: Any = CLIPVisionModelWithProjection.from_pretrained(weights / "clip", dtype=torch.float32)
    ids = words(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    told = F.normalize(text(ids).text_embeds, dim=1)
    pixels = clip.normalise(np.stack([clip.shrink(picture) for picture in pictures])).cpu()
    seen = F.normalize(vision(pixels).image_embeds, dim=1)
    return np.asarray((told * seen).sum(1).numpy())


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean; each identity appears once, so cases are the clusters."""
    generator = np.random.default_rng(0)
    means = values[generator.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def claim_rows(
    settings: Options,
    portraits: data.Portraits,
    weights: Path,
    judge: Judge,
    references: np.ndarray,
    count: int = 200,
    recipes: Sequence[str] = RECIPES,
) -> list[tuple[str, str, str]]:
    """Identity and prompt of every recipe, and a grid of the first ten identities."""
    people = identities(portraits, count)
    wanted = [case for case in cases(portraits, count) if people[case.place] is not None]
    model = classifier(settings, portraits)
    rows = [("identities read from held-out portraits", f"{len(wanted)} of {count}", "")]
    strips = [np.stack([portraits.pictures[portraits.held_out[c.place], 0] for c in wanted[:10]])]
    for recipe in recipes:
        pictures = generate(recipe, wanted, people)
        strips.append(np.stack(pictures[:10]))
        found = [judge.describe(picture) for picture in pictures]
        own = [case.place for case in wanted]
        place = ranks(found, references, own)
        pairs = zip(found, own, strict=True)
        similarity = np.array([0.0 if f is None else 1 - np.linalg.norm(f - references[i]) for f, i in pairs])
        score = prompt_scores(weights, pictures, [case.prompt for case in wanted])
        logits = classify(model, pictures)
        sex = np.mean(
            [(logit[0] > 0) == (c.sex == "female") for logit, c in zip(logits, wanted, strict=True)]
        )
        smile = np.mean([(logit[1] > 0) == c.smile for logit, c in zip(logits, wanted, strict=True)])
        names = [data.STYLE_NAMES[int(logit[2:].argmax())] for logit in logits]
        style = np.mean([name == case.style for name, case in zip(names, wanted, strict=True)])
        low, high = interval(similarity)
        photos = np.array([case.style == "photo" for case in wanted])
        first, first_photos = np.mean(place == 0), np.mean(place[photos] == 0)
        text = f"rank-1 {first:.1%} (photos {first_photos:.1%}), median rank {int(np.median(place)) + 1}"
        text += f"; dlib similarity {similarity.mean():.3f} [{low:.3f}, {high:.3f}]"
        text += f"; no face {np.mean([f is None for f in found]):.1%}"
        low, high = interval(score)
        text += f"; prompt {score.mean():.3f} [{low:.3f}, {high:.3f}]"
        text += f"; sex {sex:.1%}, smile {smile:.1%}, style {style:.1%}"
        rows.append((f"pocket-{recipe}", text, ""))
    grid = np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips])
    Image.fromarray(grid[:, : 10 * portraits.size]).save(settings.work / "grid.png")
    return rows
