"""Describe portraits: attributes from labels and pixels, and captions with these attributes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from fastface_cli.pocket import WORD
from training.data import Portraits
from training.styles import PHOTO, STYLES


@dataclass(frozen=True)
class Facts:
    """Attributes of a portrait; an empty string means that the attribute is uncertain."""

    sex: str
    age: str
    group: str
    smile: bool
    surprised: bool
    hair: str
    length: str
    background: str


def _hue(color: np.ndarray) -> str:
    """Return the name of a background color, RGB 0 to 255."""
    red, green, blue = (float(c) for c in color)
    light, spread = (red + green + blue) / 3, max(red, green, blue) - min(red, green, blue)
    if spread < 22:
        return "white" if light > 205 else "light grey" if light > 165 else "grey" if light > 85 else "dark"
    if green >= red and green >= blue:
        return "green"
    if blue > red:
        return "blue"
    return "beige" if light > 165 else "brown"


def _hair(image: np.ndarray, landmarks: np.ndarray) -> tuple[str, str]:
    """Return the color of hair, from above the forehead, and its length, from the areas beside the chin."""
    brows, chin = landmarks[17:27, 1].min(), landmarks[8, 1]
    eye_line = landmarks[36:48, 1].mean()
    left, right = landmarks[0, 0], landmarks[16, 0]
    face = chin - brows
    top = max(int(brows - 0.62 * face), 0)
    middle = int((left + right) / 2)
    reach = int((right - left) * 0.2)
    strip = image[top : top + max(int(0.1 * face), 4), middle - reach : middle + reach].reshape(-1, 3)
    color = np.median(strip.astype(np.float32), axis=0)
    red, green, blue = (float(c) for c in color)
    light = 0.3 * red + 0.6 * green + 0.1 * blue
    warmth = (red - blue) / max(red, 1)
    wall = np.median(image[4:30, 4:30].reshape(-1, 3).astype(np.float32), axis=0)
    if np.abs(color - wall).sum() < 40:
        return "", ""
    if light < 30 or (light < 42 and warmth < 0.18):
        name = "black"
    elif light < 50:
        name = "dark brown"
    elif warmth > 0.54 and light < 115:
        name = "red"
    elif light < 92:
        name = "brown" if warmth > 0.12 else "grey"
    else:
        name = "blond" if warmth > 0.15 else "grey"
    # Beside the chin, long hair hides the background.
    hanging = 0
    for x in (left - 0.02 * (right - left), right + 0.02 * (right - left)):
        y0, y1 = int(eye_line + 0.75 * (chin - eye_line)), int(chin + 0.05 * face)
        x0 = int(np.clip(x - 8, 0, 240))
        patch = image[y0:y1, x0 : x0 + 16].reshape(-1, 3).astype(np.float32)
        if len(patch):
            median = np.median(patch, axis=0)
            hanging += int(np.abs(median - color).sum() < np.abs(median - wall).sum())
    return name, "long" if hanging == 2 else "short" if hanging == 0 else ""


def facts(label: dict[str, Any], image: np.ndarray) -> Facts:
    """Return the attributes of a portrait; the image is the 256x256 RGB original."""
    landmarks = np.array(label["landmarks"], np.float32)
    hair, length = _hair(image, landmarks)
    corners = np.concatenate([image[3:40, 3:40].reshape(-1, 3), image[3:40, -40:-3].reshape(-1, 3)])
    age = float(label["age"])
    ages = ((14, "a child"), (24, "young"), (33, ""), (48, "middle-aged"), (200, "old"))
    years = next(word for limit, word in ages if age < limit)
    expression = label["expression"]
    smooth = cv2.medianBlur(np.ascontiguousarray(corners.reshape(-1, 37, 3)), 5).reshape(-1, 3)
    return Facts(
        sex=label["sex"],
        age=years,
        group=label["group"],
        smile=expression.get("happy", 0) > 0.5,
        surprised=expression.get("surprised", 0) > 0.4,
        hair=hair,
        length=length,
        background=_hue(np.median(smooth.astype(np.float32), axis=0)),
    )


def all_facts(portraits: Portraits) -> list[Facts]:
    """Return the attributes of every portrait, in order."""
    pairs = zip(portraits.labels, portraits.originals, strict=True)
    return [facts(label, np.asarray(original)) for label, original in pairs]


SMILING = ("smiling", "with a smile", "smiling happily", "with a big smile", "laughing", "looking happy")
SERIOUS = ("serious", "with a neutral expression", "not smiling", "looking serious", "with a serious face")
OPENINGS = ("", "", "", "portrait of ", "a portrait of ", "headshot of ", "close-up of ", "face of ")
GROUPS = {
    "white": ("white", "european", "caucasian"),
    "black": ("black", "african"),
    "asian": ("asian", "east asian"),
    "latino": ("latino", "hispanic"),
}


def noun(fact: Facts, generator: random.Random) -> str:
    """Return a noun phrase such as ``a young asian woman``; sometimes only ``a person``."""
    if generator.random() < 0.06:
        return "a person"
    child = fact.age == "a child"
    if fact.sex == "female":
        word = "girl" if child else generator.choice(("woman", "woman", "woman", "lady", "female"))
    else:
        word = "boy" if child else generator.choice(("man", "man", "man", "guy", "male"))
    words = []
    if fact.age and not child and generator.random() < 0.6:
        words.append(generator.choice(("elderly", "old")) if fact.age == "old" else fact.age)
    if generator.random() < 0.45:
        words.append(generator.choice(GROUPS[fact.group]))
    words.append(word)
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}"


def subject(fact: Facts, generator: random.Random, expression_chance: float = 0.85) -> str:
    """Return a description of the person without style, with a random selection of details in random order.

    ``expression_chance`` is the probability that it includes the expression.
    """
    who = noun(fact, generator)
    details = []
    if generator.random() < expression_chance:
        if fact.surprised:
            details.append(generator.choice(("looking surprised", "with a surprised face")))
        elif fact.smile:
            details.append(generator.choice(SMILING))
        else:
            details.append(generator.choice(SERIOUS))
    if fact.hair and generator.random() < 0.5:
        length = fact.length if generator.random() < 0.7 else ""
        words = f"{length} {fact.hair}".strip()
        details.append(f"with {words} hair")
    if generator.random() < 0.35:
        place = ("{} background", "in front of a {} wall", "on a {} background", "against a {} backdrop")
        details.append(generator.choice(place).format(fact.background))
    generator.shuffle(details)
    glue = ", " if generator.random() < 0.7 else " "
    return glue.join([generator.choice(OPENINGS) + who, *details])


def caption(fact: Facts, style: str, generator: random.Random, expression_chance: float = 0.85) -> str:
    """Return the prompt of an image: ``description; subject`` in a style, mostly ``subject`` for photos."""
    sentence = subject(fact, generator, expression_chance)
    if style == "photo":
        if generator.random() < 0.75:
            return sentence
        return f"{generator.choice(PHOTO)}; {sentence}"
    return f"{generator.choice(STYLES[style][1])}; {sentence}"


def vocabulary(samples: int = 20_000) -> list[str]:
    """All words of the captions, sorted, from random attributes; `pocket/words.txt` is a copy of it."""
    generator = random.Random(0)
    words: set[str] = set()
    for _ in range(samples):
        facts_ = Facts(
            sex=generator.choice(("female", "male")),
            age=generator.choice(("a child", "young", "", "middle-aged", "old")),
            group=generator.choice(list(GROUPS)),
            smile=generator.random() < 0.4,
            surprised=generator.random() < 0.2,
            hair=generator.choice(("black", "dark brown", "brown", "red", "blond", "grey")),
            length=generator.choice(("long", "short", "")),
            background=generator.choice(
                ("white", "light grey", "grey", "dark", "green", "blue", "beige", "brown")
            ),
        )
        style = generator.choice(["photo", *STYLES])
        words.update(WORD.findall(caption(facts_, style, generator).lower()))
    return sorted(words)
