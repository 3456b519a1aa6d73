"""A made-up run's folder, as `fastface eval` leaves it: small pictures, scores with known effects."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastface_cli.evaluation.metrics.base import Column
from fastface_cli.evaluation.rows import Row, image_seed, row_key
from fastface_cli.evaluation.summary import summarize

COLUMNS = {
    column.name: column
    for column in (
        Column("id", "ID", True, "", "Cosine of the conditioning recognizer's embeddings."),
        Column("dlib", "ID (dlib)", True, "", "Likeness by a recognizer that did not condition."),
        Column("detection", "Faces found", True, "share", "Share of images with a face."),
        Column("clip_l14", "CLIP L/14", True, "", "Cosine of prompt and image."),
        Column("face_ratio", "Face ratio", None, "share", "Face box area over image area."),
        Column("latency", "Latency", False, "s", "Seconds to make one image."),
    )
}
RECIPES = ("baseline", "am1", "fastface")
PROMPTS = (
    "a smiling woman in a garden",
    "watercolour; a man reading",
    "an astronaut on a horse",
    "a portrait at night",
)


def build_run(
    folder: Path,
    *,
    recipes: Sequence[str] = RECIPES,
    identities: Sequence[str] = ("ann", "bob", "cai", "dee", "eli", "fay"),
    prompts: Sequence[str] = PROMPTS,
    seeds: int = 1,
    stresses: Sequence[str | None] = (None,),
    pixels: int = 64,
    held_out: bool = False,
    fail: Sequence[str] = (),
    no_face: Sequence[str] = (),
    effect: float = 0.04,
    name: str = "made-up",
    resamples: int = 500,
    picture: Path | None = None,
) -> list[Row]:
    """Write a run's folder and return its rows.

    Args:
        fail: keys of images that could not be made.
        no_face: keys of images without a face.
        effect: what each recipe adds to the ID of the one before it.
        picture: stands for every picture, as a hard link; None: small pictures of different colors.
    """
    rows = []
    for number, identity in enumerate(identities):
        photo = f"references/{number:03d}.png"
        _picture(folder / photo, (number * 37, 90, 140), pixels)
        worse = {stress: f"references/{number:03d}+{stress}.png" for stress in stresses if stress}
        for degraded in worse.values():
            _picture(folder / degraded, (number * 37, 40, 60), pixels)
        for recipe, name_ in enumerate(recipes):
            for stress in stresses:
                for prompt_index, prompt in enumerate(prompts):
                    for seed in range(seeds):
                        key = row_key(name_, identity, prompt_index, seed, stress)
                        row = Row(
                            key=key,
                            recipe=name_,
                            identity=identity,
                            prompt=prompt,
                            prompt_index=prompt_index,
                            seed_index=seed,
                            seed=image_seed(identity, prompt, seed),
                            stress=stress,
                            attributes={"light": ("bright", "dim")[number % 2]},
                            reference=photo,
                            degraded=worse.get(stress) if stress else None,
                            held_out=photo if held_out else None,
                        )
                        rows.append(_finished(row, recipe, folder, picture or pixels, fail, no_face, effect))
    rows.sort(key=lambda row: row.key)
    _write(folder, rows, recipes, identities, prompts, name, resamples)
    return rows


def _finished(
    row: Row,
    recipe: int,
    folder: Path,
    picture: Path | int,
    fail: Sequence[str],
    no_face: Sequence[str],
    effect: float,
) -> Row:
    if row.key in fail:
        error = {"kind": "device", "code": 4, "message": "out of memory on cuda:0", "hint": "close programs"}
        return replace(row, error=error)
    random = np.random.default_rng(row.seed + (len(row.stress) if row.stress else 0))
    file = f"images/{recipe}/{row.identity}/{row.prompt_index:04d}-{row.seed_index}{row.stress or ''}.png"
    color = (200 - recipe * 30 % 190, 60 + row.prompt_index * 40 % 190, row.seed % 255)
    if isinstance(picture, Path):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(picture, folder / file)
    else:
        _picture(folder / file, color, picture)
    own = np.random.default_rng(row.seed + recipe + 1)
    face = row.key not in no_face
    likeness = (
        0.4 + effect * recipe + random.normal(0, 0.05) + own.normal(0, 0.03) - (0.1 if row.stress else 0)
    )
    scores = {
        "id": likeness if face else None,
        "dlib": likeness * 0.9 if face else None,
        "detection": float(face),
        "clip_l14": 0.25 - 0.01 * recipe + own.normal(0, 0.01),
        "face_ratio": 0.2 + random.normal(0, 0.02) if face else 0.0,
        "latency": 1.5 + 0.5 * recipe + row.seed % 100 / 100,
    }
    return replace(row, file=file, seconds=1.5, unet_samples=4 + 6 * recipe, scores=scores)


def _picture(path: Path, color: tuple[int, int, int], pixels: int) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0.4, 1, pixels)[:, None, None] * np.ones((1, pixels, 1)) * np.array(color)
        Image.fromarray(ramp.astype(np.uint8)).save(path)


def _write(
    folder: Path,
    rows: Sequence[Row],
    recipes: Sequence[str],
    identities: Sequence[str],
    prompts: Sequence[str],
    name: str,
    resamples: int,
) -> None:
    info: dict[str, Any] = {
        "version": 1,
        "recipes": {recipe: {"base": "pocket", "steps": 4, "number": n} for n, recipe in enumerate(recipes)},
        "dataset": {"name": name, "hash": "0" * 64, "identities": [*identities], "prompts": [*prompts]},
        "options": {"metrics": list(COLUMNS), "seeds": 1},
        "versions": {"fastface": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "cores": 2},
    }
    (folder / "run.json").write_text(json.dumps(info))
    lines = [json.dumps(row.to_json()) + "\n" for row in rows]
    (folder / "images.jsonl").write_text("".join(lines), encoding="utf-8")
    summary = summarize(rows, COLUMNS, recipes=recipes, resamples=resamples)
    (folder / "summary.json").write_text(json.dumps(summary))
