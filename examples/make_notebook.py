"""Writes examples/fastface.ipynb, the Python use step by step: python examples/make_notebook.py

Plain JSON and no outputs: whoever opens the notebook runs it. A test executes its cells in order.
"""

from __future__ import annotations

import json
from pathlib import Path

PAGE = Path(__file__).with_name("fastface.ipynb")

CELLS = [
    """\
# fastface in Python

Every cell runs on a CPU without a download: the *pocket* is a trained miniature of the stack that ships
with the package. For the real one write `FastFace("hyper-fastface")`; it needs an NVIDIA GPU and 12 GB of
models. Install with `pip install .` from the checkout, and start the notebook in the folder `examples/`.""",
    """\
from fastface_cli import FastFace

face = FastFace("pocket")
me = face.identity("portrait.png")
face.generate(me, "watercolor; a smiling woman", seed=3)[0]""",
    """\
A recipe is loaded once and stays loaded. `identity` takes one or several photos, as paths or Pillow
images; `generate` gives Pillow images. The same seed gives the same picture.""",
    """\
from PIL import Image

pictures = face.generate(me, "pencil drawing; a serious woman", seed=1, count=4)
row = Image.new("RGB", (128 * len(pictures), 128))
for place, picture in enumerate(pictures):
    row.paste(picture, (128 * place, 0))
row""",
    """\
## How strongly the person speaks

`adapter_scale` weighs the identity half of attention; 0 leaves the person out.""",
    """\
scales = (0.0, 0.4, 0.8, 1.2)
row = Image.new("RGB", (128 * len(scales), 128))
for place, scale in enumerate(scales):
    row.paste(face.generate(me, "a photo of a woman", seed=1, adapter_scale=scale)[0], (128 * place, 0))
row""",
    """\
## Changing the recipe

Overrides are those of `--set`. The plan says what every step does: weights, and which of the three
guidance branches are computed.""",
    """\
gentle = FastFace("pocket", overrides=["guidance.text=[1, 2, 2, 1]", "adapter.scale=0.7"])
for step in gentle.pipeline.plan():
    print(f"t {step.timestep:.0f}: identity {step.identity}, text {step.text}, branches {step.branches}")
gentle.generate(me, "watercolor; a smiling woman", seed=3)[0]""",
    """\
## The best of several

Several pictures are made, and the one most like the person is kept, among those that follow the prompt.
dlib judges where it is installed, because it did not condition the pictures.""",
    """\
best = face.best_of(me, "watercolor; a smiling woman", n=4, seed=1)
for score in best.scores:
    print(score)
print("judged by", best.judge, "- kept seed", best.seed)
best.image""",
    """\
## Keeping a person without the photo

An identity is an embedding and an aligned crop: it says who somebody is, so treat the file like the
photo.""",
    """\
import tempfile
from pathlib import Path

from fastface_cli.identity.identity import Identity

with tempfile.TemporaryDirectory() as folder:
    file = me.save(Path(folder) / "me.safetensors")
    again = Identity.load(file)
face.generate(again, "a photo of a woman", seed=1)[0]""",
    """\
## When it cannot

Everything that goes wrong is a `FastFaceError` with one sentence, a hint, and the command line's exit
code.""",
    """\
from fastface_cli.errors import FastFaceError

try:
    face.identity(Image.new("RGB", (256, 256), "white"))
except FastFaceError as error:
    print(error.message)
    print("hint:", error.hint)
    print("exit code:", error.exit_code)""",
]
"""Text and code in turn; the first is text."""


def render() -> str:
    """The whole notebook."""
    cells = []
    for index, source in enumerate(CELLS):
        cell = {"cell_type": "code" if index % 2 else "markdown", "id": f"cell-{index}", "metadata": {}}
        if index % 2:
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    page = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
