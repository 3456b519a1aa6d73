"""Report rows about generated pictures, made with the product's own pipeline and recipes.

Identities are held-out portraits, read as a user's photo would be. dlib judges who it is; a small
classifier trained on real labels judges sex, smile and style; the pocket CLIP scores the prompt.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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

from fastface_cli.evaluation.statistics import Interval, mean_interval, paired_difference
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    ema = Ema(model, 0.99)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
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
        descend(loss, optimizer, run.rate(2e-3, warm_up=30))
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
    smile: bool | None
    """None: the prompt leaves it open."""

    @property
    def prompt(self) -> str:
        who = "a woman" if self.sex == "female" else "a man"
        mood = {True: ", smiling", False: ", serious, not smiling", None: ""}[self.smile]
        return f"{STYLE_PROMPTS[self.style]}; {who}{mood}"


def cases(portraits: data.Portraits, count: int) -> list[Case]:
    """Each identity once, styles in turn, half of them photos, half smiling; the sex is the person's own."""
    styles = [name for name in STYLE_PROMPTS if name != "photo"]
    found = []
    for place, index in enumerate(portraits.held_out[:count]):
        style = "photo" if place % 2 == 0 else styles[(place // 2) % len(styles)]
        found.append(Case(place, style, portraits.labels[index]["sex"], (place // 2) % 2 == 0))
    return found


def plain_cases(portraits: data.Portraits, count: int) -> list[Case]:
    """Each identity once, as a photo and nothing else: where a likeness is easiest to judge."""
    held = portraits.held_out[:count]
    return [Case(place, "photo", portraits.labels[index]["sex"], None) for place, index in enumerate(held)]


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
    from fastface_cli.app.pipeline import Request

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
    pixels = clip.normalize(np.stack([clip.shrink(picture) for picture in pictures])).cpu()
    seen = F.normalize(vision(pixels).image_embeds, dim=1)
    return np.asarray((told * seen).sum(1).numpy())


@dataclass(frozen=True)
class Likeness:
    """How alike a recipe's pictures are, by dlib; arrays of one value a case."""

    ranks: np.ndarray
    """0: the own reference is the nearest; a picture without a face ranks behind all."""
    similarity: np.ndarray
    """One minus dlib's distance, 0 without a face."""
    found: np.ndarray
    """Whether there is a face."""


def likeness(
    judge: Judge, pictures: Sequence[np.ndarray], references: np.ndarray, own: Sequence[int]
) -> Likeness:
    """Judge pictures against all references [m, 128]; ``own`` are the rows they should be like."""
    found = [judge.describe(picture) for picture in pictures]
    distance = [
        1.0 if f is None else float(np.linalg.norm(f - references[i]))
        for f, i in zip(found, own, strict=True)
    ]
    return Likeness(
        ranks(found, references, own), 1 - np.array(distance), np.array([f is not None for f in found])
    )


def followed(logits: np.ndarray, wanted: Sequence[Case]) -> tuple[float, float, float]:
    """Shares of pictures whose sex, smile and style a classifier finds as the prompt has them."""
    sex = [(logit[0] > 0) == (case.sex == "female") for logit, case in zip(logits, wanted, strict=True)]
    smile = [(logit[1] > 0) == case.smile for logit, case in zip(logits, wanted, strict=True)]
    names = [data.STYLE_NAMES[int(logit[2:].argmax())] for logit in logits]
    style = [name == case.style for name, case in zip(names, wanted, strict=True)]
    return float(np.mean(sex)), float(np.mean(smile)), float(np.mean(style))


COLUMNS = (
    "recipe",
    "rank-1 (95%)",
    "against baseline (95%)",
    "median rank",
    "dlib similarity (95%)",
    "against baseline (95%)",
    "no face",
    "rank-1, prompts",
    "prompt score (95%)",
    "sex",
    "smile",
    "style",
)


def told(found: Interval | None, form: str) -> str:
    """A mean and its interval as text."""
    assert found is not None
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def claim_table(
    settings: Options,
    portraits: data.Portraits,
    weights: Path,
    judge: Judge,
    references: np.ndarray,
    count: int = 200,
    recipes: Sequence[str] = RECIPES,
) -> Iterator[str]:
    """A Markdown table of identity and prompt, one line a recipe, and ``grid.png`` of the first ten people.

    Identity is judged on one plain photo a person; the prompt on one picture a person of many kinds,
    whose rank-1 is given too. Intervals are bootstrapped over people.
    """
    people = identities(portraits, count)
    plain = [case for case in plain_cases(portraits, count) if people[case.place] is not None]
    wanted = [case for case in cases(portraits, count) if people[case.place] is not None]
    own = [case.place for case in plain]
    model = classifier(settings, portraits)
    shown = np.stack([portraits.pictures[i, 0] for i in portraits.held_out[:count]])
    sex, smile, _ = followed(
        classify(model, list(shown)),
        [
            Case(place, "photo", facts.sex, facts.smile)
            for place, facts in enumerate(
                captions.all_facts(portraits)[i] for i in portraits.held_out[:count]
            )
        ],
    )
    yield f"{len(own)} of {count} held-out portraits give an identity. On the portraits themselves the "
    yield f"classifier is right about sex in {sex:.1%} and about smiles in {smile:.1%}."
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    strips = [shown[:10]]
    first: Likeness | None = None
    for recipe in recipes:
        photos = generate(recipe, plain, people)
        pictures = generate(recipe, wanted, people)
        strips += [np.stack(photos[:10]), np.stack(pictures[:10])]
        alike, dressed = (likeness(judge, made, references, own) for made in (photos, pictures))
        first = first or alike
        nearest, first_nearest = (1.0 * (seen.ranks == 0) for seen in (alike, first))
        scores = prompt_scores(weights, pictures, [case.prompt for case in wanted])
        cells = [
            recipe,
            told(mean_interval(nearest, own), ".1%"),
            "" if alike is first else told(paired_difference(nearest, first_nearest, own), "+.1%"),
            f"{int(np.median(alike.ranks)) + 1}",
            told(mean_interval(alike.similarity, own), ".3f"),
            ""
            if alike is first
            else told(paired_difference(alike.similarity, first.similarity, own), "+.3f"),
            f"{1 - np.mean(alike.found):.1%}",
            f"{np.mean(dressed.ranks == 0):.1%}",
            told(mean_interval(scores, own), ".3f"),
            *(f"{share:.1%}" for share in followed(classify(model, pictures), wanted)),
        ]
        yield f"| {' | '.join(cells)} |"
    grid = np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips])
    Image.fromarray(grid).save(settings.work / "grid.png")


def group_rows(judge: Judge, work: Path) -> list[tuple[str, str, str]]:
    """A portrait of everybody in the group photograph that comes with InsightFace, and ``group.png``.

    A picture counts as its person's when dlib finds that person nearest among the faces of the photograph.
    """
    from insightface.data import get_image

    from fastface_cli.app.pipeline import Request
    from fastface_cli.errors import NoFaceError

    photograph = Image.fromarray(np.ascontiguousarray(get_image("t1")[:, :, ::-1]))
    face, people = product("fastface"), []
    with contextlib.suppress(NoFaceError):
        for number in itertools.count():
            people.append(face.identity(photograph, face_index=number))
    crops = [person.crop()[:, :, ::-1] for person in people]
    requests = [Request("photo; a person", place, person) for place, person in enumerate(people)]
    made = [np.asarray(picture.image) for picture in face.pipeline.generate(requests, batch_size=8)]
    whole = np.array([0, 0, 224, 224], np.float32)
    references = [judge.describe(np.ascontiguousarray(crop), whole) for crop in crops]
    described = np.stack([reference for reference in references if reference is not None])
    alike = likeness(judge, made, described, range(len(made)))
    side = made[0].shape[0]
    rows = [
        np.concatenate([cv2.resize(c, (side, side)) for c in crops], axis=1),
        np.concatenate(made, axis=1),
    ]
    Image.fromarray(np.concatenate(rows)).save(work / "group.png")
    text = (
        f"{len(made)} portraits; dlib finds a face in {int(alike.found.sum())} and the right person nearest "
    )
    text += f"in {int((alike.ranks == 0).sum())}; shown in {work / 'group.png'}"
    return [("t1, faces that give a portrait (fastface)", text, "every face found")]


def speed_rows(repeats: int = 3) -> list[tuple[str, str, str]]:
    """Seconds of one portrait in four steps: in a running process, and from process start to file."""
    from fastface_cli.app.pipeline import Request

    face = product("fastface")
    example = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"
    person = face.identity(example)
    picture, process = [], []
    for seed in range(repeats):
        start = time.perf_counter()
        next(face.pipeline.generate([Request("photo; a woman", seed, person)]))
        picture.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-c",
                "from fastface_cli.cli import main; main()",
                "generate",
                "--recipe",
                "pocket",
            ]
            command += ["--face", str(example), "--prompt", "a woman", "--output", f"{folder}/a.png"]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            process.append(time.perf_counter() - start)
    return [
        ("one portrait, 4 steps, models loaded", f"{np.median(picture):.2f} s", "at most 3 s"),
        ("one portrait, from process start", f"{np.median(process):.1f} s", "at most 12 s"),
    ]
