"""Draw `examples/mini`: a dozen people who do not exist, and prompts, in the published layout.

    python -m training.mini_set [--output examples/mini]

The pocket draws them without a reference, each with the first seed in which two recognizers find a face
that is nobody's of those before (or with the best of `SEEDS`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from fastface_cli import FastFace
from fastface_cli.errors import NoFaceError
from fastface_cli.evaluation.dataset import PHOTOS, PROMPTS
from fastface_cli.evaluation.metrics.base import Context
from fastface_cli.evaluation.metrics.identity import DlibIdentity
from fastface_cli.output.images import encode_png

PEOPLE = {
    "anna": "a portrait of a smiling young woman with long blond hair, white background",
    "bela": "a portrait of an old man with short grey hair, grey background",
    "cora": "a portrait of a black woman with short black hair, light grey background",
    "dai": "a portrait of a young asian man with short black hair, white background",
    "edda": "a portrait of an old woman with short grey hair, dark background",
    "faris": "a portrait of a man with short brown hair, blue background",
    "gita": "a portrait of an indian woman with long black hair, beige background",
    "hugo": "a portrait of a smiling young man with short brown hair, green background",
    "ines": "a portrait of a woman with long red hair, white background",
    "joel": "a portrait of a black man with short black hair, grey background",
    "kaya": "a portrait of a young asian woman with long dark brown hair, grey background",
    "liam": "a portrait of a middle-aged man with short blond hair, brown background",
}
REALISTIC = ("a person smiling, white background", "a surprised person, blue background")
STYLED = ("pencil drawing; a person smiling", "watercolour; a person")
STRANGERS = 0.6
"""Cosine that two people of the set stay below, in the pocket's recognizer."""
NEIGHBOURS = 0.4
"""Distance that they keep in dlib's, which takes 0.6 for the border of a person."""
SEEDS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("examples/mini"))
    folder = parser.parse_args().output
    pocket = FastFace(
        "pocket-base",
        overrides=["adapter.scale=0", "adapter.lora_scale=0", "sampling.steps=16"],
        device="cpu",
    )
    anyone = pocket.identity("examples/portrait.png")
    judge = DlibIdentity()
    judge.load(Context())
    (folder / PHOTOS).mkdir(parents=True, exist_ok=True)
    seen: list[np.ndarray] = []
    judged: list[np.ndarray] = []
    kept: dict[tuple[str, int], tuple[Image.Image, np.ndarray, np.ndarray]] = {}
    for name, prompt in PEOPLE.items():
        found = []
        for seed in range(SEEDS):
            picture = pocket.generate(anyone, prompt, seed=seed)[0]
            vector = judge.describe(picture)
            try:
                person = pocket.identity(picture).mean()
            except NoFaceError:
                continue
            if vector is None:
                continue
            near = max((float(person @ other) for other in seen), default=-1.0)
            close = min((float(np.linalg.norm(vector - other)) for other in judged), default=9.0)
            found.append((max(near - STRANGERS, NEIGHBOURS - close, 0.0), seed, near, close))
            if found[-1][0] == 0:
                break
            kept[name, seed] = (picture, person, vector)
        else:
            _, seed, near, close = min(found)  # nobody is new enough: the newest
            picture, person, vector = kept[name, seed]
        seen.append(person)
        judged.append(vector)
        (folder / PHOTOS / f"{name}.png").write_bytes(encode_png(picture))
        print(f"{name}: seed {seed}, nearest cosine {near:.2f}, nearest distance {close:.2f}")
    for split, prompts in (("full", REALISTIC + STYLED), ("realistic", REALISTIC), ("style", STYLED)):
        (folder / PROMPTS[split]).write_text("\n".join(prompts) + "\n", encoding="utf-8")  # type: ignore[index]


if __name__ == "__main__":
    main()
