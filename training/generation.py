"""Report rows about images that the product generates with its own pipeline and recipes.

Identities are computed from held-out portraits as from a user's photo. dlib measures the identity; a small
classifier trained on real labels detects sex, smile and style; the pocket CLIP scores the prompt.
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
from training.common import Ema, Options, Run, autocast, descend, device, images_to_tensor
from training.dlib_recognizer import DlibRecognizer, ranks

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
    """RGB images [n, 3, 64, 64] in [-1, 1] -> logits [n, 10]: sex, smile, then one per style."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(images)
        return logits


def classifier(settings: Options, portraits: data.Portraits) -> Attributes:
    """Train the classifier on the portraits in every style, three minutes, cached; never used in training."""
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
        images = np.stack([clip.shrink(portraits.images[i, s]) for i, s in zip(index, style, strict=True)])
        if draws.random() < 0.5:
            images = images[:, :, ::-1]
        if draws.random() < 0.5:
            # Generated images are softer than portraits.
            images = np.stack([cv2.GaussianBlur(p, (0, 0), draws.uniform(0.3, 1.0)) for p in images])
        sex = torch.tensor([float(facts[i].sex == "female") for i in index], device=device())
        smile = torch.tensor([float(facts[i].smile) for i in index], device=device())
        model.train()
        with autocast():
            logits = model(images_to_tensor(images)).float()
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], sex)
        loss = loss + F.binary_cross_entropy_with_logits(logits[:, 1], smile)
        loss = loss + F.cross_entropy(logits[:, 2:], torch.from_numpy(style).to(device()))
        descend(loss, optimizer, run.rate(2e-3, warm_up=30))
        ema.update(model)
        run.log(100, loss=loss.item())
    ema.copy_to(model)
    return model.eval()


@torch.no_grad()
def classify(model: Attributes, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return logits [n, 10] of RGB images."""
    small = np.stack([clip.shrink(image) for image in images])
    return np.asarray(model(images_to_tensor(small)).cpu().numpy())


@dataclass(frozen=True)
class Case:
    """One image to generate: identity, style, sex and expression."""

    position: int
    """Index of the identity in the held-out portraits."""
    style: str
    sex: str
    smile: bool | None
    """None: the prompt does not specify the expression."""

    @property
    def prompt(self) -> str:
        person = "a woman" if self.sex == "female" else "a man"
        expression = {True: ", smiling", False: ", serious, not smiling", None: ""}[self.smile]
        return f"{STYLE_PROMPTS[self.style]}; {person}{expression}"


def cases(portraits: data.Portraits, count: int) -> list[Case]:
    """Return one case per identity: half photos, half other styles; half smiling; the sex as labeled."""
    styles = [name for name in STYLE_PROMPTS if name != "photo"]
    selected = []
    for position, index in enumerate(portraits.held_out[:count]):
        style = "photo" if position % 2 == 0 else styles[(position // 2) % len(styles)]
        selected.append(Case(position, style, portraits.labels[index]["sex"], (position // 2) % 2 == 0))
    return selected


def plain_cases(portraits: data.Portraits, count: int) -> list[Case]:
    """Return one plain photo per identity, for which likeness is easiest to measure."""
    held = portraits.held_out[:count]
    return [
        Case(position, "photo", portraits.labels[index]["sex"], None) for position, index in enumerate(held)
    ]


@functools.cache
def product(recipe: str) -> Any:
    """Return the product with one of the pocket recipes."""
    from fastface_cli import FastFace

    return FastFace(f"pocket-{recipe}", device="cpu", dtype="float32")


def identities(portraits: data.Portraits, count: int) -> list[Any]:
    """Return the identities of the first held-out portraits; None if no face is detected."""
    from fastface_cli.errors import FastFaceError

    face, people = product("baseline"), []
    for index in portraits.held_out[:count]:
        try:
            people.append(face.identity(Image.fromarray(np.asarray(portraits.originals[index]))))
        except FastFaceError:
            people.append(None)
    return people


def generate(
    recipe: str, selected: Sequence[Case], people: Sequence[Any], batch: int = 8
) -> list[np.ndarray]:
    """Generate one image per case, uint8 RGB; the seed is the index of the identity."""
    from fastface_cli.app.pipeline import Request

    face = product(recipe)
    requests = [Request(case.prompt, case.position, people[case.position]) for case in selected]
    return [np.asarray(result.image) for result in face.pipeline.generate(requests, batch_size=batch)]


@torch.no_grad()
def prompt_scores(weights: Path, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Return the cosine of prompt and image in the pocket CLIP, [n]."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    words: Any = CLIPTokenizer.from_pretrained(weights / "pipe" / "tokenizer_2")
    text: Any = CLIPTextModelWithProjection.from_pretrained(
        weights / "pipe" / "text_encoder_2", variant="fp16", dtype=torch.float32
    )
    vision: Any = CLIPVisionModelWithProjection.from_pretrained(weights / "clip", dtype=torch.float32)
    ids = words(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    text_vectors = F.normalize(text(ids).text_embeds, dim=1)
    pixels = clip.normalize(np.stack([clip.shrink(image) for image in images])).cpu()
    image_vectors = F.normalize(vision(pixels).image_embeds, dim=1)
    return np.asarray((text_vectors * image_vectors).sum(1).numpy())


@dataclass(frozen=True)
class Likeness:
    """Likeness of the images of a recipe by dlib; arrays with one value per case."""

    ranks: np.ndarray
    """0: the reference of the person is the nearest; an image without a face is ranked last."""
    similarity: np.ndarray
    """One minus dlib's distance, 0 without a face."""
    has_face: np.ndarray
    """Whether a face is detected."""


def likeness(
    dlib_recognizer: DlibRecognizer, images: Sequence[np.ndarray], references: np.ndarray, own: Sequence[int]
) -> Likeness:
    """Compare images with all references [m, 128]; ``own`` are the rows of the correct persons."""
    descriptors = [dlib_recognizer.describe(image) for image in images]
    distance = [
        1.0 if f is None else float(np.linalg.norm(f - references[i]))
        for f, i in zip(descriptors, own, strict=True)
    ]
    return Likeness(
        ranks(descriptors, references, own),
        1 - np.array(distance),
        np.array([f is not None for f in descriptors]),
    )


def followed(logits: np.ndarray, expected: Sequence[Case]) -> tuple[float, float, float]:
    """Return the shares of images whose sex, smile and style match the prompt."""
    sex = [(logit[0] > 0) == (case.sex == "female") for logit, case in zip(logits, expected, strict=True)]
    smile = [(logit[1] > 0) == case.smile for logit, case in zip(logits, expected, strict=True)]
    names = [data.STYLE_NAMES[int(logit[2:].argmax())] for logit in logits]
    style = [name == case.style for name, case in zip(names, expected, strict=True)]
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


def format_interval(interval: Interval | None, form: str) -> str:
    """Format a mean and its confidence interval."""
    assert interval is not None
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def claim_table(
    settings: Options,
    portraits: data.Portraits,
    weights: Path,
    dlib_recognizer: DlibRecognizer,
    references: np.ndarray,
    count: int = 200,
    recipes: Sequence[str] = RECIPES,
) -> Iterator[str]:
    """Yield a Markdown table with one line per recipe, and write ``grid.png`` with the first ten people.

    Identity is measured on one plain photo per person; prompt adherence on one image per person with various
    prompts, whose rank-1 is listed as well. Intervals are bootstrapped over people.
    """
    people = identities(portraits, count)
    plain = [case for case in plain_cases(portraits, count) if people[case.position] is not None]
    styled = [case for case in cases(portraits, count) if people[case.position] is not None]
    own = [case.position for case in plain]
    model = classifier(settings, portraits)
    shown = np.stack([portraits.images[i, 0] for i in portraits.held_out[:count]])
    sex, smile, _ = followed(
        classify(model, list(shown)),
        [
            Case(position, "photo", facts.sex, facts.smile)
            for position, facts in enumerate(
                captions.all_facts(portraits)[i] for i in portraits.held_out[:count]
            )
        ],
    )
    yield f"{len(own)} of {count} held-out portraits have a detectable face. On the portraits, the accuracy "
    yield f"of the classifier is {sex:.1%} for sex and {smile:.1%} for smiles."
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    strips = [shown[:10]]
    first: Likeness | None = None
    for recipe in recipes:
        photos = generate(recipe, plain, people)
        images = generate(recipe, styled, people)
        strips += [np.stack(photos[:10]), np.stack(images[:10])]
        photo_likeness, prompt_likeness = (
            likeness(dlib_recognizer, group, references, own) for group in (photos, images)
        )
        first = first or photo_likeness
        nearest, first_nearest = (1.0 * (result.ranks == 0) for result in (photo_likeness, first))
        scores = prompt_scores(weights, images, [case.prompt for case in styled])
        cells = [
            recipe,
            format_interval(mean_interval(nearest, own), ".1%"),
            ""
            if photo_likeness is first
            else format_interval(paired_difference(nearest, first_nearest, own), "+.1%"),
            f"{int(np.median(photo_likeness.ranks)) + 1}",
            format_interval(mean_interval(photo_likeness.similarity, own), ".3f"),
            ""
            if photo_likeness is first
            else format_interval(paired_difference(photo_likeness.similarity, first.similarity, own), "+.3f"),
            f"{1 - np.mean(photo_likeness.has_face):.1%}",
            f"{np.mean(prompt_likeness.ranks == 0):.1%}",
            format_interval(mean_interval(scores, own), ".3f"),
            *(f"{share:.1%}" for share in followed(classify(model, images), styled)),
        ]
        yield f"| {' | '.join(cells)} |"
    grid = np.concatenate([np.concatenate(list(strip), axis=1) for strip in strips])
    Image.fromarray(grid).save(settings.work / "grid.png")


def group_rows(dlib_recognizer: DlibRecognizer, work: Path) -> list[tuple[str, str, str]]:
    """Generate a portrait of every person in InsightFace's group photo, and write ``group.png``.

    An image is correct if dlib ranks its person first among the faces of the group photo.
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
    requests = [Request("photo; a person", position, person) for position, person in enumerate(people)]
    generated = [np.asarray(result.image) for result in face.pipeline.generate(requests, batch_size=8)]
    complete = np.array([0, 0, 224, 224], np.float32)
    references = [dlib_recognizer.describe(np.ascontiguousarray(crop), complete) for crop in crops]
    described = np.stack([reference for reference in references if reference is not None])
    group_likeness = likeness(dlib_recognizer, generated, described, range(len(generated)))
    side = generated[0].shape[0]
    rows = [
        np.concatenate([cv2.resize(c, (side, side)) for c in crops], axis=1),
        np.concatenate(generated, axis=1),
    ]
    Image.fromarray(np.concatenate(rows)).save(work / "group.png")
    text = (
        f"{len(generated)} portraits; dlib detects a face in {int(group_likeness.has_face.sum())} and ranks "
    )
    text += "the correct person first "
    text += f"in {int((group_likeness.ranks == 0).sum())}; see {work / 'group.png'}"
    return [("t1, faces with a generated portrait (fastface)", text, "all faces detected")]


def speed_rows(repeats: int = 3) -> list[tuple[str, str, str]]:
    """Measure one portrait in four steps: with loaded models, and from process start to file."""
    from fastface_cli.app.pipeline import Request

    face = product("fastface")
    example = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"
    person = face.identity(example)
    loaded, process = [], []
    for seed in range(repeats):
        start = time.perf_counter()
        next(face.pipeline.generate([Request("photo; a woman", seed, person)]))
        loaded.append(time.perf_counter() - start)
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
        ("one portrait, 4 steps, models loaded", f"{np.median(loaded):.2f} s", "at most 3 s"),
        ("one portrait, from process start", f"{np.median(process):.1f} s", "at most 12 s"),
    ]
