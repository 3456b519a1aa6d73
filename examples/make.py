"""Generate every image of the documentation with the pocket stack: python examples/make.py

Run it again after the pocket weights change. The images show no real person: the portrait is generated
without a reference photo, and everything else is generated from that portrait.

`python examples/make.py --sdxl` generates docs/images/sdxl.png instead, with the full-size default recipe; it
requires a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastface_cli import FastFace
from fastface_cli.app.pipeline import GeneratedImage, Request
from fastface_cli.app.provenance import provenance_of
from fastface_cli.identity.identity import Identity
from fastface_cli.output.images import write_image
from fastface_cli.output.metadata import describe
from fastface_cli.sampling import attention

mpl.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
PORTRAIT = HERE / "portrait.png"
FACE = "a portrait of a smiling young woman with long dark hair"
METHODS = ("baseline", "dcg", "am1", "fastface", "fastface-am2")
ALL = ("baseline", "dcg", "am1", "am2", "fastface", "fastface-am2", "base")
PROMPTS = (
    "a photo of a smiling woman",
    "watercolour painting of a woman, white background",
    "pencil drawing of a serious woman",
)
STYLES = (
    "photo; a smiling woman",
    "comic book style; a smiling woman",
    "pencil drawing; a smiling woman",
    "watercolour; a smiling woman",
    "black and white; a smiling woman",
    "sepia photograph; a smiling woman",
)
SDXL_PROMPTS = (
    "photo of an astronaut, on the moon",
    "comic book hero, in a city at night",
    "pencil drawing of a sailor",
    "watercolour of a gardener, in a greenhouse",
    "oil painting of a baroque composer",
    "film still of a detective, in the rain",
)
STYLES_SEED = 5
SEED = 3
PLAIN = {"metadata": {"Software": None}, "dpi": 110, "pil_kwargs": {"optimize": True}}
"""Options of `savefig`: no version in the file, so that equal images are equal bytes."""


def placeholder_identity() -> Identity:
    """An arbitrary identity; at adapter scale 0 it is never used."""
    embedding = np.zeros((1, 512), np.float32)
    embedding[0, 0] = 1
    return Identity(embedding, np.zeros((1, 224, 224, 3), np.uint8), np.ones(1, np.float32))


def draw_portrait(candidates: int = 16) -> None:
    """Generate several people who do not exist; keep the face that best matches the description."""
    face = FastFace("pocket-base", overrides=["adapter.scale=0", "adapter.lora_scale=0"], device="cpu")
    requests = [Request(FACE, seed, placeholder_identity()) for seed in range(candidates)]
    scored: list[tuple[float, GeneratedImage]] = []
    for result in face.pipeline.generate(requests, batch_size=8):
        score = face.scorer.score(
            result.image, identity=placeholder_identity(), prompt=FACE, seed=result.request.seed
        )
        if score.likeness is not None and score.prompt is not None:
            scored.append((score.prompt, result))
    _, best = max(scored, key=lambda pair: pair[0])
    write_image(best.image, PORTRAIT, text=describe(provenance_of(face.recipe, best)), force=True)
    print(f"{PORTRAIT.relative_to(HERE.parent)}: seed {best.request.seed} of {candidates}")


def draw_styles(recipe: str, prompts: Sequence[str], file: str) -> None:
    """Draw one photo and six prompts, three per row: the README's figure."""
    tile, line, gap = 320, 34, 8
    photo = 2 * (tile + line) + gap - line
    sheet = Image.new("RGB", (photo + 3 * (tile + gap), photo + line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    sheet.paste(Image.open(PORTRAIT).convert("RGB").resize((photo, photo), Image.Resampling.LANCZOS))
    draw.text((0, photo + 6), "the photo", fill="black", font=font)
    face = FastFace(recipe)
    me = face.identity(PORTRAIT)
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, 3)
        corner = (photo + gap + column * (tile + gap), row * (tile + line + gap))
        image = face.generate(me, prompt, seed=STYLES_SEED)[0]
        sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), corner)
        draw.text((corner[0], corner[1] + tile + 6), prompt, fill="black", font=font)
    sheet.save(IMAGES / file, optimize=True)
    print(f"docs/images/{file}")


def draw_methods() -> None:
    """Draw the portrait and the images of each method, for docs/how-it-works.md."""
    figure, axes = plt.subplots(len(PROMPTS), len(METHODS) + 1, figsize=(9.6, 5.4), layout="constrained")
    portrait = Image.open(PORTRAIT).convert("RGB")
    for column, method in enumerate(METHODS, start=1):
        face = FastFace(f"pocket-{method}", device="cpu")
        me = face.identity(PORTRAIT)
        for row, prompt in enumerate(PROMPTS):
            axes[row, column].imshow(face.generate(me, prompt, seed=SEED)[0])
        axes[0, column].set_title(method, fontsize=10)
    axes[1, 0].imshow(portrait)
    axes[1, 0].set_title("the photo", fontsize=10)
    for row, prompt in enumerate(PROMPTS):
        axes[row, 1].set_ylabel(prompt.replace(" of", "\nof").replace(", ", ",\n"), fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    save(figure, "methods.png")


def draw_people(rows: int = 6) -> None:
    """Draw people of the example data set, one per row, and the image of every recipe."""
    people = sorted((HERE / "mini" / "id_photos").glob("*.png"))[:rows]
    figure, axes = plt.subplots(rows, len(ALL) + 1, figsize=(9.6, 1.2 * rows + 0.3), layout="constrained")
    for row, photo in enumerate(people):
        axes[row, 0].imshow(Image.open(photo).convert("RGB"))
    axes[0, 0].set_title("reference", fontsize=9)
    for column, method in enumerate(ALL, start=1):
        face = FastFace(f"pocket-{method}", device="cpu")
        axes[0, column].set_title("base, 30 steps" if method == "base" else method, fontsize=9)
        for row, photo in enumerate(people):
            axes[row, column].imshow(face.generate(face.identity(photo), "photo; a person", seed=SEED)[0])
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, "people.png")


@contextmanager
def recorded_attention():
    """Record identity attention after manipulation, in the order of the layers that ran."""
    maps: list[np.ndarray] = []
    original = attention.manipulate

    def manipulate(before, chain, images):
        after = original(before, chain, images)
        maps.append(after.numpy())
        return after

    attention.manipulate = manipulate
    try:
        yield maps
    finally:
        attention.manipulate = original


def attention_maps(step: int, method: str, *overrides: str) -> tuple[Image.Image, np.ndarray]:
    """Return an image, and its identity attention at one step as the layers used it, [4 tokens, h, w].

    The maps are the mean over heads and over the layers of the finest resolution, in the branch with both the
    identity and the prompt.
    """
    face = FastFace(f"pocket-{method}", overrides=overrides, device="cpu")
    me = face.identity(PORTRAIT)
    with recorded_attention() as recorded:
        result = next(face.pipeline.generate([Request(PROMPTS[0], SEED, me)]))
    layers = len(recorded) // face.recipe.sampling.steps
    maps = recorded[step * layers : (step + 1) * layers]
    finest = max(layer.shape[2] for layer in maps)
    side = round(finest**0.5)
    mean = np.mean([layer[-1].mean(0) for layer in maps if layer.shape[2] == finest], axis=0)
    return result.image, mean.T.reshape(-1, side, side)


def draw_attention(step: int = 1) -> None:
    """Draw the effect of attention manipulation on the four identity tokens, for docs/how-it-works.md."""
    # Only manipulated attention is recorded; with power 1 it equals the baseline.
    unchanged = "attention.transforms=[{kind: power, p: 1}]"
    rows = [
        ("A as it is (baseline)", *attention_maps(step, "am1", unchanged)),
        ("scale-power (AM1)", *attention_maps(step, "am1")),
        ("scheduled softmask (AM2)", *attention_maps(step, "am2")),
    ]
    figure, axes = plt.subplots(3, 5, figsize=(9.6, 5.6), layout="constrained")
    for token in range(4):
        axes[0, token + 1].set_title(f"token {token}", fontsize=10)
    for row_axes, (name, image, maps) in zip(axes, rows, strict=True):
        row_axes[0].imshow(image)
        row_axes[0].set_ylabel(name, fontsize=9)
        for token, axis in enumerate(row_axes[1:]):
            heat_map = axis.imshow(maps[token], cmap="magma", vmin=0, vmax=maps.max())
        bar = figure.colorbar(heat_map, ax=row_axes[1:].tolist(), fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, "attention.png")


def save(figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, **PLAIN)
    plt.close(figure)
    print(f"docs/images/{name}")


def main() -> None:
    if "--sdxl" in sys.argv[1:]:
        draw_styles("hyper-fastface", SDXL_PROMPTS, "sdxl.png")
        return
    draw_portrait()
    draw_styles("pocket", STYLES, "styles.png")
    draw_methods()
    draw_attention()
    # The example data set has its own module, because it selects its people with other metrics.
    subprocess.run([sys.executable, "-m", "training.mini_set"], check=True, cwd=HERE.parent)
    draw_people()


if __name__ == "__main__":
    main()
